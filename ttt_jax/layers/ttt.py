"""The TTT layer: projections around the TTT operation, in the two published forms.

`TTTConfig.ttt_lm` is the layer of Sun et al. 2024 (causal, learned token scale, RoPE by position in the mini-batch),
`TTTConfig.video_dit` that of Dalal et al. 2025 (bidirectional, L2-normalised Q and K, reconstruction target in
LayerNorm's form). They differ in many small ways; `TTTConfig` names each.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.conv import causal_conv
from ttt_jax.layers.rope import RotaryEmbedding, rotate, rotate_3d
from ttt_jax.rows import checked_rows, real_tokens, zero_where_not
from ttt_jax.ttt import TTTLinearParams, TTTMLPParams, TTTState, init_state, ttt_linear, ttt_loss, ttt_mlp

Kind = Literal["linear", "mlp"]
PUBLISHED_BASE_LR = {"linear": 1.0, "mlp": 0.1}
INIT = nn.initializers.normal(0.02)
SATURATED = 0.05  # a step-size gate within this of 0 or 1 counts as saturated


@dataclasses.dataclass(frozen=True)
class TTTConfig:
    """What one TTT layer computes; make it with `ttt_lm` or `video_dit`.

    Attributes:
      kind: inner model, "linear" or "mlp".
      width: features of the layer's input and output.
      num_heads: each with its own inner model of `width / num_heads` features.
      mini_batch_size: C, tokens per step of the inner loop.
      base_lr: largest step size, before division by the head dim.
      rope_theta: of the rotary embedding.
      causal: whether a token reads only earlier tokens of its mini-batch, and itself.
      positions: rotate by the position "in_mini_batch" (modulo C) or "in_sequence".
      shared_qk: Q and K are one projection behind two causal convolutions, and the output is gated (Mamba's backbone).
      conv_width: tokens that those convolutions see.
      bias: whether wq, wk, wv, wo have biases.
      normalize_qk: L2-normalise Q and K per head.
      layer_norm_target: reconstruct the normalised `V - K` instead of `V - K`.
      learned_token_scale: `max(0, 1/(i+1) + delta_i)` instead of 1/C.
      eps: of the inner LayerNorm.
      liftable_token_scale: whether a gradient lifts a token scale that is 0. As published none does: what training once
        pushed to 0 stays there, and with the last one the layer keeps nothing beyond a mini-batch.
    """

    kind: Kind
    width: int
    num_heads: int
    mini_batch_size: int
    base_lr: float
    rope_theta: float
    causal: bool
    positions: Literal["in_mini_batch", "in_sequence"]
    shared_qk: bool
    conv_width: int
    bias: bool
    normalize_qk: bool
    layer_norm_target: bool
    learned_token_scale: bool
    eps: float
    liftable_token_scale: bool = False

    def __post_init__(self):
        if self.kind not in PUBLISHED_BASE_LR:
            raise ValueError(f"kind: expected 'linear' or 'mlp', got {self.kind!r}.")
        for name in ("width", "num_heads", "mini_batch_size", "conv_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}.")
        if self.width % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"num_heads: expected heads of an even size (rotary pairs), got width {self.width} in "
                f"{self.num_heads} heads."
            )
        for name in ("base_lr", "rope_theta", "eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.number) or not value > 0:
                raise ValueError(f"{name}: expected a number > 0, got {value!r}.")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.num_heads

    def past_shape(self, batch_size: int) -> tuple[int, int, int] | None:
        """Of the inputs that the convolutions look back on; None without convolutions."""
        return (batch_size, self.conv_width - 1, self.width) if self.shared_qk else None

    @classmethod
    def ttt_lm(
        cls,
        kind: Kind,
        width: int,
        num_heads: int,
        *,
        backbone: Literal["mamba", "base"] = "mamba",
        mini_batch_size: int = 16,
        base_lr: float | None = None,
        rope_theta: float = 1e4,
        conv_width: int = 4,
        liftable_token_scale: bool = False,
    ) -> "TTTConfig":
        """The layer of TTT-LM; base_lr None is the published 1.0 (linear) or 0.1 (mlp)."""
        if backbone not in ("mamba", "base"):
            raise ValueError(f"backbone: expected 'mamba' or 'base', got {backbone!r}.")
        return cls(
            kind=kind,
            width=width,
            num_heads=num_heads,
            mini_batch_size=mini_batch_size,
            base_lr=PUBLISHED_BASE_LR.get(kind, 1.0) if base_lr is None else base_lr,
            rope_theta=rope_theta,
            causal=True,
            positions="in_mini_batch",
            shared_qk=backbone == "mamba",
            conv_width=conv_width,
            bias=False,
            normalize_qk=False,
            layer_norm_target=False,
            learned_token_scale=True,
            eps=1e-6,
            liftable_token_scale=liftable_token_scale,
        )

    @classmethod
    def video_dit(
        cls,
        kind: Kind,
        width: int,
        num_heads: int,
        *,
        mini_batch_size: int | None = None,
        base_lr: float | None = None,
        rope_theta: float = 1e4,
        causal: bool = False,
    ) -> "TTTConfig":
        """The layer of TTT-Video-DiT; None is the published value: C 16 and 1.0 (linear), C 64 and 0.1 (mlp)."""
        return cls(
            kind=kind,
            width=width,
            num_heads=num_heads,
            mini_batch_size={"linear": 16, "mlp": 64}.get(kind, 16) if mini_batch_size is None else mini_batch_size,
            base_lr=PUBLISHED_BASE_LR.get(kind, 1.0) if base_lr is None else base_lr,
            rope_theta=rope_theta,
            causal=causal,
            positions="in_sequence",
            shared_qk=False,
            conv_width=1,
            bias=True,
            normalize_qk=True,
            layer_norm_target=True,
            learned_token_scale=False,
            eps=1e-8,
        )


class TTTLayerState(NamedTuple):
    """What a layer carries between calls; every leaf leads with B and is float32 (float64) or int32."""

    ttt: TTTState
    conv_inputs: jax.Array | None  # [B, conv_width - 1, width], the convolutions' last real inputs; None without them
    position: jax.Array  # [B] int32, real tokens since the row's start


class TTTLayer(nn.Module):
    """Owns the projections and initial fast weights and calls the TTT operation.

    Attributes:
      config: see `TTTConfig`.
      dtype: of activations; the state and the inner loop are float32 (float64 if this is float64).
      zero_init: start with wo = 0, so that the layer's output is zero until it has been trained.
      associative_init: start as an associative memory: q, k and v are as large as the input, and a token's query finds
        what was learned from tokens like it, since both convolutions begin as little more than the current token. In
        the published form (False) q and k of one token have nothing to do with each other, which training has to mend
        first, and q, k and v have the input's size at width 2500 alone (weights N(0, 0.02^2)).
    """

    config: TTTConfig
    dtype: Any = jnp.float32
    zero_init: bool = False
    associative_init: bool = False

    def setup(self):
        """Parameters, by the names of the published layers' parts."""
        c = self.config
        param_dtype = at_least_float32(self.dtype)

        def dense(features=c.width, bias=c.bias, dtype=self.dtype, init=INIT):
            return nn.Dense(features, use_bias=bias, dtype=dtype, param_dtype=param_dtype, kernel_init=init)

        projection: Any = nn.initializers.lecun_normal() if self.associative_init else INIT
        self.wq, self.wv = dense(init=projection), dense(init=projection)
        if c.shared_qk:
            self.conv_q, self.conv_k = (_Conv(c, param_dtype, self.associative_init) for _ in range(2))
            self.wg = dense()
        else:
            self.wk = dense(init=projection)
        self.wo = dense(init=nn.initializers.zeros if self.zero_init else INIT)
        self.step_size = dense(c.num_heads, bias=True, dtype=param_dtype)
        self.post_norm = nn.LayerNorm(
            epsilon=1e-6, param_dtype=param_dtype, use_fast_variance=False, force_float32_reductions=False
        )
        if c.learned_token_scale:
            self.token_scale_offset = self.param(
                "token_scale_offset", nn.initializers.zeros, (c.mini_batch_size,), param_dtype
            )
        self.inner = _InnerParams(c, param_dtype)

    def __call__(
        self,
        x: jax.Array,
        state: TTTLayerState | None = None,
        *,
        length: jax.Array | None = None,
        reset: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, TTTLayerState]:
        """Read a stretch of the sequence; causal layers may be cut anywhere.

        Args:
          x: [B, T, width] float.
          state: what the previous call returned; None starts every row afresh.
          length: [B] int, real tokens of each row; the others return zeros, change nothing, and never matter.
          reset: [B] bool, rows that start afresh before their first token.
          positions: [B or 1, T] int, for layers that rotate by position in the sequence; default 0, 1, ... from the
            row's start. [B or 1, T, 3] are (frame, row, column) of a video, as `rotate_3d` takes them.

        Returns:
          [B, T, width] in `dtype`, and the state after the last real token.

        Raises:
          ValueError: wrong shapes or dtypes, or positions for a layer that counts its own.
        """
        c = self.config
        positions = None if positions is None else jnp.asarray(positions)
        state, length, reset, is_real = self._check(x, state, length, reset)
        self._check_positions(x, positions)
        x = zero_where_not(is_real, x).astype(self.dtype)
        q, k, v, conv_inputs = self._projections(x, state, length)
        q, k = self._place(q, k, state, positions)
        params = self.inner()
        if c.layer_norm_target:
            v = _layer_norm_target(params, k, v, self.dtype)
        gate = jax.nn.sigmoid(self.step_size(x))
        out, ttt_state = self._operate(params, q, k, v, gate, is_real, state, length, reset)
        y = self._output(x, out, is_real)
        if conv_inputs is not None:
            conv_inputs = conv_inputs.astype(at_least_float32(self.dtype))
        return y, TTTLayerState(ttt_state, conv_inputs, self._next_position(x, state, length))

    def remember(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        leaves: jax.Array,
        state: TTTLayerState | None = None,
        *,
        length: jax.Array | None = None,
        reset: jax.Array | None = None,
    ) -> tuple[jax.Array, TTTLayerState]:
        """Learn pairs of an attention's keys and values that have left its window, and read what its queries ask for.

        It has no projections of its own but the last; a pair's step size is told by its key. Queries and keys are
        un-rotated and brought to a length of sqrt(D). The config must be `TTTConfig.ttt_lm` with the backbone "base".

        Args:
          q: [B, T, H, D] float, the attention's queries.
          k: [B, T, H, D], the key that leaves as each query's token comes; v alike.
          v: the values.
          leaves: [B, T] bool, whether one does; where not, nothing is learned.
          state: as in a call.
          length: as in a call.
          reset: as in a call.

        Returns:
          [B, T, width] in `dtype`, and the state after the last real token.

        Raises:
          ValueError: wrong shapes or dtypes, or another config.
        """
        c = self.config
        if c.shared_qk or c.layer_norm_target or not c.causal:
            raise ValueError("config: expected ttt_lm's with backbone='base', which adds nothing to q, k and v.")
        if q.ndim != 4 or q.shape[2:] != (c.num_heads, c.head_dim):
            raise ValueError(f"q: expected shape [B, T, H, D] with H, D = {c.num_heads}, {c.head_dim}, got {q.shape}.")
        state, length, reset, is_real = self._check(_joined_heads(q), state, length, reset)
        for name, x, shape in (("k", k, q.shape), ("v", v, q.shape), ("leaves", leaves, q.shape[:2])):
            if x.shape != shape:
                raise ValueError(f"{name}: expected shape {shape} like q's, got {x.shape}.")
        q, k, v = (zero_where_not(is_real, x).astype(self.dtype) for x in (q, k, v))
        gate = jax.nn.sigmoid(self.step_size(_joined_heads(k)))
        q, k = (_unit_length(x) * math.sqrt(c.head_dim) for x in (q, k))
        learned = leaves if is_real is None else leaves & is_real
        out, ttt_state = self._operate(self.inner(), q, k, v, gate, learned, state, length, reset)
        y = self._output(_joined_heads(q), out, is_real)
        return y, TTTLayerState(ttt_state, None, self._next_position(q, state, length))

    def init_state(self, batch_size: int) -> TTTLayerState:
        """The state of `batch_size` rows that have read nothing; needs the parameters, so call it through `apply`."""
        c = self.config
        past = c.past_shape(batch_size)
        conv_inputs = None if past is None else jnp.zeros(past, at_least_float32(self.dtype))
        return TTTLayerState(init_state(self.inner(), batch_size), conv_inputs, jnp.zeros(batch_size, jnp.int32))

    def _check(self, x, state, length, reset):
        """Checks them; the state without what reset rows carry, length in [0, T], and real tokens [B, T] or None."""
        c = self.config
        if not isinstance(x, jax.Array | np.ndarray):
            raise ValueError(f"x: expected an array, got {type(x).__name__}. Make it one with jnp.asarray.")
        if x.ndim != 3 or x.shape[-1] != c.width:
            raise ValueError(f"x: expected shape [B, T, width = {c.width}], got {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x: expected a float dtype, got {x.dtype}.")
        if state is not None:
            if not isinstance(state, TTTLayerState):
                raise ValueError(f"state: expected the TTTLayerState of an earlier call, got {type(state).__name__}.")
            for name, leaf, shape in (
                ("conv_inputs", state.conv_inputs, c.past_shape(x.shape[0])),
                ("position", state.position, x.shape[:1]),
            ):
                got = None if leaf is None else leaf.shape
                if got != shape:
                    raise ValueError(
                        f"state.{name}: expected shape {shape}, got {got}. Does it belong to another batch size or "
                        "another layer's config?"
                    )
        length, reset = checked_rows(length, reset, *x.shape[:2])
        if state is not None and reset is not None:
            state = _forget(state, reset)
        return state, length, reset, real_tokens(length, x.shape[1])

    def _check_positions(self, x, positions):
        if positions is not None and self.config.positions == "in_mini_batch":
            raise ValueError(
                "positions: expected None, since this layer rotates by its own count within the mini-batch."
            )
        if positions is not None:
            rows, *rest = positions.shape or (0,)
            if rows not in (1, x.shape[0]) or rest not in ([x.shape[1]], [x.shape[1], 3]):
                expected = f"[B or 1, T] or [B or 1, T, 3] with [B, T] = {x.shape[:2]}"
                raise ValueError(f"positions: expected shape {expected}, got {positions.shape}.")

    def _projections(self, x, state, length):
        """q, k, v [B, T, H, D] before rotation, and the convolutions' next past."""
        c = self.config
        heads = (*x.shape[:2], c.num_heads, c.head_dim)
        q = self.wq(x)
        if c.shared_qk:
            past = None if state is None else state.conv_inputs
            k, conv_inputs = self.conv_k(q, past, length)
            q, _ = self.conv_q(q, past, length)
        else:
            k, conv_inputs = self.wk(x), None
        q, k, v = (part.reshape(heads) for part in (q, k, self.wv(x)))
        if c.normalize_qk:
            q, k = _unit_length(q), _unit_length(k)
        return q, k, v, conv_inputs

    def _place(self, q, k, state, positions):
        """Rotate q and k to their positions."""
        c = self.config
        if positions is None:
            positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
            if state is not None:
                start = state.ttt.count if c.positions == "in_mini_batch" else state.position
                positions = positions + start[:, None]
            if c.positions == "in_mini_batch":
                positions = positions % c.mini_batch_size
            positions = jnp.broadcast_to(positions, q.shape[:2])
        rope, turn = RotaryEmbedding(c.rope_theta), rotate if positions.ndim == 2 else rotate_3d
        return turn(rope, q, positions), turn(rope, k, positions)

    def _options(self, state, length, reset):
        c = self.config
        token_scale = None
        if c.learned_token_scale:
            steps = jnp.arange(1, c.mini_batch_size + 1, dtype=self.token_scale_offset.dtype)
            token_scale = 1 / steps + self.token_scale_offset
            token_scale = _not_negative(token_scale) if c.liftable_token_scale else jnp.maximum(token_scale, 0)
        return {
            "mini_batch_size": c.mini_batch_size,
            "causal": c.causal,
            "token_scale": token_scale,
            "state": None if state is None else state.ttt,
            "length": length,
            "reset": reset,
            "eps": c.eps,
        }

    def _operate(self, params, q, k, v, gate, is_learned, state, length, reset):
        """[B, T, H, D] of the inner loop and its state; tokens that are not learned ([B, T] bool) have step size 0."""
        c = self.config
        options = self._options(state, length, reset)
        tokens = (q, k, v, zero_where_not(is_learned, gate) * (c.base_lr / c.head_dim))
        operation: Any = ttt_linear if c.kind == "linear" else ttt_mlp
        out, ttt_state = operation(params, *tokens, **options)
        self._diagnose(params, tokens, options, gate, is_learned, ttt_state)
        return out, ttt_state

    def _output(self, x, out, is_real):
        y = self.post_norm(out.reshape(x.shape).astype(at_least_float32(self.dtype))).astype(self.dtype)
        if self.config.shared_qk:
            y = y * jax.nn.gelu(self.wg(x), approximate=True)
        return zero_where_not(is_real, self.wo(y))

    def _next_position(self, x, state, length):
        read = jnp.full(x.shape[0], x.shape[1], jnp.int32) if length is None else length
        return read if state is None else state.position + read

    def _diagnose(self, params, tokens, options, gate, is_learned, state):
        """Sow scalars when the caller asks for the collection "diagnostics"; otherwise compute nothing.

        Step sizes are means over learned tokens, losses over real ones, the drift over rows. The last token scale, 1/C
        at first, is the share of a mini-batch's gradient that stays in the weights: at 0 nothing outlives a mini-batch.
        """
        if not self.is_mutable_collection("diagnostics") or self.is_initializing():
            return
        saturated = (gate < SATURATED) | (gate > 1 - SATURATED)
        is_learned = jnp.ones((1, 1), bool) if is_learned is None else is_learned
        self.sow("diagnostics", "step_size_saturation", _mean(saturated.astype(gate.dtype), is_learned[..., None]))
        self.sow("diagnostics", "fast_weight_drift", _drift(params, state))
        if options["token_scale"] is not None:
            self.sow("diagnostics", "last_token_scale", options["token_scale"][-1])
        losses = ttt_loss(params, *tokens, **options)
        tokens_read = _tokens_of_mini_batches(self.config.mini_batch_size, gate, losses.before.shape[2], options)
        for name, loss in losses._asdict().items():
            self.sow("diagnostics", f"inner_loss_{name}", _mean(loss, tokens_read))


class _Conv(nn.Module):
    """Kernel [conv_width, 1, width], the current token's weights last, and bias of a causal depth-wise convolution."""

    config: TTTConfig
    param_dtype: Any
    begins_as_current_token: bool

    @nn.compact
    def __call__(self, x, past, length):
        c = self.config
        shape = (c.conv_width, 1, c.width)
        init: Any = _mostly_current_token if self.begins_as_current_token else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c.width,), self.param_dtype)
        return causal_conv(x, kernel, bias, past, length)


