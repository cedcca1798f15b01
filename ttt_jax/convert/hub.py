"""Downloading a repository's weights from the Hugging Face hub, with the extra `hub`."""

import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Patterns(NamedTuple):
    """Names of files, with wildcards."""

    allow: list[str]
    ignore: list[str]


def is_repository(name: str) -> bool:
    """Whether `name` looks like OWNER/NAME and no such path exists here."""
    return _REPOSITORY.fullmatch(name) is not None and not pathlib.Path(name).exists()


def download(name: str, wanted: Callable[[pathlib.Path], Patterns]) -> pathlib.Path:
    """The folder with what is wanted of a repository; an interrupted download goes on where it stopped.

    Args:
        name: OWNER/NAME.
        wanted: Which weights, told the folder with the repository's JSON files and tokenizers, which come first.

    Raises:
        ValueError: huggingface_hub is not installed, or the repository cannot be had; says what to do.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"--input: {name} is no path here; to download it as a Hugging Face repository: pip install 'ttt-jax[hub]'"
        ) from error
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.model"]))
        weights = wanted(folder)
        huggingface_hub.snapshot_download(name, allow_patterns=weights.allow, ignore_patterns=weights.ignore)
    # Of its own, of the HTTP library and of the file system.
    except Exception as error:
        raise ValueError(
            f"--input: {name} is no path here and could not be downloaded as a Hugging Face repository "
            f"({type(error).__name__}: {error}). One that is private or asks for agreement needs `hf auth login` first."
        ) from error
    return folder
