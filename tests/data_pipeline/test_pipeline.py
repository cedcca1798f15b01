import concurrent.futures
import os
import pathlib
import pickle
import random
import subprocess
import sys
import time
import weakref
from multiprocessing import forkserver

import numpy as np
import pytest
import soundfile

from ttt_jax.data import beam, pipeline, prepare, processes, reader
from ttt_jax.data.audio import BadRecordingError
from ttt_jax.data.codecs import get_codec


class Noise:
    """A recording of `seconds` of noise; `fail` names how it goes wrong instead."""

    def __init__(self, name, seconds=1.0, fail=None, calls=None):
        self.id, self.version, self.cost = name, f"{seconds}", seconds
        self.seconds, self.fail, self.calls = seconds, fail, calls

    def read(self, codec):
        if self.calls is not None:
            (self.calls / f"{self.id}.{os.getpid()}").touch()
        if self.fail == "skip":
            raise BadRecordingError("it is bad")
        if self.fail == "die":
            os._exit(7)
        rng = np.random.default_rng(len(self.id))
        blocks = (0.1 * rng.standard_normal((1, 8000)) for _ in range(round(self.seconds)))
        return pipeline.Speech(iter(blocks), lambda: None, lambda: {"seconds": self.seconds})


def plan(output, **settings):
    return pipeline.Plan(output, settings, get_codec("codec2"), None, 100, 2)


def split(ids):
    return {i: "test" if i == ids[-1] else "train" for i in ids}


def test_build_skips_what_it_cannot_use_and_a_rerun_does_nothing(tmp_path, capsys, contents):
    sources = [Noise("a", 1), Noise("b", 2), Noise("c", fail="skip"), Noise("d", 3)]
    output = tmp_path / "out"
    assert pipeline.build(plan(output), sources, split) == {"c": "it is bad"}
    before = contents(output)
    assert not any(name.startswith(".work") for name in before)
    train, test = (reader.open_dataset(output, name) for name in ("train", "test"))
    assert [r.id for r in (train[0], train[1], test[0])] == ["a", "b", "d"]
    assert (train[0].codes[0] == -1).all()
    assert (train[0].codes[9:] == -1).all()
    assert train[0].codes[1:9].min() >= 0
    assert train[1].metadata == {"seconds": 2}
    assert train.info.text_card == 4
    assert pipeline.build(plan(output), sources, split) == {"c": "it is bad"}
    assert "finished already" in capsys.readouterr().out
    assert contents(output) == before


def test_a_dead_worker_stops_the_build_and_a_rerun_keeps_what_was_done(tmp_path, contents):
    calls = tmp_path / "calls"
    calls.mkdir()
    output = tmp_path / "out"
    sources = [Noise("a", 3, calls=calls), Noise("b", 2, fail="die"), Noise("c", 1, calls=calls)]
    one_at_a_time = pipeline.Plan(output, {}, get_codec("codec2"), None, 100, 1)
    with pytest.raises(RuntimeError, match="process for 'b' ended with exit code 7"):
        pipeline.build(one_at_a_time, sources, split)
    with pytest.raises(FileNotFoundError, match="no finished token dataset"):
        reader.open_dataset(output, "train")
    sources[1] = Noise("b", 2, calls=calls)
    pipeline.build(one_at_a_time, sources, split)
    assert sorted(p.name[0] for p in calls.iterdir()) == ["a", "b", "c"]
    pipeline.build(plan(tmp_path / "undisturbed"), sources, split)
    assert contents(output) == contents(tmp_path / "undisturbed")


def test_a_kill_while_publishing_leaves_nothing_that_loads(tmp_path, contents):
    """Files reach the directory one by one, tokens.json last: without it, it is unfinished and is built again."""
    sources = [Noise("a"), Noise("bb", 2)]
    output = tmp_path / "out"
    pipeline.build(plan(output), sources, split)
    whole = contents(output)
    for missing in (["tokens.json"], ["tokens.json", "skipped.json", "dataset_info.json"]):
        for name in missing:
            (output / name).unlink()
        with pytest.raises(FileNotFoundError, match="rerun"):
            reader.open_dataset(output, "train")
        pipeline.build(plan(output), sources, split)
        assert contents(output) == whole


