"""Short films of a coloured shape that moves as each scene's caption says: a dataset to learn video diffusion from.

    python -m ttt_jax.data.moving_shapes --output=DIR

The latents are the pixels themselves, RGB in [-1, 1]. A scene's caption tells colour, shape and direction; where the
shape starts, only the scene before can tell, so what continues it has to remember. Captions are embedded by fixed
random vectors of their words. Each video follows from (seed, index) alone. Exit codes: 0 done, 1 an error.
"""

import functools
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from ttt_jax import programs
from ttt_jax.data import videos
from ttt_jax.data.splits import numbers_by_split

COLOURS = {
    "red": (1.0, -0.8, -0.8),
    "green": (-0.8, 0.9, -0.8),
    "blue": (-0.6, -0.4, 1.0),
    "yellow": (1.0, 0.9, -0.8),
    "white": (1.0, 1.0, 1.0),
}
KINDS = ("square", "disc", "cross")
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
BACKGROUND = -1.0
RADIUS = 2
"""Of a shape, in pixels around its centre."""

TEXT_LENGTH, TEXT_DIM = 4, 16


class Film(NamedTuple):
    """One video.

    Attributes:
        video: float32 [scenes * scene_frames + 1, 3, size, size] in [-1, 1].
        captions: of each scene.
    """

    video: np.ndarray
    captions: list[str]


def film(seed: int, index: int, *, scenes: int = 3, scene_frames: int = 4, size: int = 16) -> Film:
    """Draws one video.

    The shape moves one pixel a frame, in every scene in a direction that keeps it inside the picture. A scene's last
    frame is the first one of the next.

    Args:
        seed: of the dataset.
        index: of the video.
        scenes: with a caption each.
        scene_frames: steps that the shape takes in a scene.
        size: rows and columns.

    Raises:
        ValueError: the picture is too small to move that far in.
    """
    room = size - 2 * RADIUS - 1
    if scenes < 1 or scene_frames < 1 or room < 2 * scene_frames:
        least = 2 * (scene_frames + RADIUS) + 1
        raise ValueError(
            f"size: expected at least {least} for scene_frames={scene_frames}, and at least one scene, got "
            f"size={size}, scenes={scenes}"
        )
    rng = np.random.default_rng((seed, index))
    colour, kind = rng.choice(list(COLOURS)), rng.choice(KINDS)
    place = rng.integers(0, room + 1, size=2)
    places, captions = [place], []
    for _ in range(scenes):
        possible = [
            name
            for name, step in DIRECTIONS.items()
            if np.all((place + scene_frames * np.array(step) >= 0) & (place + scene_frames * np.array(step) <= room))
        ]
        direction = rng.choice(possible)
        places += [place + (i + 1) * np.array(DIRECTIONS[direction]) for i in range(scene_frames)]
        place = places[-1]
        captions.append(f"{colour} {kind} moves {direction}")
    return Film(np.stack([picture(colour, kind, p + RADIUS, size) for p in places]), captions)


def picture(colour: str, kind: str, centre: np.ndarray, size: int) -> np.ndarray:
    """One frame, float32 [3, size, size]."""
    y, x = (np.abs(np.arange(size) - c) for c in centre)
    y, x = y[:, None], x[None]
    inside = {
        "square": np.maximum(y, x) <= RADIUS,
        "disc": y + x <= RADIUS,
        "cross": (np.minimum(y, x) == 0) & (np.maximum(y, x) <= RADIUS),
    }[kind]
    return np.where(inside, np.array(COLOURS[colour]).reshape(3, 1, 1), BACKGROUND).astype(np.float32)


def embed(caption: str, length: int = TEXT_LENGTH, dim: int = TEXT_DIM) -> np.ndarray:
    """float32 [length, dim]: a fixed vector of standard normals for every word, padded by that of the empty word.

    Raises:
        ValueError: more words than `length`.
    """
    words = caption.split()
    if len(words) > length:
        raise ValueError(f"caption: expected at most {length} words, got {len(words)}: {caption!r}")
    return np.stack([_vector(word, dim) for word in [*words, *[""] * (length - len(words))]])


@functools.cache
def _vector(word: str, dim: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


def make(
    output: str | pathlib.Path,
    *,
    num_videos: int = 4000,
    seed: int = 0,
    scenes: int = 3,
    scene_frames: int = 4,
    size: int = 16,
) -> None:
    """Writes the dataset; see `film` for the arguments.

    Raises:
        FileExistsError: `output` exists.
        ValueError: a size that does not fit.
    """
    draw = functools.partial(film, seed, scenes=scenes, scene_frames=scene_frames, size=size)
    frames = len(draw(0).video)
    info = videos.VideoInfo(frames, 3, size, size, scenes, TEXT_LENGTH, TEXT_DIM)
    records = numbers_by_split(num_videos)

    def example(name: str) -> dict[str, Any]:
        drawn = draw(int(name))
        text = np.stack([embed(caption) for caption in drawn.captions])
        video, text = drawn.video.astype(np.float16), text.astype(np.float16)
        return {"id": name, "video": video, "text": text, "captions": json.dumps(drawn.captions)}

    videos.write(output, info, embed(""), records, example)
    print(f"{output}: {', '.join(f'{len(names)} {name}' for name, names in records.items() if names)} videos")


def define_flags() -> dict[str, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one."""
    holders = (
        flags.DEFINE_string("output", None, "Directory of the dataset.", required=True),
        flags.DEFINE_integer("num_videos", 4000, "Videos, in all splits together.", lower_bound=3),
        flags.DEFINE_integer("seed", 0, "Seed of the whole dataset.", lower_bound=0),
        flags.DEFINE_integer("scenes", 3, "Scenes of a video.", lower_bound=1),
        flags.DEFINE_integer("scene_frames", 4, "Frames of a scene, beside the one it shares.", lower_bound=1),
        flags.DEFINE_integer("size", 16, "Rows and columns of a frame.", lower_bound=1),
    )
    return {holder.name: holder for holder in holders}


def main(holders: dict[str, flags.FlagHolder]) -> None:
    """Run the program."""
    make(**{name: holder.value for name, holder in holders.items()})


if __name__ == "__main__":
    programs.run(functools.partial(main, define_flags()))