def _mostly_current_token(key, shape, dtype):
    """The identity, and a fifth of the published kernel."""
    return (0.2 * nn.initializers.lecun_normal()(key, shape, dtype)).at[-1].add(1)


class _InnerParams(nn.Module):
    """Initial fast weights and inner LayerNorm: N(0, 0.02^2) weights, biases 0, scale 1."""

    config: TTTConfig
    param_dtype: Any

    @nn.compact
    def __call__(self) -> TTTLinearParams | TTTMLPParams:
        c = self.config
        hidden = 4 * c.head_dim

        def leaf(name, *shape, init=nn.initializers.zeros):
            return self.param(name, init, (c.num_heads, *shape), self.param_dtype)

        d = c.head_dim
        ln = {"ln_scale": leaf("ln_scale", d, init=nn.initializers.ones), "ln_bias": leaf("ln_bias", d)}
        if c.kind == "linear":
            return TTTLinearParams(w1=leaf("w1", d, d, init=INIT), b1=leaf("b1", d), **ln)
        w1, w2 = leaf("w1", d, hidden, init=INIT), leaf("w2", hidden, d, init=INIT)
        return TTTMLPParams(w1=w1, b1=leaf("b1", hidden), w2=w2, b2=leaf("b2", d), **ln)


def init_layer_state(config: TTTConfig, params, batch_size: int, dtype=jnp.float32) -> TTTLayerState:
    """The state of `batch_size` fresh rows of `TTTLayer(config, dtype)` with these parameters."""
    state: Any = TTTLayer(config, dtype).apply({"params": params}, batch_size, method="init_state")
    return state