def test_settings_and_inputs_must_stay(tmp_path):
    output = tmp_path / "out"
    sources = [Noise("a"), Noise("bb")]
    pipeline.build(plan(output, seed=1), sources, split)
    with pytest.raises(ValueError, match=r"other settings \(seed was 1, is 2\)"):
        pipeline.build(plan(output, seed=2), sources, split)
    with pytest.raises(ValueError, match="input files have changed"):
        pipeline.build(plan(output, seed=1), [*sources, Noise("c")], split)


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)"):
        pipeline.build(plan(tmp_path), [Noise("a")], split)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_nothing_usable_is_an_error_that_lists_why(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 1 recordings could be used:\n  a: it is bad"):
        pipeline.build(plan(tmp_path / "out"), [Noise("a", fail="skip")], split)


ELSEWHERE = "import pickle, sys; function, tasks = pickle.load(sys.stdin.buffer); list(map(function, tasks))"


@pytest.fixture
def worker_elsewhere(monkeypatch, tmp_path):
    """Stands in for Beam: a process with another current directory, which gets nothing but a pickle."""
    (tmp_path / "elsewhere").mkdir()
    root = pathlib.Path(__file__).parents[2]

    def run(function, tasks, flags):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
        command = [sys.executable, "-c", ELSEWHERE]
        content = pickle.dumps((function, tasks))
        subprocess.run(command, input=content, cwd=tmp_path / "elsewhere", env=environment, check=True)

    monkeypatch.setattr(beam, "run", run)


def test_a_task_holds_all_that_a_worker_elsewhere_needs(worker_elsewhere, monkeypatch, tmp_path, contents):
    monkeypatch.chdir(tmp_path)
    audio = pathlib.Path("audio")
    audio.mkdir()
    soundfile.write(audio / "a.wav", 0.1 * np.sin(np.arange(8000) / 7), 8000)
    prepare.make(audio, pathlib.Path("plain"))
    prepare.make(audio, pathlib.Path("distributed"), beam_options="")
    assert contents(tmp_path / "distributed") == contents(tmp_path / "plain")


def test_workers_that_write_to_another_disk_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(beam, "run", lambda function, tasks, flags: None)
    distributed = pipeline.Plan(tmp_path / "out", {}, get_codec("codec2"), None, 100, 2, beam_options="")
    with pytest.raises(RuntimeError, match=r"left nothing about 'a' in .*shared storage at the same path"):
        pipeline.build(distributed, [Noise("a")], split)


def test_threads_may_run_processes_at_the_same_time(monkeypatch):
    def slow(file, read=forkserver.read_signed):
        # Between seeing that a process has ended and reading how, which one thread alone can.
        time.sleep(random.choice([0, 0.02]))
        return read(file)

    monkeypatch.setattr(forkserver, "read_signed", slow)

    def run(thread):
        return [list(processes.run_in_fresh_processes([(f"{thread}", os.getpid, ())], 1)) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [[[f"{thread}"]] * 5 for thread in range(8)]


def test_one_builder_at_a_time(tmp_path):
    def meanwhile(ids):
        with pytest.raises(RuntimeError, match="another process is building"):
            pipeline.build(plan(tmp_path / "out"), [Noise("a")], split)
        return split(ids)

    pipeline.build(plan(tmp_path / "out"), [Noise("a")], meanwhile)


def test_a_long_recording_streams():
    """Blocks are dropped as soon as they are encoded, so memory does not grow with a recording's length."""
    made = []

    def blocks():
        for _ in range(20):
            block = np.zeros((2, 8000), np.float32)
            made.append(weakref.ref(block))
            # The new one, and those that the loops over here and over there still name.
            assert sum(ref() is not None for ref in made) <= 3
            yield block

    codes = pipeline.encode_blocks(blocks(), get_codec("codec2"))
    assert codes.shape == (16, 250)
