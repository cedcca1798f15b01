import contextlib

import pytest

from ttt_jax.files import new_directory, write_atomically


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
