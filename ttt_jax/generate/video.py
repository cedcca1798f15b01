"""Samples videos from a trained Video-DiT, for the texts of a dataset.

    python -m ttt_jax.generate.video --checkpoint=runs/video-tiny --data=data/moving_shapes --output=samples.gif

An output named .gif shows the samples above the videos that the texts belong to, where latents are RGB pixels as those
of moving shapes. One named .npy gets the latents, float32 [videos, frames, channels, h, w], as a VAE's decoder takes
them, that is without the dataset's `scale`. Exit codes: 0 done, 1 an error.
"""

import dataclasses
import functools
import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from ttt_jax import programs
from ttt_jax.checkpoint import load
from ttt_jax.data.videos import Video, VideoDataset, open_videos
from ttt_jax.files import write_atomically
from ttt_jax.models.video_dit import VideoDiT, VideoDiTConfig, diffusion, sampler

ZOOM, MARGIN, LINE = 10, 8, 14
"""Of a picture: GIF pixels for a latent's, between videos, and for a line of text."""

FRAME_MILLISECONDS, LAST_MILLISECONDS = 250, 1250


def generate(
    config: VideoDiTConfig,
    params: Any,
    text: np.ndarray,
    empty_text: np.ndarray,
    shape: tuple[int, int, int],
    *,
    seed: int = 0,
    num_steps: int = sampler.NUM_STEPS,
    scale: float = sampler.SCALE,
    power: float = sampler.POWER,
    progress: bool = False,
) -> np.ndarray:
    """Videos for texts, with guidance away from the empty text.

    Args:
        config: The model.
        params: Its parameters.
        text: Float [B, scenes, L, text_dim].
        empty_text: Float [L, text_dim].
        shape: Frames, rows and columns of the latents.
        seed: Of the noise.
        num_steps: See `sampler.sample`.
        scale: See `sampler.guidance`.
        power: See `sampler.guidance`.
        progress: Show a progress bar.

    Returns:
        Latents, float32 [B, frames, in_channels, h, w].

    Raises:
        ValueError: Texts or sizes that do not fit the model, or steps that do not fit the schedule.
    """
    schedule = diffusion.zero_snr_schedule()
    config = dataclasses.replace(config, remat=False)  # whose loop needs a second copy of the parameters
    frames, height, width = shape
    without = np.broadcast_to(empty_text, text.shape)
    texts = jnp.asarray(np.concatenate([text, without]), jnp.float32)

    @jax.jit
    def network(params, x, texts, timestep, weight):
        both, when = jnp.concatenate([x, x]), jnp.concatenate([timestep, timestep])
        output: Any = VideoDiT(config).apply({"params": params}, both, texts, when)
        conditional, unconditional = jnp.split(diffusion.denoised(schedule, both, output, when), 2)
        return sampler.guided(conditional, unconditional, weight)

    def denoise(x, timestep, weight):
        return network(params, x, texts, timestep, jnp.float32(weight))

    start, steps = jax.random.split(jax.random.key(seed))
    noise = jax.random.normal(start, (len(text), frames, config.in_channels, height, width))
    options = {"num_steps": num_steps, "scale": scale, "power": power, "progress": progress}
    return np.asarray(sampler.sample(denoise, noise, steps, schedule=schedule, **options))


