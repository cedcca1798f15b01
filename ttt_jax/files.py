"""Files that are there whole or not at all."""

import os
import pathlib


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file so that a kill leaves either the old one or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
