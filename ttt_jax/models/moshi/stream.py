"""Moshi one frame at a time: the user's codes in, Moshi's text and audio tokens out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ttt_jax.models.moshi.config import UNGENERATED_TOKEN, ZERO_TOKEN, MoshiConfig
from ttt_jax.models.moshi.model import LayerState, Moshi, init_state


class Stream(NamedTuple):
    """Everything a conversation carries from frame to frame; every leaf has leading axis B and a constant shape."""

    layers: tuple[LayerState, ...]
    tokens: jax.Array  # [B, 1 + n_q, max_delay + 2] int32, delayed tokens; position p lies in slot p % (max_delay + 2)
    position: jax.Array  # [B] int32, frames so far


class StepLogits(NamedTuple):
    """What the tokens of a step were drawn from."""

    text_logits: jax.Array  # [B, 1, text_card] float32
    logits: jax.Array  # [B, dep_q, card] float32


class Sampling(NamedTuple):
    """How tokens are drawn; temperature 0 is greedy, top_k 0 draws from all."""

    temperature: float
    top_k: int
    temperature_text: float
    top_k_text: int


def init_stream(config: MoshiConfig, params, batch_size: int) -> Stream:
    """`batch_size` conversations before their first frame."""
    tokens = jnp.full((batch_size, config.num_streams, config.max_delay + 2), UNGENERATED_TOKEN, jnp.int32)
    return Stream(init_state(config, params, batch_size), tokens, jnp.zeros(batch_size, jnp.int32))


def stream_step(
    config: MoshiConfig,
    params,
    stream: Stream,
    user_codes: jax.Array,
    *,
    rng: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    temperature_text: float | None = None,
    top_k_text: int | None = None,
    active: jax.Array | None = None,
    reset: jax.Array | None = None,
    forced: jax.Array | None = None,
) -> tuple[jax.Array, Stream]:
    """One frame of every conversation, as Kyutai's `LMGen.step`. Jit it with the config and sampling values static.

    Args:
        config: of the model.
        params: Moshi's parameter tree; never changed.
        stream: from `init_stream` or the previous step (donate it: the caches are then updated in place).
        user_codes: `[B, n_q - dep_q]` int32 in [-1, card), the user's frame; -1 is no token. Under jit, where values
            cannot be refused, one outside the range is taken as -1.
        rng: a key, needed unless both temperatures are 0. Fold the step in: every call needs its own.
        temperature: of the audio tokens; 0 is greedy.
        top_k: audio tokens to draw from, 0 is all.
        temperature_text: of the text token, None takes `temperature`.
        top_k_text: text tokens to draw from, None takes `top_k`.
        active: `[B]` bool; an inactive row returns -2 and its conversation does not move.
        reset: `[B]` bool; these rows start a new conversation before this frame.
        forced: `[B, 1 + dep_q]` int32 in [-2, text_card) for text and [-2, card) for audio, tokens to take instead of
            drawing, -2 where to draw. Like the drawn ones they are the tokens of frame `t - delays[k]` of stream k, t
            counting the row's calls from 0. Under jit one outside the range is drawn instead.

    Returns:
        tokens `[B, 1 + dep_q]` int32 of frame `t - max_delay`, -2 while the delays fill; and the stream to go on with.

    Raises:
        ValueError: wrong shapes, dtypes or sampling values, or (outside jit) tokens out of range.
    """
    tokens, stream, _ = stream_step_with_logits(
        config,
        params,
        stream,
        user_codes,
        rng=rng,
        temperature=temperature,
        top_k=top_k,
        temperature_text=temperature_text,
        top_k_text=top_k_text,
        active=active,
        reset=reset,
        forced=forced,
    )
    return tokens, stream


def stream_step_with_logits(
    config: MoshiConfig,
    params,
    stream: Stream,
    user_codes: jax.Array,
    *,
    rng: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    temperature_text: float | None = None,
    top_k_text: int | None = None,
    active: jax.Array | None = None,
    reset: jax.Array | None = None,
    forced: jax.Array | None = None,
) -> tuple[jax.Array, Stream, StepLogits]:
    """`stream_step` that also returns the logits of the tokens it wrote: `(tokens, stream, logits)`."""
    sampling = Sampling(
        temperature,
        top_k,
        temperature if temperature_text is None else temperature_text,
        top_k if top_k_text is None else top_k_text,
    )
    user_codes = jnp.asarray(user_codes)
    active, reset, forced = (None if x is None else jnp.asarray(x) for x in (active, reset, forced))
    _check_step(config, stream, user_codes, rng, sampling, active, reset, forced)
    own_cards, user_cards = _cards(config)
    user_codes = _within(user_codes, ZERO_TOKEN, user_cards)
    forced = None if forced is None else _within(forced, UNGENERATED_TOKEN, own_cards)
    position = stream.position if reset is None else jnp.where(reset, 0, stream.position)
    delays = jnp.asarray(config.delays, jnp.int32)
    user_at = position[:, None] + delays[None, 1 + config.dep_q :]
    tokens = _write(stream.tokens, slice(1 + config.dep_q, None), user_at, user_codes)
    present = _read(tokens, jnp.broadcast_to(position[:, None], tokens.shape[:2]))
    initial = jnp.asarray(config.initial_tokens, jnp.int32)[None]
    present = jnp.where(position[:, None] <= delays[None], initial, present)

    model, variables = Moshi(config), {"params": params}
    length = None if active is None else active.astype(jnp.int32)
    outputs: Any = model.apply(variables, present[:, :, None], stream.layers, length, reset, method="temporal")
    z, text_logits, layers = outputs
    drawn, logits = _draw_frame(model, variables, z[:, 0], text_logits[:, 0, 0], rng, sampling, forced)

    own = slice(0, 1 + config.dep_q)
    after = position + 1
    tokens = _write(tokens, own, jnp.broadcast_to(after[:, None], drawn.shape), drawn)
    out = _read(tokens[:, own], after[:, None] - config.max_delay + delays[None, own])
    out = jnp.where((after <= config.max_delay)[:, None], UNGENERATED_TOKEN, out)
    if active is not None:
        out = jnp.where(active[:, None], out, UNGENERATED_TOKEN)
        tokens = jnp.where(active[:, None, None], tokens, stream.tokens)
        after = jnp.where(active, after, position)
    return out, Stream(layers, tokens, after), StepLogits(text_logits[:, :, 0], logits)


def _draw_frame(model: Moshi, variables, z, text_logits, rng, sampling: Sampling, forced):
    """The text token, then the audio tokens one by one: `[B, 1 + dep_q]` and the audio logits `[B, dep_q, card]`."""
    dep_q = model.config.dep_q
    keys = [None] * (1 + dep_q) if rng is None else list(jax.random.split(rng, 1 + dep_q))
    token = _take(_draw(text_logits, keys[0], sampling.temperature_text, sampling.top_k_text), forced, 0)
    tokens, logits, past = [token], [], None
    for j in range(dep_q):
        step_logits, past = model.apply(variables, z, j, token, past, method="depth_step")
        token = _take(_draw(step_logits, keys[j + 1], sampling.temperature, sampling.top_k), forced, j + 1)
        tokens.append(token)
        logits.append(step_logits)
    return jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1)


def _draw(logits, key, temperature: float, top_k: int):
    """One token per row of `[B, card]`, int32."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if 0 < top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)


