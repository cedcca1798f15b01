"""Datasets of videos and texts that a VAE and a text encoder have embedded already, as TTT-Video-DiT stores them.

    python -m ttt_jax.data.latents --rows=3s.jsonl --empty_text=empty.safetensors --output=DIR

Each line of ROWS is `{"vid_emb": FILE, "text_chunk_emb": [FILE, ...]}`: the encoder's mean and logvar of the latents
[frames, 2 C, h, w], and an embedding [L, width] of every scene's text. Files are safetensors with one tensor, their
names relative to ROWS. Computing them is not part of this project: CogVideoX's VAE and T5 encoder do, with the scripts
`precomp_video.py` and `precomp_text.py` of ttt-video-dit. Exit codes: 0 done, 1 an error.
"""

import functools
import json
import pathlib
import shlex
from typing import Any

import numpy as np
from absl import flags
from safetensors import safe_open

from ttt_jax import programs
from ttt_jax.data import videos

CONVERT = (
    "python -c 'import sys, torch; from safetensors.torch import save_file; "
    '[save_file({"x": torch.load(f, map_location="cpu").float().contiguous()}, f[:-3] + ".safetensors") '
    "for f in sys.argv[1:]]' "
)
"""What turns the .pt files that are named after it into safetensors beside them; for a shell with PyTorch."""

COGVIDEOX_SCALE = 0.7
"""The `scaling_factor` of CogVideoX-5B's VAE."""


def read_tensor(path: pathlib.Path) -> np.ndarray:
    """The one tensor of a safetensors file, float.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a .pt file (names the command that converts it), or holds another number of tensors.
    """
    if path.suffix in (".pt", ".pth"):
        raise ValueError(
            f"{path}: expected safetensors, got a file of PyTorch, which can run any code when it is read; where there "
            f"is PyTorch, convert it by\n  {CONVERT}{shlex.quote(str(path))}\nand name the .safetensors in the rows"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; names in the rows are relative to their file")
    with safe_open(path, "numpy") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise ValueError(f"{path}: expected one tensor, got {len(names)}: {names}")
        return file.get_tensor(names[0])


def make(
    rows: str | pathlib.Path,
    empty_text: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    scale: float = COGVIDEOX_SCALE,
    held_out: int = 50,
) -> None:
    """Writes the dataset.

    Args:
        rows: the jsonl file.
        empty_text: safetensors with the embedding of "", for text dropout and guidance.
        output: must not exist yet.
        scale: latents are multiplied with when they are read.
        held_out: one video of so many goes to validation.

    Raises:
        FileExistsError, FileNotFoundError: `output` exists, or a file does not.
        ValueError: a line that is no row, a tensor of another shape than the first row's, or numbers beyond float16.
    """
    rows = pathlib.Path(rows)
    numbered = {str(i): line for i, line in enumerate(rows.read_text().splitlines(), 1) if line.strip()}
    lines = {number: _row(line, f"{rows}:{number}") for number, line in numbered.items()}
    if not lines:
        raise ValueError(f"{rows}: expected at least one row, got none")
    video, text = _embeddings(rows.parent, next(iter(lines.values())))
    if video.ndim != 4 or video.shape[1] % 2 or text.ndim != 3:
        raise ValueError(
            f"{rows}:{next(iter(lines))}: expected vid_emb [frames, 2 C, h, w] and each text_chunk_emb [L, width], "
            f"got shapes {video.shape} and, stacked, {text.shape}"
        )
    frames, channels, height, width = video.shape
    info = videos.VideoInfo(frames, channels // 2, height, width, *text.shape, has_moments=True, scale=scale)
    numbers = list(lines)
    validation = numbers[held_out - 1 :: held_out]
    records = {"train": [n for n in numbers if n not in set(validation)], "validation": validation}

    def example(name: str) -> dict[str, Any]:
        where, row = f"{rows}:{name}", lines[name]
        video, text = _embeddings(rows.parent, row)
        narrow = {"video": _narrow(video, info.record_shape, where), "text": _narrow(text, info.text_shape, where)}
        return {"id": row["vid_emb"], **narrow, "captions": json.dumps([])}

    videos.write(output, info, read_tensor(pathlib.Path(empty_text)), records, example)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row["vid_emb"], str) and row["text_chunk_emb"] and all(map(str.strip, row["text_chunk_emb"])):
            return row
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f'{where}: expected {{"vid_emb": FILE, "text_chunk_emb": [FILE, ...]}}, got {line!r}')


def _embeddings(folder: pathlib.Path, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    texts = [read_tensor(folder / name) for name in row["text_chunk_emb"]]
    if len({text.shape for text in texts}) != 1:
        raise ValueError(f"{row['vid_emb']}: its texts have different shapes: {[text.shape for text in texts]}")
    return read_tensor(folder / row["vid_emb"]), np.stack(texts)


def _narrow(x: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    if x.shape != shape:
        raise ValueError(f"{where}: expected a tensor of shape {shape}, as in the first row, got {x.shape}")
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise ValueError(f"{where}: expected finite numbers within float16, got up to {np.abs(x).max()}")
    return narrow


def define_flags() -> dict[str, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one."""
    holders = (
        flags.DEFINE_string("rows", None, "The jsonl file.", required=True),
        flags.DEFINE_string("empty_text", None, "Safetensors with the embedding of the empty text.", required=True),
        flags.DEFINE_string("output", None, "Directory of the dataset.", required=True),
        flags.DEFINE_float("scale", COGVIDEOX_SCALE, "The scaling_factor of the VAE.", lower_bound=0.0),
        flags.DEFINE_integer("held_out", 50, "One video of so many goes to validation.", lower_bound=2),
    )
    return {holder.name: holder for holder in holders}


def main(holders: dict[str, flags.FlagHolder]) -> None:
    """Run the program."""
    make(**{name: holder.value for name, holder in holders.items()})


if __name__ == "__main__":
    programs.run(functools.partial(main, define_flags()))
