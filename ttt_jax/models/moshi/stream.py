"""Moshi one frame at a time: the user's codes in, Moshi's text and audio tokens out."""

from collections.abc import Sequence
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
    extra_heads: jax.Array | None = None  # [B, heads, extra_heads_dim] float32, of models that have them


class Sampling(NamedTuple):
    """How tokens are drawn; temperature 0 is greedy, top_k 0 draws from all."""

    temperature: float
    top_k: int
    temperature_text: float
    top_k_text: int


def init_stream(config: MoshiConfig, params, batch_size: int) -> Stream:
    """`batch_size` conversations before their first frame."""
    layers = init_state(config, params, batch_size)
    tokens = jnp.full((batch_size, config.num_streams, config.max_delay + 2), UNGENERATED_TOKEN, jnp.int32)
    return Stream(layers, tokens, jnp.zeros(batch_size, jnp.int32))


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
    condition: jax.Array | None = None,
) -> tuple[jax.Array, Stream]:
    """One frame of every conversation, as Kyutai's `LMGen.step`. Jit it with the config and sampling values static.

    Args:
        config: of the model.
        params: Moshi's parameter tree; never changed.
        stream: from `init_stream` or the previous step (donate it: the caches are then updated in place).
        user_codes: `[B, k]` int32 in [-1, card), the last k audio streams of the user's frame, n_q - dep_q <= k <= n_q;
            -1 is no token. More than n_q - dep_q override streams that the depth transformer predicts (PersonaPlex has
            no others, and k = `config.user_q`), or leave them to it where they are -2. Hibiki's may be `card`, which
            ends what is to be translated. Under jit, where values cannot be refused, one outside the range is taken as
            the lowest.
        rng: a key, needed unless both temperatures are 0. Fold the step in: every call needs its own.
        temperature: of the audio tokens; 0 is greedy.
        top_k: audio tokens to draw from, 0 is all.
        temperature_text: of the text token, None takes `temperature`.
        top_k_text: text tokens to draw from, None takes `top_k`.
        active: `[B]` bool; an inactive row returns -2 and its conversation does not move.
        reset: `[B]` bool; these rows start a new conversation before this frame.
        condition: `[B or 1, dim]` of `condition_vector`, the same at every step; None is no value for any condition.
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
        condition=condition,
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
    condition: jax.Array | None = None,
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
    given = _within(_of_all_streams(config, user_codes), _given_ranges(config))
    forced = None if forced is None else _within(forced, _forced_ranges(config))
    position = stream.position if reset is None else jnp.where(reset, 0, stream.position)
    delays = jnp.asarray(config.delays, jnp.int32)
    initial = jnp.asarray(config.initial_tokens, jnp.int32)[None]
    tokens = _write_given(stream.tokens, position, delays[1:], given)
    present = _read(tokens, jnp.broadcast_to(position[:, None], tokens.shape[:2]))
    present = jnp.where(position[:, None] <= delays[None], initial, present)

    model, variables = Moshi(config), {"params": params}
    length = None if active is None else active.astype(jnp.int32)
    options = {"condition": condition, "method": "temporal"}
    outputs: Any = model.apply(variables, present[:, :, None], stream.layers, length, reset, **options)
    z, text_logits, layers = outputs
    known = _known(tokens[:, : 1 + config.dep_q], position, config, forced)
    drawn, logits = _draw_frame(model, variables, z[:, 0], text_logits[:, 0, 0], rng, sampling, known)
    extra: Any = model.apply(variables, z, method="extra_heads") if config.extra_heads_num_heads else None

    own = slice(0, 1 + config.dep_q)
    after = position + 1
    tokens = _write(tokens, own, jnp.broadcast_to(after[:, None], drawn.shape), drawn)
    out = _read(tokens[:, own], after[:, None] - config.max_delay + delays[None, own])
    out = jnp.where((after <= config.max_delay)[:, None], UNGENERATED_TOKEN, out)
    if active is not None:
        out = jnp.where(active[:, None], out, UNGENERATED_TOKEN)
        tokens = jnp.where(active[:, None, None], tokens, stream.tokens)
        after = jnp.where(active, after, position)
    step_logits = StepLogits(text_logits[:, :, 0], logits, None if extra is None else extra[:, :, 0])
    return out, Stream(layers, tokens, after), step_logits


def _of_all_streams(config: MoshiConfig, user_codes):
    """`[B, n_q]`: the user's codes of the last streams, -2 in the others."""
    others = ((0, 0), (config.n_q - user_codes.shape[1], 0))
    return jnp.pad(user_codes.astype(jnp.int32), others, constant_values=UNGENERATED_TOKEN)


