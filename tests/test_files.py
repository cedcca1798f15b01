import contextlib
import os
import subprocess
import sys

import pytest

from ttt_jax.files import new_directory, only_process, read_json, write_atomically
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import MoshiConfig


def test_written_files_are_whole(tmp_path):
    for content in ("old", b"new"):
        write_atomically(tmp_path / "a.json", content)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"new"


def test_a_new_directory_is_whole_or_not_there(tmp_path):
    with contextlib.suppress(RuntimeError), new_directory(tmp_path / "a") as staging:
        (staging / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.partial").mkdir()  # somebody's own
    with new_directory(tmp_path / "a") as staging:
        (staging / "whole").write_text("x")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "whole", "a.partial"]
    with pytest.raises(FileExistsError, match="choose another"), new_directory(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "whole").exists()


def test_two_writers_of_one_directory_do_not_mix(tmp_path):
    with new_directory(tmp_path / "a") as staging:
        (staging / "of_the_first").write_text("x")
        with pytest.raises(RuntimeError, match="another process is writing"), new_directory(tmp_path / "a"):
            pass
        (staging / "more").write_text("x")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["more", "of_the_first"]


@pytest.mark.parametrize("before", [True, False])
def test_a_writer_that_comes_while_another_one_ends_takes_nothing(tmp_path, monkeypatch, before):
    def rename(source, target, rename=os.rename):
        if not before:
            rename(source, target)
        with pytest.raises((RuntimeError, FileExistsError)), new_directory(tmp_path / "a"):
            pass
        if before:
            rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with new_directory(tmp_path / "a") as staging:
        (staging / "whole").write_text("x")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "whole"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    left = tmp_path / ".a.being-written"
    (left / "half").mkdir(parents=True)
    (left / "half" / "file").write_text("x")
    (left / ".lock").touch()
    with new_directory(tmp_path / "a") as staging:
        (staging / "whole").write_text("x")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "whole"]


def test_a_killed_process_holds_no_lock(tmp_path):
    code = """if True:
        import pathlib, sys, time
        from ttt_jax.files import only_process
        with only_process(pathlib.Path(sys.argv[1]), "sleeping"):
            print(flush=True)
            time.sleep(100)
    """
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(RuntimeError, match="another process is sleeping"), only_process(lock, "sleeping"):
        pass
    holder.kill()
    holder.communicate()
    with only_process(lock, "sleeping"):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"dim": 8,', "cannot be read as JSON: Expecting"),
        (b"\xff", "cannot be read as JSON: 'utf-8' codec"),
        (b"[1]", "expected a JSON object, got a list"),
    ],
)
def test_a_file_that_holds_no_json_object_is_named(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (read_json, MoshiConfig.from_kyutai, MimiConfig.from_kyutai):
        with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
            read(path)
