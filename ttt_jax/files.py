"""Files and directories that are there whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file so that a kill leaves either the old one or the new one."""
    # Another writer's name differs even on another machine, where the process may have the same number.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def new_path(path: str | pathlib.Path) -> pathlib.Path:
    """The absolute path of what is to be written, its parent made.

    Raises:
        FileExistsError: `path` exists.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another directory or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def new_directory(directory: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write into that gets its name when the context ends, and is gone if that ends by an error.

    What a killed process left of it, hidden beside it, is removed.

    Raises:
        FileExistsError: `directory` exists.
    """
    directory = new_path(directory)
    staging = directory.with_name(f".{directory.name}.being-written")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        os.rename(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
