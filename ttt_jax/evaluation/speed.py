"""Speed and memory: one stream frame by frame, the operations by sequence length, a model's training step by length.

All is measured in one run on one device, each shape compiled and warmed up before it is timed, every time a median of
calls that have ended on the device.
"""

import dataclasses
import functools
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ttt_jax import ttt
from ttt_jax.layers.attention import window_attention
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.models.moshi import Moshi, MoshiConfig, init_stream, losses, stream_step

BLOCK_FRAMES = 50
"""Stream steps that are timed together; the first two blocks only warm up."""

LONGEST_SEQUENCE = 16_384
LONGEST_STEP = 4_096
"""Tokens, of operations and of training steps."""

FULL_ATTENTION_BYTES = 3 << 30
"""What the scores of full attention and their gradients may take; longer sequences are left out."""

ENOUGH_SECONDS = 5.0
FULL, WINDOW = "full attention", "window attention"


@dataclasses.dataclass(frozen=True)
class StreamSpeed:
    """`stream_step` over a span of one stream's positions.

    Attributes:
      start_frame: first position.
      end_frame: one behind the last.
      ms_per_frame: median over blocks of calls.
      low_ms: lower quartile.
      high_ms: upper quartile.
      state_bytes: of everything the stream carries, at the end.
      live_bytes: of all JAX arrays of the process, at the end.
      process_bytes: resident memory of the process, at the end; None where the system does not tell.
      device_bytes: in use on the device, at the end; None where it does not tell.
    """

    start_frame: int
    end_frame: int
    ms_per_frame: float
    low_ms: float
    high_ms: float
    state_bytes: int
    live_bytes: int
    process_bytes: int | None
    device_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Throughput:
    """One thing on one sequence of `length` tokens."""

    name: str
    work: str  # "forward" or "training": forward and backward
    length: int
    ms: float
    tokens_per_s: float


@dataclasses.dataclass(frozen=True)
class Crossover:
    """From which length on something takes less time than full attention.

    Attributes:
      name: what is compared with full attention.
      work: "forward" or "training".
      length: tokens, interpolated; None when one of the two is faster at all lengths that both were measured at.
      found: the same in words.
    """

    name: str
    work: str
    length: float | None
    found: str


@dataclasses.dataclass(frozen=True)
class Speed:
    """The benchmark's result.

    Attributes:
      device: name of the device.
      num_cores: cores of the machine.
      dtype: of activations.
      num_heads: of attention and operations.
      head_dim: of each.
      window_frames: of window attention.
      mini_batch_size: of TTT.
      frame_rate_hz: frames per second of speech.
      stream: by position.
      ops: operations by sequence length, one sequence at a time.
      steps: training steps of the model by sequence length: as it is, with its window alone, with full attention.
      crossovers: of operations and steps.
    """

    device: str
    num_cores: int
    dtype: str
    num_heads: int
    head_dim: int
    window_frames: int
    mini_batch_size: int
    frame_rate_hz: float
    stream: list[StreamSpeed]
    ops: list[Throughput]
    steps: list[Throughput]
    crossovers: list[Crossover]


def speed(config: MoshiConfig, params: Any, *, max_frames: int = 100_000, frame_rate_hz: float = 12.5) -> Speed:
    """Measure a model on the default device.

    Args:
      config: of the model.
      params: Moshi's parameter tree; never changed.
      max_frames: of the stream, and an upper limit of sequence lengths. 100 000 steps of a 10 M model take minutes.
      frame_rate_hz: frames per second of speech, for the result.

    Raises:
      ValueError: too few frames to time anything.
    """
    least = 4 * BLOCK_FRAMES
    if max_frames < least:
        raise ValueError(f"max_frames: expected at least {least}, four blocks of calls, got {max_frames}.")
    stream = stream_speeds(config, params, max_frames)
    ops = op_speeds(config, sequence_lengths(min(max_frames, LONGEST_SEQUENCE)))
    steps = step_speeds(config, params, sequence_lengths(min(max_frames, LONGEST_STEP)))
    return Speed(
        device=device_name(),
        num_cores=os.cpu_count() or 1,
        dtype=config.dtype,
        num_heads=config.num_heads,
        head_dim=config.dim // config.num_heads,
        window_frames=config.longest_context,
        mini_batch_size=_mini_batch_size(config),
        frame_rate_hz=frame_rate_hz,
        stream=stream,
        ops=ops,
        steps=steps,
        crossovers=[*crossovers(ops), *crossovers(steps)],
    )