def _write_given(tokens, position, delays, given):
    """Writes the codes `given [B, n_q]` where their delays put them.

    Where none is given, -2 takes the place of what the ring held there before; but without a delay that is what the
    last step drew for this position.
    """
    at = position[:, None] + delays[None]
    drawn = (given == UNGENERATED_TOKEN) & (delays == 0)[None]
    return _write(tokens, slice(1, None), at, jnp.where(drawn, _read(tokens[:, 1:], at), given))


def _known(tokens, position, config: MoshiConfig, forced):
    """`[B, 1 + dep_q]`, what the next position holds whatever is drawn for it; -2 where that is not known."""
    delays = jnp.asarray(config.delays[: 1 + config.dep_q], jnp.int32)[None]
    initial = jnp.asarray(config.initial_tokens[: 1 + config.dep_q], jnp.int32)[None]
    after = jnp.broadcast_to(position[:, None] + 1, tokens.shape[:2])
    is_audio = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] > 0
    known = jnp.where(is_audio & (delays > 0), _read(tokens, after), UNGENERATED_TOKEN)
    if forced is not None:
        known = jnp.where(known == UNGENERATED_TOKEN, forced, known)
    return jnp.where(after <= delays, initial, known)


def _draw_frame(model: Moshi, variables, z, text_logits, rng, sampling: Sampling, known):
    """The text token, then the audio tokens one by one: `[B, 1 + dep_q]` and the audio logits `[B, dep_q, card]`."""
    dep_q = model.config.dep_q
    keys = [None] * (1 + dep_q) if rng is None else list(jax.random.split(rng, 1 + dep_q))
    token = _take(_draw(text_logits, keys[0], sampling.temperature_text, sampling.top_k_text), known, 0)
    tokens, logits, past = [token], [], None
    for j in range(dep_q):
        step_logits, past = model.apply(variables, z, j, token, past, method="depth_step")
        token = _take(_draw(step_logits, keys[j + 1], sampling.temperature, sampling.top_k), known, j + 1)
        tokens.append(token)
        logits.append(step_logits)
    none = jnp.zeros((text_logits.shape[0], 0, model.config.card), text_logits.dtype)
    return jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1) if logits else none


def _draw(logits, key, temperature: float, top_k: int):
    """One token per row of `[B, card]`, int32."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if 0 < top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)


def _take(drawn, known, k: int):
    return jnp.where(known[:, k] == UNGENERATED_TOKEN, drawn, known[:, k])


def _write(buffer, streams: slice, positions, values):
    """Writes `values [B, K]` at `positions [B, K]` of the ring's `streams`."""
    slots = positions % buffer.shape[-1]
    here = jnp.arange(buffer.shape[-1], dtype=jnp.int32)[None, None] == slots[:, :, None]
    part = jnp.where(here, values[:, :, None].astype(jnp.int32), buffer[:, streams])
    return buffer.at[:, streams].set(part)


def _read(buffer, positions):
    """The ring's tokens at `positions [B, K]`."""
    return jnp.take_along_axis(buffer, (positions % buffer.shape[-1])[:, :, None], axis=2)[:, :, 0]


class Range(NamedTuple):
    """What a stream's tokens may be: `lowest <= token < end`."""

    lowest: int
    end: int


