"""Files that are there whole or not at all."""

import os
import pathlib
import uuid


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file so that a kill leaves either the old one or the new one."""
    # Another writer's name differs even on another machine, where the process may have the same number.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