def stream_speeds(config: MoshiConfig, params: Any, max_frames: int) -> list[StreamSpeed]:
    """Step through one stream of `max_frames` frames of random user codes, every call an own dispatch."""
    step = jax.jit(functools.partial(stream_step, config), donate_argnames="stream")
    # Jitted so that the stream lies where the parameters lie: the first step then compiles for all of them.
    stream = jax.jit(init_stream, static_argnums=(0, 2))(config, params, 1)
    rng = np.random.default_rng(0)
    spans, blocks = _spans(max_frames), []
    measured = []
    with tqdm(total=max_frames, unit="frame", desc="streaming") as bar:
        for start in range(0, max_frames - BLOCK_FRAMES + 1, BLOCK_FRAMES):
            shape = (BLOCK_FRAMES, 1, config.n_q - config.dep_q)
            user = list(jnp.asarray(rng.integers(0, config.card, shape), jnp.int32))
            began = time.perf_counter()
            for codes in user:
                _, stream = step(params, stream=stream, user_codes=codes)
            jax.block_until_ready(stream)
            blocks.append(1000 * (time.perf_counter() - began) / BLOCK_FRAMES)
            bar.update(BLOCK_FRAMES)
            if start + BLOCK_FRAMES == spans[0][1]:
                first, end = spans.pop(0)
                if first:  # the frames before the first span compile and warm up
                    measured.append(_stream_speed(first, end, blocks, stream))
                blocks = []
    return measured


def _spans(max_frames: int) -> list[tuple[int, int]]:
    """Spans of positions in whole blocks: the warm-up, then from 100 on about three to a factor of ten."""
    last = max_frames // BLOCK_FRAMES * BLOCK_FRAMES
    edges = [100 * factor * 10**power for power in range(12) for factor in (1, 2, 5)]
    edges = [edge for edge in edges if edge < last]
    return list(zip([0, *edges], [*edges, last], strict=True))


def _stream_speed(first: int, end: int, blocks: list[float], stream) -> StreamSpeed:
    low, middle, high = np.quantile(blocks, [0.25, 0.5, 0.75])
    stats = jax.devices()[0].memory_stats() or {}
    return StreamSpeed(
        start_frame=first,
        end_frame=end,
        ms_per_frame=float(middle),
        low_ms=float(low),
        high_ms=float(high),
        state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(stream)),
        live_bytes=sum(array.nbytes for array in jax.live_arrays()),
        process_bytes=process_bytes(),
        device_bytes=stats.get("bytes_in_use"),
    )


def process_bytes() -> int | None:
    """Resident memory of this process in bytes, as Linux tells it."""
    path = pathlib.Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.is_file() else None


def device_name() -> str:
    """Of the default device; for a CPU its model, where the system tells."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        info = pathlib.Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else device.device_kind
    return device.device_kind


def sequence_lengths(longest: int) -> list[int]:
    """Powers of two from 256 up to `longest`; `longest` alone when it is less."""
    return [1 << n for n in range(8, 60) if 1 << n <= longest] or [longest]


def op_speeds(config: MoshiConfig, lengths: Sequence[int]) -> list[Throughput]:
    """Every operation at the model's sizes, forward and training (gradients of all its inputs), batch 1."""
    measured = []
    with tqdm(total=8 * len(lengths), desc="operations", unit="shape") as bar:
        for length in lengths:
            for name, (function, args) in _operations(config, length).items():
                for work in ("forward", "training"):
                    bar.update()
                    if name == FULL and _score_bytes(config, length) > FULL_ATTENTION_BYTES:
                        continue
                    call = function if work == "forward" else _gradient(function)
                    measured.append(_throughput(name, work, length, functools.partial(jax.jit(call), *args)))
    return measured


def _operations(config: MoshiConfig, length: int) -> dict[str, tuple[Callable, tuple]]:
    """Name -> function and its float arguments."""
    dtype = jnp.dtype(config.dtype)
    heads, size = config.num_heads, config.dim // config.num_heads
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v = (jax.random.normal(key, (1, length, heads, size), dtype) for key in keys[:3])
    lr = jnp.full((1, length, heads), 1 / size, jnp.float32)
    w1 = 0.02 * jax.random.normal(keys[3], (heads, size, size))
    wide = [0.02 * jax.random.normal(key, shape) for key, shape in zip(
        keys[4:], ((heads, size, 4 * size), (heads, 4 * size, size)), strict=True
    )]  # fmt: skip
    zeros, ones = jnp.zeros((heads, size)), jnp.ones((heads, size))
    linear = ttt.TTTLinearParams(w1, zeros, ones, zeros)
    mlp = ttt.TTTMLPParams(wide[0], jnp.zeros((heads, 4 * size)), wide[1], zeros, ones, zeros)
    rope = RotaryEmbedding(config.max_period)
    mini_batch = {"mini_batch_size": _mini_batch_size(config)}
    return {
        "TTT-Linear": (lambda *a: ttt.ttt_linear(*a, **mini_batch)[0], (linear, q, k, v, lr)),
        "TTT-MLP": (lambda *a: ttt.ttt_mlp(*a, **mini_batch)[0], (mlp, q, k, v, lr)),
        WINDOW: (lambda *a: window_attention(*a, window=config.longest_context, rope=rope)[0], (q, k, v)),
        FULL: (lambda *a: jax.nn.dot_product_attention(*a, is_causal=True), (q, k, v)),
    }


