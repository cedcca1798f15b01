"""A tiny dataset, and the real train.py in processes of its own."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from ttt_jax.data.builder import TokenRecordings, write_records
from ttt_jax.data.tokens import INFO_FILE, TokenInfo, info_to_json

ROOT = pathlib.Path(__file__).parents[2]
TINY = pathlib.Path(__file__).parent / "tiny.py"


class Run:
    """train.py on the tiny config in one workdir; each `start` is a process."""

    def __init__(self, dataset: pathlib.Path, workdir: pathlib.Path, environment: dict[str, str], mode: str = "crops"):
        self.workdir = workdir
        self._command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"--config={TINY}",
            f"--workdir={workdir}",
            f"--config.data.directory={dataset}",
            f"--config.data.mode={mode}",
            "--config.optim.lr=0.01",
        ]
        self._environment = {**os.environ, **environment}

    def start(self, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*self._command, *flags], env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, *flags: str) -> tuple[int, str]:
        process = self.start(*flags)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def lines(self) -> list[dict]:
        path = self.workdir / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]

    def deterministic_lines(self) -> list[dict]:
        lines = self.lines()
        for line in lines:
            line.get("train", {}).pop("frames_per_second", None)
        return lines

    def last_step(self) -> int:
        return max((line["step"] for line in self.lines()), default=0)

    def checkpoint_names(self) -> list[str]:
        """Finished ones ("7") and those being written ("7.orbax..."), by step."""
        root = self.workdir / "checkpoints"
        names = [path.name for path in root.iterdir()] if root.is_dir() else []
        return sorted(names, key=lambda name: int(name.split(".")[0]))

    def wait(self, process: subprocess.Popen, condition) -> None:
        """Returns when `condition()` holds; fails when the process ends before."""
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, f"ended before it could be disturbed:\n{process.communicate()[0]}"
            assert time.monotonic() < deadline
            time.sleep(0.001)


SPLITS = {"train": (200, 90, 15), "validation": (60,)}
"""Frames of each recording."""


def make_example(name: str) -> dict:
    """A recording whose codes rise by small random steps, so that there is something to learn."""
    split, num_frames = name.split("/")
    rng = np.random.default_rng(int(num_frames))
    codes = rng.integers(0, 3, (int(num_frames), 17)).cumsum(0) % 20
    return {"id": f"{split}-{num_frames}", "codes": codes.astype(np.int32), "metadata": "{}"}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> pathlib.Path:
    """A finished dataset with the vocabulary cut down to 20."""
    directory = tmp_path_factory.mktemp("dataset")
    records = {split: [f"{split}/{frames}" for frames in lengths] for split, lengths in SPLITS.items()}
    write_records(directory, TokenRecordings, records=records, make_example=make_example, num_streams=17)
    info = TokenInfo("codec2", 12.5, 8000, num_codebooks=8, card=20, text_card=20)
    (directory / INFO_FILE).write_text(info_to_json(info, {split: list(frames) for split, frames in SPLITS.items()}))
    return directory


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> pathlib.Path:
    """Of compiled functions, shared by the many processes."""
    return tmp_path_factory.mktemp("compilation_cache")


@pytest.fixture
def cached_compilation(compilation_cache):
    """Lets the runs inside this process share compiled functions as well."""
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def tiny_config_path() -> pathlib.Path:
    return TINY


@pytest.fixture(scope="session")
def process_environment(compilation_cache, fast_compilation) -> dict[str, str]:
    """Spares the many processes most of their start."""
    return {
        "XLA_FLAGS": fast_compilation,
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def new_run(dataset, tmp_path, process_environment) -> Run:
    return Run(dataset, tmp_path / "run", process_environment)


@pytest.fixture(scope="session")
def make_follow_run(dataset, process_environment) -> Callable[[pathlib.Path], Run]:
    """A run in a given workdir."""
    return lambda workdir: Run(dataset, workdir, process_environment, "follow")


@pytest.fixture
def new_follow_run(dataset, tmp_path, process_environment) -> Run:
    return Run(dataset, tmp_path / "run", process_environment, "follow")


@pytest.fixture(scope="session")
def undisturbed_follow(dataset, tmp_path_factory, process_environment) -> Run:
    """The same, following recordings."""
    run = Run(dataset, tmp_path_factory.mktemp("undisturbed_follow"), process_environment, "follow")
    code, output = run.finish()
    assert code == 0, output
    return run


@pytest.fixture(scope="session")
def undisturbed(dataset, tmp_path_factory, process_environment) -> Run:
    """A run from its first step to its last in one process."""
    run = Run(dataset, tmp_path_factory.mktemp("undisturbed"), process_environment)
    code, output = run.finish()
    assert code == 0, output
    return run
