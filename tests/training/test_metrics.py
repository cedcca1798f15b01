import json

import numpy as np

from ttt_jax.training.metrics import MetricsFile


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_beyond_the_restored_step_and_a_torn_last_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        for step in range(1, 6):
            metrics.write(step, "train", {"loss": np.float32(step), "audio": np.arange(2.0)})
    with path.open("a") as file:
        file.write('{"step": 3, "tra')
    with MetricsFile(path, 3) as metrics:
        assert steps(path) == [1, 2, 3]
        metrics.write(4, "train", {"loss": 0.5})
        metrics.sync()
    assert steps(path) == [1, 2, 3, 4]
    assert json.loads(path.read_text().splitlines()[0]) == {"step": 1, "train": {"loss": 1.0, "audio": [0.0, 1.0]}}


def test_a_run_from_the_start_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with MetricsFile(path, 0) as metrics:
            metrics.write(1, "train", {})
    assert steps(path) == [1]