def _forced_ranges(config: MoshiConfig) -> list[Range]:
    """Of each own stream, text first: what can be said (the initial token follows it), or -2."""
    return [Range(UNGENERATED_TOKEN, end) for end in config.initial_tokens[: 1 + config.dep_q]]


def _given_ranges(config: MoshiConfig) -> list[Range]:
    """Of each audio stream: -1 is no token, and -2 leaves a stream that is predicted to the model."""
    end = config.card + (config.model_type == "hibiki")  # Kyutai ends what is to be translated by the initial token
    return [Range(UNGENERATED_TOKEN, config.card)] * config.dep_q + [Range(ZERO_TOKEN, end)] * (
        config.n_q - config.dep_q
    )


def _within(tokens, ranges: Sequence[Range]):
    """`tokens [B, K]` as int32, the lowest one in place of what is outside its range: its embedding would be NaN."""
    lowest, end = (jnp.asarray(bounds, jnp.int32)[None] for bounds in zip(*ranges, strict=True))
    tokens = tokens.astype(jnp.int32)
    return jnp.where((tokens >= lowest) & (tokens < end), tokens, lowest)


def _check_range(name: str, tokens, ranges: Sequence[Range], first_stream: int):
    """Refuses values outside their ranges where they are known."""
    if isinstance(tokens, Tracer):
        return
    tokens = np.asarray(tokens)
    bad = np.argwhere((tokens < [r.lowest for r in ranges]) | (tokens >= [r.end for r in ranges]))
    if len(bad):
        row, k = (int(i) for i in bad[0])
        raise ValueError(
            f"{name}[{row}, {k}] = {tokens[row, k]} is outside [{ranges[k].lowest}, {ranges[k].end}) of stream "
            f"{first_stream + k}; was it made with another codec or tokenizer?"
        )


def _given_streams(config: MoshiConfig, user_codes) -> int:
    """How many streams `user_codes` has, or the fewest it may have where that does not fit."""
    fewest = config.n_q - config.dep_q
    streams = user_codes.shape[1] if user_codes.ndim == 2 else fewest
    return streams if fewest <= streams <= config.n_q else fewest


def _check_step(config, stream, user_codes, rng, sampling: Sampling, active, reset, forced):
    if not isinstance(stream, Stream):
        raise ValueError(f"stream must be what init_stream or the step before returned, got {type(stream).__name__}")
    batch = stream.position.shape[0]
    for name, x, shape in (
        ("user_codes", user_codes, (batch, _given_streams(config, user_codes))),
        ("active", active, (batch,)),
        ("reset", reset, (batch,)),
        ("forced", forced, (batch, 1 + config.dep_q)),
    ):
        if x is None:
            continue
        expected = jnp.bool_ if name in ("active", "reset") else jnp.integer
        if x.shape != shape or not jnp.issubdtype(x.dtype, expected):
            more = f", or of up to n_q = {config.n_q} streams" if name == "user_codes" else ""
            raise ValueError(f"{name} must be {expected.__name__} of shape {shape}{more}, got {x.dtype}{list(x.shape)}")
    others = config.n_q - user_codes.shape[1]
    _check_range("user_codes", user_codes, _given_ranges(config)[others:], 1 + others)
    if forced is not None:
        _check_range("forced", forced, _forced_ranges(config), 0)
    for name in ("temperature", "temperature_text", "top_k", "top_k_text"):
        if not getattr(sampling, name) >= 0:
            raise ValueError(
                f"{name} must be >= 0 (0 is {'greedy' if 'temp' in name else 'all tokens'}), got "
                f"{getattr(sampling, name)}"
            )
    if rng is None and (sampling.temperature or sampling.temperature_text):
        raise ValueError("rng is needed to sample at a temperature above 0; pass a jax.random.key of this step")
    if rng is not None and not isinstance(rng, jax.Array | np.ndarray):
        raise ValueError(f"rng must be a jax.random.key of this step, got {rng!r}")
