"""Files and directories that are there whole or not at all, and work that one process at a time does."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file so that a kill leaves either the old one or the new one."""
    # Another writer's name differs even on another machine, where the process may have the same number.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON, or something other than an object.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoder or the parser
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


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
def only_process(lock: pathlib.Path, doing: str) -> Iterator[None]:
    """What one process at a time does: it holds the lock of this file, which is made, until it leaves or is killed.

    Where the file system has no locks, this warns and goes on.

    Args:
        lock: the file, which stays.
        doing: what this process wants to do, for the error.

    Raises:
        RuntimeError: another process is doing it.
    """
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is {doing}; wait for it to end, or stop it.") from error
        except OSError as error:
            logging.warning("%s cannot be locked (%s): see to it that no other process is %s.", lock, error, doing)
        yield


@contextlib.contextmanager
def new_directory(directory: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write into that gets its name when the context ends, and is gone if that ends by an error.

    What a killed process left of it, hidden beside it, is removed.

    Raises:
        FileExistsError: `directory` exists.
        RuntimeError: another process is writing it.
    """
    directory = new_path(directory)
    staging = directory.with_name(f".{directory.name}.being-written")
    staging.mkdir(exist_ok=True)
    lock = staging / ".lock"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(only_process(lock, f"writing {directory}"))
            left = [path for path in staging.iterdir() if path != lock]
        except FileNotFoundError as error:
            raise RuntimeError(f"another process has just been writing {directory}; start again.") from error
        try:
            for path in left:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            yield staging
            os.rename(staging, directory)
            (directory / lock.name).unlink()
        finally:
            shutil.rmtree(staging, ignore_errors=True)
