import os
import weakref

import numpy as np
import pytest

from ttt_jax.data import pipeline, reader
from ttt_jax.data.audio import BadRecordingError


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
    return pipeline.Plan(output, settings, "codec2", None, 100, 2)


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
    one_at_a_time = pipeline.Plan(output, {}, "codec2", None, 100, 1)
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


def test_one_builder_at_a_time(tmp_path):
    with pipeline._only_builder(tmp_path), pytest.raises(RuntimeError, match="another process is building"), \
            pipeline._only_builder(tmp_path):  # fmt: skip
        pass


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

    codes = pipeline.encode_blocks(blocks(), pipeline.get_codec("codec2"))
    assert codes.shape == (16, 250)
