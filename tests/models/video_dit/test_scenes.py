"""Scenes: who attends to whom, and in which order TTT reads, against loops in NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers.attention import flash
from ttt_jax.layers.rope import RotaryEmbedding, rotate_3d
from ttt_jax.layers.ttt import TTTConfig, TTTLayer
from ttt_jax.layers.two_way import gated_passes
from ttt_jax.models.video_dit.scenes import (
    attend_scenes,
    grid_positions,
    interleave,
    read_scenes,
    reverse,
    undo_interleave,
)

H, D = 2, 16
GRID = (2, 3)
ROPE = RotaryEmbedding(100.0)
# Scenes, tokens of a text, frames: even, a remainder of one and of more, fewer frames than scenes, no text.
SIZES = [(1, 3, 5), (3, 2, 6), (2, 4, 5), (3, 5, 8), (4, 1, 3), (3, 0, 7)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(num_scenes, text_length, frames, *rest, seed=0, batch=2):
    rng = np.random.default_rng(seed)
    return {
        "text": rng.standard_normal((batch, num_scenes, text_length, *rest)),
        "video": rng.standard_normal((batch, frames, *GRID, *rest)),
    }


def reading_order(num_scenes, text_length, frames):
    """(part, index in it) of every token."""
    order, frame = [], 0
    for scene in range(num_scenes):
        order += [("text", (scene, i)) for i in range(text_length)]
        own = frames // num_scenes + (frames % num_scenes if scene == 0 else 0)
        order += [("video", (frame + f, y, x)) for f in range(own) for y in range(GRID[0]) for x in range(GRID[1])]
        frame += own
    return order


@pytest.mark.parametrize("sizes", SIZES)
def test_interleaving_keeps_what_belongs_to_a_token_and_can_be_undone(sizes):
    tokens, step_sizes = make(*sizes, 5), make(*sizes, H, seed=1)
    joined = jax.tree.map(lambda *x: np.concatenate(x, axis=-1), tokens, step_sizes)
    read = interleave(joined)
    by_hand = [joined[part][(slice(None), *index)] for part, index in reading_order(*sizes)]
    np.testing.assert_array_equal(read, np.stack(by_hand, axis=1))
    np.testing.assert_array_equal(interleave(step_sizes), read[..., 5:])
    jax.tree.map(np.testing.assert_array_equal, undo_interleave(read, joined), joined)


def test_reversed_is_the_video_and_the_order_of_texts():
    parts = make(3, 4, 5, 1)
    turned = reverse(parts)
    np.testing.assert_array_equal(turned["text"], parts["text"][:, ::-1])
    flat = parts["video"].reshape(2, -1, 1)
    np.testing.assert_array_equal(turned["video"].reshape(2, -1, 1), flat[:, ::-1])


def attend(q, k, v, stride, shared):
    return attend_scenes(q, k, v, stride=stride, shared=shared, rope=ROPE)


def one_by_one(q, k, v, stride, shared):
    num_scenes, text_length = q["text"].shape[1:3]
    frames = q["video"].shape[1]
    texts, video, count = [], np.zeros_like(q["video"]), np.zeros(frames)
    for i in range(num_scenes):
        span = slice(i * stride, min(i * stride + stride + shared, frames))
        own = max(0, span.stop - span.start)
        positions = grid_positions(own, *GRID)

        def scene(x, rotated, i=i, span=span, positions=positions):
            tokens = x["video"][:, span].reshape(2, len(positions), H, D)
            tokens = np.asarray(rotate_3d(ROPE, jnp.asarray(tokens), positions)) if rotated else tokens
            return np.concatenate([x["text"][:, i], tokens], axis=1)

        scores = np.einsum("bthd,bshd->bhts", scene(q, True), scene(k, True)) * D**-0.5
        weights = np.exp(scores)
        out = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), scene(v, False))
        texts.append(out[:, :text_length])
        video[:, span] += out[:, text_length:].reshape(2, own, *GRID, H, D)
        count[span] += 1
    return {"text": np.stack(texts, axis=1), "video": video / count[:, None, None, None, None]}


# stride and frames shared; the last ones: a short last scene, one without frames of its own, more shared than not.
@pytest.mark.parametrize(
    ("sizes", "stride", "shared"),
    [((1, 3, 5), 4, 1), ((3, 2, 7), 2, 1), ((2, 0, 4), 2, 0), ((3, 2, 6), 2, 1), ((3, 2, 4), 3, 1), ((3, 1, 6), 1, 3)],
)
def test_batched_scenes_are_scenes_one_by_one(sizes, stride, shared):
    q, k, v = (make(*sizes, H, D, seed=seed) for seed in range(3))
    out = jax.jit(functools.partial(attend, stride=stride, shared=shared))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), out, one_by_one(q, k, v, stride, shared))


def test_cudnn_is_given_the_same_scenes(monkeypatch):
    xla, calls = jax.nn.dot_product_attention, []

    def in_its_place(*args, implementation, **options):
        calls.append(implementation)
        with jax.numpy_dtype_promotion("standard"):
            return xla(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    monkeypatch.setattr(flash, "bidirectional_refusal", lambda *_: None)
    q, k, v = (make(3, 1, 6, H, D, seed=seed) for seed in range(3))  # the last scene is short
    out = jax.jit(functools.partial(attend, stride=2, shared=1))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), out, one_by_one(q, k, v, 2, 1))
    assert calls == ["cudnn"]


@pytest.mark.parametrize(
    ("part", "index", "texts", "frames"),
    [("text", 1, [1], [2, 3, 4]), ("video", 3, [1], [2, 3, 4]), ("video", 4, [1, 2], [2, 3, 4, 5, 6])],
)
def test_a_scene_sees_another_one_through_the_shared_frame_alone(part, index, texts, frames):
    """Scenes of the frames 0 1 2, 2 3 4 and 4 5 6; all of a text or frame is changed, queries apart."""
    q, k, v = (make(3, 2, 7, H, D, seed=seed) for seed in range(3))
    apply = jax.jit(functools.partial(attend, stride=2, shared=1))
    before = apply(q, k, v)
    at = np.arange(k[part].shape[1]) == index
    k, v = ({**x, part: x[part] + np.expand_dims(at, (0, *range(2, x[part].ndim)))} for x in (k, v))
    after = apply(q, k, v)
    changed = {name: np.abs(after[name] - x).max(axis=(0, *range(2, x.ndim))) > 0 for name, x in before.items()}
    assert np.flatnonzero(changed["text"]).tolist() == texts
    assert np.flatnonzero(changed["video"]).tolist() == frames


CONFIG = TTTConfig.video_dit("linear", 2 * D, 2, mini_batch_size=4)


@functools.cache
def layer():
    """A TTT layer with parameters far from their initial values."""
    rng = np.random.default_rng(0)
    module = TTTLayer(CONFIG, dtype=jnp.float64)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1, 2 * D))))["params"]
    return module.bind({"params": jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape), shapes)})


def test_texts_longer_than_a_mini_batch_are_read_as_tokens_one_after_the_other():
    sizes = (2, 2 * CONFIG.mini_batch_size + 1, 3)
    parts, order = make(*sizes, 2 * D), reading_order(*sizes)
    x = np.stack([parts[part][(slice(None), *index)] for part, index in order], axis=1)
    positions = np.asarray([[index if part == "video" else (0, 0, 0) for part, index in order]])
    y = jax.jit(lambda x: layer()(x, positions=positions)[0])(x)
    learned = jax.jit(functools.partial(read_scenes, layer()))(parts)
    by_hand = np.stack([learned[part][(slice(None), *index)] for part, index in order], axis=1)
    np.testing.assert_allclose(by_hand, y, atol=1e-12)


class Passes(nn.Module):
    @nn.compact
    def __call__(self, parts):
        return gated_passes(self, functools.partial(read_scenes, layer()), parts, reverse, 0.1)


def test_reversing_time_swaps_the_two_passes():
    parts = make(3, 2, 7, 2 * D)
    shapes = Passes().init(jax.random.key(0), parts)["params"]
    gates = {name: jnp.full_like(x, 0.5) for name, x in shapes.items()}
    assert sorted(gates) == [f"gate_{a}_{b}" for a in ("backward", "forward") for b in ("text", "video")]

    apply = jax.jit(Passes().apply)

    def only(direction, parts):
        return apply({"params": {name: x if direction in name else 0 * x for name, x in gates.items()}}, parts)

    forward, backward = only("forward", parts), reverse(only("backward", reverse(parts)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), forward, backward)
    assert np.abs(only("backward", parts)["video"] - forward["video"]).max() > 1e-3
