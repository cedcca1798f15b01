"""Downloading a repository's weights from the Hugging Face hub, with the extra `hub`."""

import pathlib
import re

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(name: str) -> bool:
    """Whether `name` looks like OWNER/NAME and no such path exists here."""
    return _REPOSITORY.fullmatch(name) is not None and not pathlib.Path(name).exists()


def download(name: str) -> pathlib.Path:
    """The folder with the repository's safetensors and JSON files; an interrupted download goes on where it stopped.

    Raises:
        ValueError: huggingface_hub is not installed, or the repository cannot be had; says what to do.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"--input: {name} is no path here; to download it as a Hugging Face repository: pip install 'ttt-jax[hub]'"
        ) from error
    patterns = ["*.safetensors", "*.json", "*.model"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    # Of its own, of the HTTP library and of the file system.
    except Exception as error:
        raise ValueError(
            f"--input: {name} is no path here and could not be downloaded as a Hugging Face repository "
            f"({type(error).__name__}: {error}). One that is private or asks for agreement needs `hf auth login` first."
        ) from error
