"""Moshi (Defossez et al. 2024): a temporal transformer over frames of text and audio tokens, then a depth transformer.

`Moshi.temporal` and `Moshi.depth` work on already delayed tokens, in chunks of any length; training, evaluation and
streaming all go through them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.attention import AttentionCache, evicted, init_attention_cache, segment_attention, window_attention
from ttt_jax.layers.linear import LORA, linear
from ttt_jax.layers.mlp import KERNEL_INIT, GatedMLP, gated_hidden_size
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.layers.ttt import TTTLayer, init_layer_state
from ttt_jax.models.moshi.conditions import LookupConditioner, sum_of_vectors
from ttt_jax.models.moshi.config import ABSENT, MoshiConfig, check_codes, check_codes_shape, check_tokens_shape
from ttt_jax.models.moshi.delays import delay, delay_mask, undelay
from ttt_jax.models.moshi.depth import (
    EMBEDDING_INIT,
    STACKED_EMBEDDING_INIT,
    STEP_KERNEL_INIT,
    DepthTransformer,
    embed,
)


class MoshiOutput(NamedTuple):
    """Logits aligned with the input codes (no shift is needed); zeros where a frame is not predicted."""

    logits: jax.Array  # [B, dep_q, T, card] float32
    mask: jax.Array  # [B, dep_q, T] bool
    text_logits: jax.Array  # [B, 1, T, text_card] float32
    text_mask: jax.Array  # [B, 1, T] bool


class LayerState(NamedTuple):
    """What one temporal layer carries from call to call; every leaf has leading axis B."""

    attention: AttentionCache
    ttt: Any  # the TTT layer's state, None without TTT


def init_state(config: MoshiConfig, params, batch_size: int) -> tuple[LayerState, ...]:
    """The state of `batch_size` fresh rows, for `Moshi.temporal`; `params` is Moshi's parameter tree.

    Raises:
        ValueError: another tree, or a negative batch size.
    """
    if "layers_0" not in params:
        hint = '; pass variables["params"]' if "params" in params else ""
        raise ValueError(f"params: expected Moshi's parameter tree, got one of {sorted(params)}{hint}.")
    if not isinstance(batch_size, int | np.integer) or batch_size < 0:
        raise ValueError(f"batch_size: expected an int >= 0, got {batch_size!r}.")
    states = []
    for i in range(config.num_layers):
        attention, dtype = config.layer_attention(i), jnp.dtype(config.dtype)
        heads, head_dim = config.num_heads, config.dim // config.num_heads
        cache = init_attention_cache(batch_size, attention.context, heads, head_dim, dtype, sinks=attention.sinks)
        ttt, state = config.layer_ttt(i), None
        if ttt is not None:
            state = init_layer_state(ttt, params[f"layers_{i}"]["ttt"], batch_size, dtype)
        states.append(LayerState(cache, state))
    return tuple(states)


class SelfAttention(nn.Module):
    """Causal attention with rotary positions; `in_proj` columns are q, k, v; no biases."""

    config: MoshiConfig
    layer: int

    @nn.compact
    def __call__(self, x, cache, length, reset):
        """`[B, T, dim]` to the same, the cache, and q, k, v `[B, T, H, D]` before rotation."""
        c = self.config
        in_proj = self.param("in_proj", KERNEL_INIT, (c.dim, 3 * c.dim), jnp.float32)
        out_proj = self.param("out_proj", KERNEL_INIT, (c.dim, c.dim), jnp.float32)
        qkv = linear(self, "in_proj", x, in_proj)
        q, k, v = (part.reshape(*x.shape[:2], c.num_heads, c.dim // c.num_heads) for part in jnp.split(qkv, 3, axis=-1))
        attention = c.layer_attention(self.layer)
        options = {"sinks": attention.sinks, "rope": RotaryEmbedding(c.max_period)}
        options |= {"cache": cache, "length": length, "reset": reset}
        if attention.kind == "window":
            out, cache = window_attention(q, k, v, window=attention.context, **options)
        else:
            out, cache = segment_attention(q, k, v, segment=attention.context, **options)
            assert cache is not None  # only bidirectional segments have none
        return linear(self, "out_proj", out.reshape(x.shape), out_proj), cache, (q, k, v)


class Block(nn.Module):
    """One temporal layer; where TTT goes in, `TTTInsertion` tells."""

    config: MoshiConfig
    layer: int

    @nn.compact
    def __call__(self, x, state: LayerState | None, length, reset) -> tuple[jax.Array, LayerState]:
        """`[B, T, dim]` to the same, and the layer's new state."""
        c, dtype, rows = self.config, jnp.dtype(self.config.dtype), {"length": length, "reset": reset}
        before, ttt_state = (None, None) if state is None else state
        inner_loop = c.layer_ttt(self.layer)
        design, init = (c.ttt.design, c.ttt.init) if c.ttt and inner_loop else (None, None)
        ttt: Any = inner_loop and TTTLayer(
            inner_loop, dtype, zero_init=True, associative_init=init == "associative", name="ttt"
        )
        branch = RMSNorm(name="norm1")(x)
        if design == "before_attention":
            learned, ttt_state = ttt(branch, ttt_state, **rows)
            branch = branch + self._gated(learned)
        branch, cache, (q, k, v) = SelfAttention(c, self.layer, name="self_attn")(branch, before, length, reset)
        if design == "after_attention":
            learned, ttt_state = ttt(RMSNorm(name="norm_ttt")(branch), ttt_state, **rows)
            branch = branch + self._gated(learned)
        if design == "kv_cache":
            left = evicted(before, k, v, c.layer_attention(self.layer).context, reset)
            learned, ttt_state = ttt.remember(q, *left, ttt_state, **rows)
            branch = branch + self._gated(learned)
        x = x + branch
        hidden = gated_hidden_size(c.dim, int(c.hidden_scale * c.dim))
        mlp = GatedMLP(hidden, dtype=dtype, name="gating")
        return x + mlp(RMSNorm(name="norm2")(x)), LayerState(cache, ttt_state)

    def _gated(self, learned):
        """What TTT adds."""
        insertion: Any = self.config.ttt
        gate = self.param("gate", nn.initializers.constant(insertion.gate_init), (self.config.dim,), jnp.float32)
        gate = jnp.tanh(gate)
        if not self.is_initializing():
            self.sow("diagnostics", "gate_size", jnp.mean(jnp.abs(gate)))
        return gate.astype(learned.dtype)[None, None] * learned


