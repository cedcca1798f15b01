from ttt_jax.files import write_atomically


def test_written_files_are_whole(tmp_path):
    for content in ("old", b"new"):
        write_atomically(tmp_path / "a.json", content)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"new"