def _take(drawn, forced, k: int):
    return drawn if forced is None else jnp.where(forced[:, k] == UNGENERATED_TOKEN, drawn, forced[:, k])


def _write(buffer, streams: slice, positions, values):
    """Writes `values [B, K]` at `positions [B, K]` of the ring's `streams`."""
    slots = positions % buffer.shape[-1]
    here = jnp.arange(buffer.shape[-1], dtype=jnp.int32)[None, None] == slots[:, :, None]
    part = jnp.where(here, values[:, :, None].astype(jnp.int32), buffer[:, streams])
    return buffer.at[:, streams].set(part)


def _read(buffer, positions):
    """The ring's tokens at `positions [B, K]`."""
    return jnp.take_along_axis(buffer, (positions % buffer.shape[-1])[:, :, None], axis=2)[:, :, 0]


def _cards(config: MoshiConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many values a token can take in each own stream, text first, and in each of the user's."""
    cards = config.initial_tokens  # the initial token follows the last one that can be said
    return cards[: 1 + config.dep_q], cards[1 + config.dep_q :]


def _within(tokens, lowest: int, cards: tuple[int, ...]):
    """`tokens [B, K]` as int32, `lowest` in place of what is outside `[lowest, card)`: its embedding would be NaN."""
    tokens = tokens.astype(jnp.int32)
    inside = (tokens >= lowest) & (tokens < jnp.asarray(cards, jnp.int32)[None])
    return jnp.where(inside, tokens, jnp.int32(lowest))


def _check_range(name: str, tokens, lowest: int, cards: tuple[int, ...], first_stream: int):
    """Refuses values outside `[lowest, card)` where they are known."""
    if isinstance(tokens, Tracer):
        return
    tokens = np.asarray(tokens)
    bad = np.argwhere((tokens < lowest) | (tokens >= np.asarray(cards)[None]))
    if len(bad):
        row, k = (int(i) for i in bad[0])
        raise ValueError(
            f"{name}[{row}, {k}] = {tokens[row, k]} is outside [{lowest}, {cards[k]}) of stream {first_stream + k}; "
            "was it made with another codec or tokenizer?"
        )


def _check_step(config, stream, user_codes, rng, sampling: Sampling, active, reset, forced):
    batch = stream.position.shape[0]
    for name, x, shape in (
        ("user_codes", user_codes, (batch, config.n_q - config.dep_q)),
        ("active", active, (batch,)),
        ("reset", reset, (batch,)),
        ("forced", forced, (batch, 1 + config.dep_q)),
    ):
        if x is None:
            continue
        expected = jnp.bool_ if name in ("active", "reset") else jnp.integer
        if x.shape != shape or not jnp.issubdtype(x.dtype, expected):
            raise ValueError(f"{name} must be {expected.__name__} of shape {shape}, got {x.dtype}{list(x.shape)}")
    own_cards, user_cards = _cards(config)
    _check_range("user_codes", user_codes, ZERO_TOKEN, user_cards, 1 + config.dep_q)
    if forced is not None:
        _check_range("forced", forced, UNGENERATED_TOKEN, own_cards, 0)
    for name in ("temperature", "temperature_text", "top_k", "top_k_text"):
        if getattr(sampling, name) < 0:
            raise ValueError(
                f"{name} must be >= 0 (0 is {'greedy' if 'temp' in name else 'all tokens'}), got "
                f"{getattr(sampling, name)}"
            )
    if rng is None and (sampling.temperature or sampling.temperature_text):
        raise ValueError("rng is needed to sample at a temperature above 0; pass a jax.random.key of this step")