View = Callable[[tuple[str, ...], Any], Any]
"""(names on the way to them, parameters) -> the same parameters as a layer is to see them."""


class Moshi(nn.Module):
    """Text and audio language model; see `__call__` for whole sequences, `temporal` and `depth` for chunks.

    Attributes:
        config: what it is.
        view: applied to the parameters where they are used: to those of each layer inside of what `config.remat`
            computes again, so that what it returns never lies in memory for all layers. None when initializing.
    """

    config: MoshiConfig
    view: View | None = None

    def setup(self):
        """Parameters and layers."""
        c = self.config
        self.text_emb = self._own("text_emb", EMBEDDING_INIT, (c.text_card + 1, c.dim))
        self.emb = self._own("emb", STACKED_EMBEDDING_INIT, (c.n_q, c.card + 1, c.dim))
        # Not scanned: layers differ in kind and context, and stay one to one with a checkpoint's tensors.
        self.layers = [self._lifted(Block, f"layers_{i}")(c, i) for i in range(c.num_layers)]
        self.out_norm = RMSNorm()
        self.text_linear = self._own("text_linear", KERNEL_INIT, (c.dim, c.text_card))
        if c.dep_q:
            self.depformer = self._lifted(DepthTransformer, "depformer", ["hidden"], ["step", "logits"])(c)
        if c.extra_heads_num_heads:
            shape = (c.extra_heads_num_heads, c.dim, c.extra_heads_dim)
            self.extra_kernels = self._own("extra_heads", STEP_KERNEL_INIT, shape)
        self.conditioners = {
            x.name: self._lifted(LookupConditioner, f"conditioners_{x.name}")(x, c.dim) for x in c.conditioners
        }

    def _own(self, name: str, init, shape):
        param = self.param(name, init, shape, jnp.float32)
        return param if self.view is None else self.view((name,), param)

    def _lifted(self, module: Any, name: str, recomputed: list[str] | None = None, others: Sequence[str] = ()) -> Any:
        """A layer with `view`, and the methods that are `recomputed` (None: its call) so under `config.remat`."""
        view = self.view
        if view is not None:

            def see(variables):
                return {kind: view((name,), tree) for kind, tree in variables.items()}

            methods = recomputed and [*recomputed, *others]
            module = nn.map_variables(module, ["params", LORA], see, methods=methods)
        return nn.remat(module, methods=recomputed) if self.config.remat else module

    def __call__(self, codes: jax.Array, condition: jax.Array | None = None) -> MoshiOutput:
        """Teacher-forced logits of `codes [B, 1 + n_q, T]` int32 (text, own audio, user audio).

        Delays are applied inside and undone on the logits. -1 gives no embedding and is masked as a target.

        Args:
            codes: text first.
            condition: `[B or 1, dim]` of `condition_vector`; None is no value for any of the model's conditions.

        Raises:
            ValueError: wrong shape or dtype, or (outside jit) values out of range.
        """
        c = self.config
        (check_codes_shape if isinstance(codes, Tracer) else check_codes)(c, codes)
        codes = jnp.asarray(codes)
        frames = codes.shape[2]
        delayed = delay(codes, c.delays, c.initial_tokens)
        z, text_logits, _ = self.temporal(delayed[:, :, :-1], condition=condition)
        logits = self._audio_logits(z, delayed[:, :, 1:], c.delays[1 : 1 + c.dep_q])
        text_logits = undelay(jnp.moveaxis(text_logits, 1, 0), c.delays[:1], axis=2)
        inside = delay_mask(frames, c.delays)
        targets = (codes >= 0) & (codes < jnp.asarray(c.initial_tokens, codes.dtype)[None, :, None]) & inside[None]
        return MoshiOutput(logits, targets[:, 1 : 1 + c.dep_q], jnp.moveaxis(text_logits, 0, 1), targets[:, :1])

    def temporal(self, delayed: jax.Array, state=None, length=None, reset=None, condition: jax.Array | None = None):
        """The temporal transformer on already delayed tokens; a sequence may be split into calls anywhere.

        Args:
            delayed: `[B, 1 + n_q, T]` int32; negative tokens have no embedding.
            state: of the previous call, or of `init_state`; None is a fresh start.
            length: `[B]` int, real positions per row; the rest change nothing and their outputs mean nothing.
            reset: `[B]` bool, rows that start afresh before the first position.
            condition: `[B or 1, dim]` of `condition_vector`, added to every position's input; None is no value for
                any of the model's conditions.

        Returns:
            z `[B, T, dim]` (after `out_norm`), text logits float32 `[B, 1, T, text_card]`, and the new state.

        Raises:
            ValueError: wrong shapes or dtypes, or a state that does not have one entry per layer.
        """
        self._check_temporal(delayed, state, condition)
        wide = at_least_float32(self.config.dtype)
        x = embed(self.text_emb, delayed[:, 0]).astype(wide)
        for k in range(self.config.n_q):  # one gather a stream: on CPU 2 to 9 times faster than one of all streams
            x = x + embed(self.emb[k], delayed[:, k + 1]).astype(wide)
        if condition is None and self.conditioners:
            absent = jnp.full(1, ABSENT, jnp.int32)
            condition = sum_of_vectors(conditioner(absent) for conditioner in self.conditioners.values())
        if condition is not None:
            x = x + condition.astype(x.dtype)[:, None]
        x = x.astype(jnp.dtype(self.config.dtype))
        states = []
        for i, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state[i], length, reset)
            states.append(layer_state)
        z = self.out_norm(x)
        text_logits = linear(self, "text_linear", z, self.text_linear, preferred_element_type=wide)
        return z, text_logits[:, None], tuple(states)

    def depth(self, z: jax.Array, tokens: jax.Array) -> jax.Array:
        """Teacher-forced depth logits, float32 `[B, dep_q, T, card]`.

        Args:
            z: `[B, T, dim]` from `temporal`.
            tokens: `[B, dep_q + 1, T]` int32, what is predicted at each position, text first (the last is not read).

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        self._check_depth(z, tokens)
        return self._audio_logits(z, tokens, None)

    def depth_step(self, z: jax.Array, j: int, token: jax.Array, past):
        """Depth step j of `z [B, dim]` given the token before it `[B]`: logits `[B, card]` and keys for step j + 1."""
        return self.depformer.step(z, j, token, past)

    def extra_heads(self, z: jax.Array) -> jax.Array:
        """Logits of the extra heads, float32 `[B, heads, T, extra_heads_dim]`, of `z [B, T, dim]` from `temporal`.

        Moshi's losses do not train them: what they mean is the user's. Kyutai's speech to text tells by their softmax
        whether the speaker pauses.
        """
        if not self.config.extra_heads_num_heads:
            raise ValueError("extra_heads_num_heads is 0: this Moshi has no extra heads")
        wide = at_least_float32(z.dtype)
        return jnp.einsum("btd,hde->bhte", z, self.extra_kernels.astype(z.dtype), preferred_element_type=wide)

    def _check_temporal(self, delayed, state, condition):
        c = self.config
        streams = f"text, then n_q = {c.n_q} audio streams"
        check_tokens_shape("delayed", delayed, (None, c.num_streams, None), streams)
        if state is not None and not (isinstance(state, tuple | list) and len(state) == c.num_layers):
            got = f"{len(state)} entries" if isinstance(state, tuple | list) else type(state).__name__
            raise ValueError(f"state must hold a LayerState per layer (num_layers = {c.num_layers}), got {got}")
        if condition is None:
            return
        if not c.conditioners:
            raise ValueError("condition must be None: this model has no conditioners")
        rows = sorted({1, delayed.shape[0]})
        if condition.ndim != 2 or condition.shape[0] not in rows or condition.shape[1] != c.dim:
            got = f"{condition.dtype}{list(condition.shape)}"
            raise ValueError(f"condition must be [{rows}, dim = {c.dim}], made by condition_vector, got {got}")

    def _check_depth(self, z, tokens):
        c = self.config
        if getattr(z, "ndim", None) != 3 or z.shape[-1] != c.dim or not jnp.issubdtype(z.dtype, jnp.floating):
            got = f"{z.dtype}{list(z.shape)}" if hasattr(z, "shape") else type(z).__name__
            raise ValueError(f"z must be floating of shape [B, T, dim = {c.dim}], as temporal returns it, got {got}")
        streams = f"text, then dep_q = {c.dep_q} audio streams, for each of z's rows and frames"
        check_tokens_shape("tokens", tokens, (z.shape[0], c.dep_q + 1, z.shape[1]), streams)

    def _audio_logits(self, z, tokens, delays):
        """`[B, dep_q, T, card]` of `z [B, T, dim]` and the tokens predicted; moved back by `delays` if given."""
        c = self.config
        batch, frames = z.shape[:2]
        if not c.dep_q:
            return jnp.zeros((batch, 0, frames, c.card), at_least_float32(z.dtype))
        tokens = jnp.moveaxis(tokens[:, : c.dep_q], 1, 0).reshape(c.dep_q, batch * frames)
        hidden = self.depformer.hidden(z.reshape(batch * frames, c.dim), tokens)
        if delays is not None:
            # Before the last product, which has no bias and maps zeros to zeros: the logits are many times wider.
            hidden = undelay(hidden.reshape(c.dep_q, batch, frames, c.depformer_dim), delays, axis=2).reshape(
                hidden.shape
            )
        logits = self.depformer.logits(hidden).reshape(c.dep_q, batch, frames, c.card)
        return jnp.moveaxis(logits, 0, 1)
