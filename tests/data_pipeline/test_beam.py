import pathlib
import sys

import pytest

from ttt_jax.data import beam, conversations


def note(item):
    folder, name = item
    (folder / name).touch()


def test_run_reaches_every_item(tmp_path):
    beam.run(note, [(tmp_path, f"{i}") for i in range(10)], "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}" for i in range(10)]
    beam.run(note, [], "")


def fail(item):
    raise ValueError(f"item {item} is bad")


def test_a_worker_s_error_ends_the_run():
    with pytest.raises(ValueError, match="item 3 is bad"):
        beam.run(fail, [3], "")


def test_flags_are_split_as_in_a_shell():
    from apache_beam.options.pipeline_options import DirectOptions, PortableOptions, StandardOptions

    options = beam.pipeline_options("""--direct_num_workers=3 --environment_config='{"command": "a b"}'""")
    assert options.view_as(StandardOptions).runner.endswith("FnApiRunner")
    assert options.view_as(DirectOptions).direct_num_workers == 3
    assert options.view_as(PortableOptions).environment_config == '{"command": "a b"}'
    assert beam.pipeline_options("--runner=FlinkRunner").view_as(StandardOptions).runner == "FlinkRunner"


@pytest.mark.parametrize(("flags", "message"), [("runner=X", "expected flags"), ("--a='", "No closing quotation")])
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=f"beam_options: .*{message}"):
        beam.pipeline_options(flags)


def test_without_the_extra_nothing_is_begun(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "apache_beam"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    output: pathlib.Path = tmp_path / "out"
    with pytest.raises(ImportError, match=r"beam_options: Apache Beam is not installed: pip install 'ttt-jax\[beam\]'"):
        conversations.make(output, hours=0.015, seed=5, min_minutes=0.2, max_minutes=0.4, beam_options="")
    assert not output.exists()