def _gradient(function: Callable) -> Callable:
    def total(args):
        return jnp.sum(function(*args).astype(jnp.float32))

    return lambda *args: jax.grad(total)(args)


def step_speeds(config: MoshiConfig, params: Any, lengths: Sequence[int]) -> list[Throughput]:
    """Forward and backward of the whole model on one sequence: as it is, its window alone, full attention."""
    measured = []
    with tqdm(total=3 * len(lengths), desc="training steps", unit="shape") as bar:
        for length in lengths:
            codes = np.random.default_rng(0).integers(
                0, min(config.card, config.text_card), (1, config.num_streams, length)
            )
            for name, variant in _variants(config, length):
                bar.update()
                if name == FULL and config.num_layers * _score_bytes(config, length) > FULL_ATTENTION_BYTES:
                    continue
                call = functools.partial(_step, variant, params, jnp.asarray(codes, jnp.int32))
                measured.append(_throughput(name, "training", length, call))
    return measured


def _variants(config: MoshiConfig, length: int) -> Iterator[tuple[str, MoshiConfig]]:
    """The model as it is, and without TTT (whose parameters are then not read)."""
    if config.ttt is not None and config.ttt_layers:
        yield f"TTT-{'MLP' if config.ttt.kind == 'mlp' else 'Linear'} and window", config
    without = dataclasses.replace(config, ttt=None)
    yield WINDOW, without
    yield FULL, dataclasses.replace(without, attention="window", context=length, sinks=0)


@functools.partial(jax.jit, static_argnums=0)
def _step(config: MoshiConfig, params, codes):
    def loss(params):
        return losses(Moshi(config).apply({"params": params}, codes), codes).total  # pyright: ignore

    return jax.value_and_grad(loss)(params)


def _throughput(name: str, work: str, length: int, call: Callable[[], Any]) -> Throughput:
    seconds = median_seconds(call)
    return Throughput(name, work, length, 1000 * seconds, length / seconds)


def median_seconds(call: Callable[[], Any], *, repeats: int = 5) -> float:
    """Median time of calls whose results are ready, after one that compiles and one that warms up.

    Slow calls are repeated less often.
    """
    for _ in range(2):
        jax.block_until_ready(call())
    times = []
    while len(times) < repeats and sum(times) < ENOUGH_SECONDS:
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def crossovers(measured: Sequence[Throughput]) -> list[Crossover]:
    """Where everything with TTT becomes faster than full attention, from the times at the lengths both have."""
    full = {(m.work, m.length): m.ms for m in measured if m.name == FULL}
    found = []
    for name, work in dict.fromkeys((m.name, m.work) for m in measured if m.name.startswith("TTT")):
        pairs = [
            (m.length, math.log(m.ms / full[work, m.length]))
            for m in measured
            if (m.name, m.work) == (name, work) and (work, m.length) in full
        ]
        found.append(Crossover(name, work, *crossing(sorted(pairs))))
    return found


def crossing(
    pairs: Sequence[tuple[int, float]], better: str = "faster", unit: str = "tokens", decimals: int = 0
) -> tuple[float | None, str]:
    """From which length on something is better than what it is compared with, on logarithmic axes.

    Args:
      pairs: (length, log of the ratio of the two costs), by length.
      better: what a ratio below 1 is called.
      unit: of the lengths.
      decimals: of the length in words.

    Returns:
      The length at the last change from above zero to below, None where there is none; and the same in words.
    """
    if not pairs:
        return None, "not measured"
    lengths = f"{pairs[0][0]} to {pairs[-1][0]} {unit}"
    if all(ratio < 0 for _, ratio in pairs):
        return None, f"{better} at all lengths from {lengths}"
    if pairs[-1][1] >= 0:
        return None, f"not {better} within {lengths}"
    (short, above), (long, below) = next(
        (one, two) for one, two in zip(pairs[-2::-1], pairs[:0:-1], strict=True) if one[1] >= 0 > two[1]
    )
    length = short * (long / short) ** (above / (above - below))
    return length, f"{better} from {length:.{decimals}f} {unit} on"


def _mini_batch_size(config: MoshiConfig) -> int:
    return 16 if config.ttt is None else config.ttt.mini_batch_size


def _score_bytes(config: MoshiConfig, length: int) -> int:
    """Of full attention's scores, probabilities and their gradient, where they are written out."""
    return 3 * 4 * config.num_heads * length**2
