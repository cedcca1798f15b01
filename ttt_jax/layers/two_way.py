"""Local attention, then TTT over the whole sequence in both directions (Dalal et al. 2025).

`TTTBidirectional` is the block for one-dimensional sequences; the video model is made of the same parts. A sequence
is a mapping of parts, each with its own gates: `{"text": ..., "video": ...}` there, `{"audio": ...}` here.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.attention import segment_attention
from ttt_jax.layers.norm import LayerNorm
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.layers.ttt import TTTConfig, TTTLayer
from ttt_jax.rows import checked_rows, real_tokens, zero_where_not

Parts = dict[str, jax.Array]
Turn = Callable[[Parts], Parts]


def gated_passes(module: nn.Module, learn: Turn, parts: Parts, reverse: Turn, gate_init: float) -> Parts:
    """`u = x + tanh(a_f) * f(x)`, then `u + tanh(a_b) * reverse(f(reverse(u)))`.

    Args:
        module: Owns the gates, `gate_forward_NAME` and `gate_backward_NAME` of shape [width] for every part.
        learn: f, the same weights in both passes.
        parts: x, `[..., width]` each.
        reverse: Reverses the order in which f reads; its own inverse.
        gate_init: Of the gates; not 0, else neither they nor f would get a gradient.

    Returns:
        The parts in their dtypes.
    """
    for direction, turned in (("forward", lambda x: x), ("backward", reverse)):
        learned = turned(learn(turned(parts)))
        for name, x in parts.items():
            init = nn.initializers.constant(gate_init)
            gate: Any = module.param(f"gate_{direction}_{name}", init, x.shape[-1:], at_least_float32(x.dtype))
            gate = jnp.tanh(gate).astype(x.dtype).reshape((1,) * (x.ndim - 1) + x.shape[-1:])
            parts = parts | {name: x + gate * learned[name]}
    return parts


class NormedAttention(nn.Module):
    """Attention with biases and a LayerNorm of each head's queries and keys; who sees whom is for the caller to say."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, parts: Parts, attend: Callable[[Parts, Parts, Parts], Parts]) -> Parts:
        """`[..., width]` to the same; `attend` takes q, k and v, un-rotated parts `[..., H, D]`, to such parts."""
        width = next(iter(parts.values())).shape[-1]
        param_dtype = at_least_float32(self.dtype)

        def heads(name: str) -> Parts:
            dense = nn.Dense(width, dtype=self.dtype, param_dtype=param_dtype, name=name)
            shape = (self.num_heads, width // self.num_heads)
            return {key: dense(x).reshape(*x.shape[:-1], *shape) for key, x in parts.items()}

        q = jax.tree.map(LayerNorm(name="q_norm"), heads("q"))
        k = jax.tree.map(LayerNorm(name="k_norm"), heads("k"))
        out_proj = nn.Dense(width, dtype=self.dtype, param_dtype=param_dtype, name="o")
        return {key: out_proj(x.reshape(*x.shape[:-2], width)) for key, x in attend(q, k, heads("v")).items()}


def attend_segments(
    *, segment: int, overlap: int, rope: RotaryEmbedding, length: jax.Array | None
) -> Callable[[Parts, Parts, Parts], Parts]:
    """What `NormedAttention` takes to see segments of one-dimensional parts; arguments as `segment_attention`'s."""

    def attend(q: Parts, k: Parts, v: Parts) -> Parts:
        options = {"segment": segment, "overlap": overlap, "rope": rope, "length": length}
        return {name: segment_attention(q[name], k[name], v[name], causal=False, **options)[0] for name in q}

    return attend


class TTTBidirectional(nn.Module):
    """Attention inside segments, then TTT over the whole sequence forwards and backwards, with shared weights.

    There is no residual connection and no norm around it: a block is `x + TTTBidirectional(norm(x))`.

    Attributes:
        config: of the TTT layer, `TTTConfig.video_dit(...)`; attention has its width, heads and rotary theta.
        segment: frames that see each other in attention, as in `segment_attention`.
        overlap: frames that a segment shares with the one before; they get the mean of both outputs.
        gate_init: initial value of the gates, not 0.
        dtype: of activations; norms, softmax and the inner loop are float32 (float64 if this is float64).
    """

    config: TTTConfig
    segment: int
    overlap: int = 0
    gate_init: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, length: jax.Array | None = None) -> jax.Array:
        """Read whole sequences.

        Args:
            x: [B, T, width] float.
            length: [B] int, real frames of each row; the others return zeros and never matter. None: all are.

        Returns:
            [B, T, width] in `dtype`.

        Raises:
            ValueError: wrong shapes or dtypes, a causal config, or segments that do not advance.
        """
        c = self.config
        self._check(x)
        length, _ = checked_rows(length, None, *x.shape[:2])
        is_real = real_tokens(length, x.shape[1])
        x = zero_where_not(is_real, x).astype(self.dtype)

        rope = RotaryEmbedding(c.rope_theta)
        attend = attend_segments(segment=self.segment, overlap=self.overlap, rope=rope, length=length)
        ttt = TTTLayer(c, dtype=self.dtype, name="ttt")
        attention = NormedAttention(c.num_heads, self.dtype, name="self_attn")
        y = gated_passes(
            self,
            lambda parts: {"audio": ttt(parts["audio"], length=length)[0]},
            attention({"audio": x}, attend),
            lambda parts: {"audio": _reversed(parts["audio"], length)},
            self.gate_init,
        )["audio"]
        return zero_where_not(is_real, y)

    def _check(self, x):
        if self.config.causal or self.config.positions != "in_sequence":
            raise ValueError("config: expected a bidirectional TTT layer, TTTConfig.video_dit(...), got a causal one.")
        if self.gate_init == 0:
            raise ValueError("gate_init: expected a number that is not 0: nothing behind the gates would be trained.")
        if not isinstance(x, jax.Array | np.ndarray) or x.ndim != 3 or x.shape[-1] != self.config.width:
            raise ValueError(f"x: expected an array of shape [B, T, width = {self.config.width}], got {_shape(x)}.")


def _shape(x):
    return getattr(x, "shape", type(x).__name__)


def _reversed(x: jax.Array, length: jax.Array | None) -> jax.Array:
    """The row's first `length` frames from the last to the first."""
    if length is None:
        return jnp.flip(x, axis=1)
    frame = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    ends = length[:, None]
    mirrored = jnp.where(frame < ends, ends - 1 - frame, frame)
    return jnp.take_along_axis(x, mirrored[..., None], axis=1, mode="promise_in_bounds")