def _forget(state: TTTLayerState, rows) -> TTTLayerState:
    """Clear what the layer itself carries for these rows; the operation resets its own part."""

    def clear(x):
        return jnp.where(rows.reshape(rows.shape + (1,) * (x.ndim - 1)), jnp.zeros((), x.dtype), x)

    return TTTLayerState(
        state.ttt._replace(count=clear(state.ttt.count)), jax.tree.map(clear, state.conv_inputs), clear(state.position)
    )


@jax.custom_vjp
def _not_negative(x: jax.Array) -> jax.Array:
    """`max(0, x)` whose gradient at and below 0 is 0 only where descent would go further down."""
    return jnp.maximum(x, 0)


def _not_negative_forward(x):
    return jnp.maximum(x, 0), x > 0


def _not_negative_backward(is_positive, gradient):
    return (jnp.where(is_positive | (gradient < 0), gradient, 0),)


_not_negative.defvjp(_not_negative_forward, _not_negative_backward)


def _joined_heads(x: jax.Array) -> jax.Array:
    """[B, T, H, D] to [B, T, H * D]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def _unit_length(x: jax.Array) -> jax.Array:
    """`x / max(|x|, 1e-12)` over the last axis, with a gradient of zero at zero."""
    wide = x.astype(at_least_float32(x.dtype))
    squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(x.dtype)


def _layer_norm_target(params, k, v, dtype):
    """What replaces V: `K + scale * (V - K - mean) / (std + 1e-8) + bias`, with the unbiased standard deviation."""
    wide = at_least_float32(dtype)
    k, difference = k.astype(wide), v.astype(wide) - k.astype(wide)
    centered = difference - jnp.mean(difference, axis=-1, keepdims=True)
    variance = jnp.sum(jnp.square(centered), axis=-1, keepdims=True) / (k.shape[-1] - 1)
    std = jnp.sqrt(jnp.maximum(variance, jnp.finfo(wide).tiny))  # a finite gradient where V - K is constant
    scale, bias = params.ln_scale[None, None], params.ln_bias[None, None]
    return (k + scale * centered / (std + 1e-8) + bias).astype(dtype)


def _drift(params, state: TTTState) -> jax.Array:
    """Distance of the fast weights from their initial value over that value's size, averaged over rows."""

    def squares(weights):
        return sum(jnp.sum(jnp.square(w), axis=tuple(range(1, w.ndim))) for w in weights)

    initial = tuple(w[None] for w in params.fast_weights)
    moved = squares(tuple(w - i for w, i in zip(state.weights, initial, strict=True)))
    return jnp.mean(jnp.sqrt(moved / squares(initial)))


def _tokens_of_mini_batches(size: int, gate: jax.Array, count: int, options) -> jax.Array:
    """How many of a call's real tokens each of the `count` mini-batches of `ttt_loss` has, [B, 1, N] int32."""
    state, length = options["state"], options["length"]
    first = jnp.zeros(gate.shape[0], jnp.int32) if state is None else state.count
    behind = first + (gate.shape[1] if length is None else length)
    begins = size * jnp.arange(count, dtype=jnp.int32)[None]
    read = jnp.minimum(begins + size, behind[:, None]) - jnp.maximum(begins, first[:, None])
    return jnp.maximum(read, 0)[:, None]


def _mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean; 0 where all weights are."""
    weights = jnp.broadcast_to(weights.astype(x.dtype), x.shape)
    return jnp.sum(x * weights) / jnp.maximum(jnp.sum(weights), 1)
