"""Videos of scenes with a text each: who attends to whom, and the order in which TTT reads.

Parts are `{"text": [B, scenes, L, ...], "video": [B, frames, h, w, ...]}`, h and w counted in patches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.attention import flash
from ttt_jax.layers.attention.bidirectional import attend_real, cut, summed
from ttt_jax.layers.rope import RotaryEmbedding, rotate_3d
from ttt_jax.layers.ttt import TTTLayer
from ttt_jax.layers.two_way import Parts


def attend_scenes(q: Parts, k: Parts, v: Parts, *, stride: int, shared: int, rope: RotaryEmbedding) -> Parts:
    """Softmax attention inside every scene, all scenes in one batch; parts `[..., H, D]` to such.

    Scene i is its text and the frames `[i * stride, i * stride + stride + shared)`, as far as there are any. Frames
    that two scenes hold get the mean of both outputs. Video alone is rotated, frames counted from the scene's first.
    """
    num_scenes, text_length = q["text"].shape[1:3]
    batch, frames, height, width = q["video"].shape[:4]
    per_frame, rest = height * width, q["video"].shape[4:]
    segment = (stride + shared) * per_frame
    positions = grid_positions(stride + shared, height, width)

    def gathered(parts: Parts, rotated: bool):
        tokens = parts["video"].reshape(batch, frames * per_frame, *rest)
        tokens = cut(tokens, num_scenes, segment, stride * per_frame)
        return jnp.concatenate([parts["text"], rotate_3d(rope, tokens, positions) if rotated else tokens], axis=2)

    starts = stride * np.arange(num_scenes)
    real = text_length + per_frame * np.clip(frames - starts, 0, stride + shared)
    real = jnp.broadcast_to(jnp.asarray(real, jnp.int32)[None], (batch, num_scenes))
    use_flash = flash.choose(None, flash.bidirectional_refusal(segment, q["video"], None))
    attend = flash.attend_real if use_flash else attend_real
    out = attend(gathered(q, True), gathered(k, True), gathered(v, False), real)
    # The output projection is affine, so the mean of projected outputs is the projected mean.
    video = summed(out[:, :, text_length:].astype(at_least_float32(out.dtype)), stride * per_frame)
    video = video[:, : frames * per_frame].reshape(batch, frames, height, width, *rest)
    frame = np.arange(frames)[:, None]
    holders = np.sum((frame >= starts) & (frame < starts + stride + shared), axis=1)
    holders = jnp.asarray(holders, video.dtype).reshape(1, frames, 1, 1, 1, 1)
    return {"text": out[:, :, :text_length], "video": (video / holders).astype(out.dtype)}


def grid_positions(frames: int, height: int, width: int) -> jax.Array:
    """(frame, row, column) of the tokens in reading order, int32 `[frames * height * width, 3]`."""
    axes = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.int32) for n in (frames, height, width)), indexing="ij")
    return jnp.stack([axis.reshape(-1) for axis in axes], axis=-1)


def read_scenes(ttt: TTTLayer, parts: Parts) -> Parts:
    """TTT over all scenes as `interleave` orders them, parts `[..., width]` to such.

    Step sizes are made of the interleaved tokens, so each stays with its token. Video is rotated by its place, frames
    counted through all scenes; text is not.
    """
    _, num_scenes, text_length, _ = parts["text"].shape
    grid = parts["video"].shape[1:4]
    positions = {
        "text": jnp.zeros((1, num_scenes, text_length, 3), jnp.int32),
        "video": grid_positions(*grid).reshape(1, *grid, 3),
    }
    y, _ = ttt(interleave(parts), positions=interleave(positions))
    return undo_interleave(y, parts)


def interleave(parts: Parts) -> jax.Array:
    """One sequence `[B, T, ...]`: text 0, video 0, text 1, video 1, ...

    Each scene has `frames // scenes` frames, the first one the remainder too.
    """
    text, video = parts["text"], parts["video"]
    batch, num_scenes, text_length, *rest = text.shape
    frames, per_frame = video.shape[1], video.shape[2] * video.shape[3]
    first = frames % num_scenes
    videos = video[:, first:].reshape(batch, num_scenes, frames // num_scenes * per_frame, *rest)
    scenes = jnp.concatenate([text, videos], axis=2)
    scenes = scenes.reshape(batch, num_scenes * scenes.shape[2], *rest)
    extra = video[:, :first].reshape(batch, first * per_frame, *rest)
    return jnp.concatenate([scenes[:, :text_length], extra, scenes[:, text_length:]], axis=1)


def undo_interleave(tokens: jax.Array, like: Parts) -> Parts:
    """The parts, in the shapes of those of `like`, that `interleave` made a sequence of."""
    batch, num_scenes, text_length = like["text"].shape[:3]
    frames, height, width = like["video"].shape[1:4]
    end = text_length + frames % num_scenes * height * width  # of what only the first scene has
    scenes = jnp.concatenate([tokens[:, :text_length], tokens[:, end:]], axis=1)
    scenes = scenes.reshape(batch, num_scenes, scenes.shape[1] // num_scenes, *tokens.shape[2:])
    videos = scenes[:, :, text_length:]
    videos = videos.reshape(batch, num_scenes * videos.shape[2], *tokens.shape[2:])
    video = jnp.concatenate([tokens[:, text_length:end], videos], axis=1)
    return {
        "text": scenes[:, :, :text_length],
        "video": video.reshape(batch, frames, height, width, *tokens.shape[2:]),
    }


def reverse(parts: Parts) -> Parts:
    """All video tokens in the opposite order, and the scenes' texts; not the tokens inside a text."""
    return {"text": jnp.flip(parts["text"], axis=1), "video": jnp.flip(parts["video"], axis=(1, 2, 3))}