def write_gif(path: pathlib.Path, samples: np.ndarray, videos: list[Video], scene_frames: int) -> None:
    """Samples above the dataset's videos, with the caption of the scene that is seen.

    Args:
        path: Of the GIF.
        samples: float [B, frames, 3, h, w], RGB in [-1, 1].
        videos: Those whose texts they were made for.
        scene_frames: Frames by which one scene starts after the other.
    """
    rows = [np.asarray(samples), np.stack([video.video for video in videos]).astype(np.float32)]
    pictures = [_picture(rows, videos, frame, scene_frames) for frame in range(samples.shape[1])]
    durations = [FRAME_MILLISECONDS] * (len(pictures) - 1) + [LAST_MILLISECONDS]
    content = io.BytesIO()
    pictures[0].save(content, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_atomically(path, content.getvalue())


def _picture(rows: list[np.ndarray], videos: list[Video], frame: int, scene_frames: int) -> Image.Image:
    height, width = (size * ZOOM for size in rows[0].shape[-2:])
    canvas = Image.new("RGB", (len(videos) * (width + MARGIN) + MARGIN, 2 * (height + MARGIN + LINE) + LINE), "white")
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        top = r * (height + MARGIN + LINE) + LINE
        draw.text((MARGIN, top - LINE + 1), ("sampled", "from the dataset, for the same captions")[r], fill="black")
        for c, video in enumerate(row):
            pixels = np.clip((video[frame].transpose(1, 2, 0) + 1) * 127.5, 0, 255).round().astype(np.uint8)
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (MARGIN + c * (width + MARGIN), top))
    for c, video in enumerate(videos):
        if video.captions:
            scene = min(max(frame - 1, 0) // scene_frames, len(video.captions) - 1)
            left, top = MARGIN + c * (width + MARGIN), canvas.height - LINE
            draw.text((left, top), video.captions[scene], fill="black")
    return canvas


def run(
    checkpoint: str, data: str, output: str, *, split: str, number: int, first: int, **options: Any
) -> tuple[np.ndarray, list[Video]]:
    """What the program does: samples for `number` texts of a split from its `first` on, into `output`.

    Returns:
        The latents and the videos of the dataset.

    Raises:
        FileNotFoundError, ValueError: No model or dataset, or ones that do not go together.
    """
    config, params = load(checkpoint)
    if not isinstance(config, VideoDiTConfig):
        name = type(config).__name__.removesuffix("Config")
        raise ValueError(f"checkpoint: expected a VideoDiT, {checkpoint} holds a {name}")
    path = pathlib.Path(output)
    if path.suffix not in (".gif", ".npy"):
        raise ValueError(f"output: expected a name that ends in .gif or .npy, got {output!r}")
    if path.suffix == ".gif" and config.in_channels != 3:
        raise ValueError(
            f"output: latents of {config.in_channels} channels are no pixels, so there is no GIF of them; write them "
            "to a .npy file and decode that with the VAE they belong to"
        )
    dataset = open_videos(data, split)
    videos = _videos(dataset, first, number)
    text = np.stack([video.text for video in videos]).astype(np.float32)
    shape = dataset.info.num_frames, dataset.info.height, dataset.info.width
    samples = generate(config, params, text, dataset.empty_text, shape, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        content = io.BytesIO()
        np.save(content, samples / np.float32(dataset.info.scale))
        write_atomically(path, content.getvalue())
    else:
        write_gif(path, samples, videos, config.attn_length)
    return samples, videos


def _videos(dataset: VideoDataset, first: int, number: int) -> list[Video]:
    if first + number > len(dataset):
        raise ValueError(f"number: expected at most {len(dataset) - first} after first={first}, got {number}")
    return [dataset[i] for i in range(first, first + number)]


def define_flags() -> dict[str, flags.FlagHolder]:
    """The program's flags, defined only where it runs as one."""
    holders = (
        flags.DEFINE_string("checkpoint", None, "Workdir of train.py, or a converted model.", required=True),
        flags.DEFINE_string("data", None, "Dataset of videos whose texts are used.", required=True),
        flags.DEFINE_string("output", None, "Name of a .gif or a .npy file.", required=True),
        flags.DEFINE_string("split", "test", "Split of the dataset."),
        flags.DEFINE_integer("number", 3, "Videos.", lower_bound=1),
        flags.DEFINE_integer("first", 0, "The first of them.", lower_bound=0),
        flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0),
        flags.DEFINE_integer("num_steps", sampler.NUM_STEPS, "Steps of the sampler.", lower_bound=1),
        flags.DEFINE_float(
            "scale", sampler.SCALE, "Of the guidance, which rises from 1 to 1 + scale.", lower_bound=0.0
        ),
        flags.DEFINE_float("power", sampler.POWER, "How late the guidance rises.", lower_bound=0.0),
    )
    return {holder.name: holder for holder in holders}


def main(holders: dict[str, flags.FlagHolder]) -> None:
    """Run the program."""
    run(**{name: holder.value for name, holder in holders.items()}, progress=True)
    print(f"wrote {holders['output'].value}")


if __name__ == "__main__":
    programs.run(functools.partial(main, define_flags()))
