"""Moshi (Defossez et al. 2024): a temporal transformer over frames of text and audio tokens, then a depth transformer.

`Moshi.temporal` and `Moshi.depth` work on already delayed tokens, in chunks of any length; training, evaluation and
streaming all go through them.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.attention import AttentionCache, init_attention_cache, segment_attention, window_attention
from ttt_jax.layers.mlp import KERNEL_INIT, GatedMLP, gated_hidden_size
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.layers.ttt import TTTConfig, TTTLayer, init_layer_state
from ttt_jax.models.moshi.config import MoshiConfig, check_codes, check_codes_shape, check_tokens_shape
from ttt_jax.models.moshi.delays import delay, delay_mask, undelay
from ttt_jax.models.moshi.depth import EMBEDDING_INIT, STACKED_EMBEDDING_INIT, DepthTransformer, embed


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


def ttt_config(config: MoshiConfig) -> TTTConfig:
    """The TTT layers' config that `config.ttt` asks for."""
    ttt = config.ttt
    if ttt is None:
        raise ValueError("config.ttt is None: this Moshi has no TTT layers")
    return TTTConfig.ttt_lm(
        ttt.kind,
        config.dim,
        ttt.num_heads or config.num_heads,
        backbone=ttt.backbone,
        mini_batch_size=ttt.mini_batch_size,
        base_lr=ttt.base_lr,
    )


def init_state(config: MoshiConfig, params, batch_size: int) -> tuple[LayerState, ...]:
    """The state of `batch_size` fresh rows, for `Moshi.temporal`; `params` is Moshi's parameter tree."""
    states = []
    for i in range(config.num_layers):
        attention, dtype = config.layer_attention(i), jnp.dtype(config.dtype)
        heads, head_dim = config.num_heads, config.dim // config.num_heads
        cache = init_attention_cache(batch_size, attention.context, heads, head_dim, dtype, sinks=attention.sinks)
        ttt = None
        if config.has_ttt(i):
            ttt = init_layer_state(ttt_config(config), params[f"layers_{i}"]["ttt"], batch_size, dtype)
        states.append(LayerState(cache, ttt))
    return tuple(states)


class SelfAttention(nn.Module):
    """Causal attention with rotary positions; `in_proj` columns are q, k, v; no biases."""

    config: MoshiConfig
    layer: int

    @nn.compact
    def __call__(self, x, cache, length, reset):
        """`[B, T, dim]` to the same, and the cache."""
        c = self.config
        in_proj = self.param("in_proj", KERNEL_INIT, (c.dim, 3 * c.dim), jnp.float32).astype(x.dtype)
        out_proj = self.param("out_proj", KERNEL_INIT, (c.dim, c.dim), jnp.float32).astype(x.dtype)
        qkv = jnp.einsum("btd,de->bte", x, in_proj)
        q, k, v = (part.reshape(*x.shape[:2], c.num_heads, c.dim // c.num_heads) for part in jnp.split(qkv, 3, axis=-1))
        attention = c.layer_attention(self.layer)
        options = {"sinks": attention.sinks, "rope": RotaryEmbedding(c.max_period)}
        options |= {"cache": cache, "length": length, "reset": reset}
        if attention.kind == "window":
            out, cache = window_attention(q, k, v, window=attention.context, **options)
        else:
            out, cache = segment_attention(q, k, v, segment=attention.context, **options)
            assert cache is not None  # only bidirectional segments have none
        return jnp.einsum("btd,de->bte", out.reshape(x.shape), out_proj), cache


class Block(nn.Module):
    """One temporal layer; with TTT, the branch is `h = SA(RMS(x)); h + tanh(gate) * TTT(RMS(h))`."""

    config: MoshiConfig
    layer: int

    @nn.compact
    def __call__(self, x, state: LayerState | None, length, reset) -> tuple[jax.Array, LayerState]:
        """`[B, T, dim]` to the same, and the layer's new state."""
        c = self.config
        cache, ttt_state = (None, None) if state is None else state
        branch, cache = SelfAttention(c, self.layer, name="self_attn")(RMSNorm(name="norm1")(x), cache, length, reset)
        if c.ttt is not None and c.has_ttt(self.layer):
            learned, ttt_state = TTTLayer(ttt_config(c), dtype=jnp.dtype(c.dtype), zero_init=True, name="ttt")(
                RMSNorm(name="norm_ttt")(branch), ttt_state, length=length, reset=reset
            )
            branch = branch + self._gate(c.ttt.gate_init).astype(x.dtype)[None, None] * learned
        x = x + branch
        hidden = gated_hidden_size(c.dim, int(c.hidden_scale * c.dim))
        mlp = GatedMLP(hidden, dtype=jnp.dtype(c.dtype), name="gating")
        return x + mlp(RMSNorm(name="norm2")(x)), LayerState(cache, ttt_state)

    def _gate(self, init: float):
        gate = self.param("gate", nn.initializers.constant(init), (self.config.dim,), jnp.float32)
        gate = jnp.tanh(gate)
        if not self.is_initializing():
            self.sow("diagnostics", "gate_size", jnp.mean(jnp.abs(gate)))
        return gate


class Moshi(nn.Module):
    """Text and audio language model; see `__call__` for whole sequences, `temporal` and `depth` for chunks."""

    config: MoshiConfig

    def setup(self):
        """Parameters and layers."""
        c = self.config
        block = nn.remat(Block) if c.remat else Block
        depth = nn.remat(DepthTransformer, methods=["hidden"]) if c.remat else DepthTransformer
        self.text_emb = self.param("text_emb", EMBEDDING_INIT, (c.text_card + 1, c.dim), jnp.float32)
        self.emb = self.param("emb", STACKED_EMBEDDING_INIT, (c.n_q, c.card + 1, c.dim), jnp.float32)
        # Not scanned: layers differ in kind and context, and stay one to one with a checkpoint's tensors.
        self.layers = [block(c, i) for i in range(c.num_layers)]
        self.out_norm = RMSNorm()
        self.text_linear = self.param("text_linear", KERNEL_INIT, (c.dim, c.text_card), jnp.float32)
        self.depformer = depth(c)

    def __call__(self, codes: jax.Array) -> MoshiOutput:
        """Teacher-forced logits of `codes [B, 1 + n_q, T]` int32 (text, own audio, user audio).

        Delays are applied inside and undone on the logits. -1 gives no embedding and is masked as a target.

        Raises:
            ValueError: wrong shape or dtype, or (outside jit) values out of range.
        """
        c = self.config
        (check_codes_shape if isinstance(codes, Tracer) else check_codes)(c, codes)
        codes = jnp.asarray(codes)
        batch, _, frames = codes.shape
        delayed = delay(codes, c.delays, c.initial_tokens)
        z, text_logits, _ = self.temporal(delayed[:, :, :-1])
        hidden = self._depth_hidden(z, delayed[:, : c.dep_q, 1:]).reshape(c.dep_q, batch, frames, c.depformer_dim)
        # Undone before the last product, which has no bias and maps zeros to zeros: the logits are many times wider.
        hidden = undelay(hidden, c.delays[1 : 1 + c.dep_q], axis=2)
        hidden = hidden.reshape(c.dep_q, batch * frames, c.depformer_dim)
        logits = self._by_row(self.depformer.logits(hidden), batch, frames)
        text_logits = undelay(jnp.moveaxis(text_logits, 1, 0), c.delays[:1], axis=2)
        inside = delay_mask(frames, c.delays)
        targets = (codes >= 0) & (codes < jnp.asarray(c.initial_tokens, codes.dtype)[None, :, None]) & inside[None]
        return MoshiOutput(logits, targets[:, 1 : 1 + c.dep_q], jnp.moveaxis(text_logits, 0, 1), targets[:, :1])

    def temporal(self, delayed: jax.Array, state=None, length=None, reset=None):
        """The temporal transformer on already delayed tokens; a sequence may be split into calls anywhere.

        Args:
            delayed: `[B, 1 + n_q, T]` int32; negative tokens have no embedding.
            state: of the previous call, or of `init_state`; None is a fresh start.
            length: `[B]` int, real positions per row; the rest change nothing and their outputs mean nothing.
            reset: `[B]` bool, rows that start afresh before the first position.

        Returns:
            z `[B, T, dim]` (after `out_norm`), text logits float32 `[B, 1, T, text_card]`, and the new state.

        Raises:
            ValueError: wrong shapes or dtypes, or a state that does not have one entry per layer.
        """
        self._check_temporal(delayed, state)
        x = embed(self.text_emb, delayed[:, 0])
        for k in range(self.config.n_q):  # one gather a stream: on CPU 2 to 9 times faster than one of all streams
            x = x + embed(self.emb[k], delayed[:, k + 1])
        x = x.astype(jnp.dtype(self.config.dtype))
        states = []
        for i, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state[i], length, reset)
            states.append(layer_state)
        z = self.out_norm(x)
        wide = at_least_float32(z.dtype)
        text_logits = jnp.einsum("btd,dv->btv", z, self.text_linear.astype(z.dtype), preferred_element_type=wide)
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
        hidden = self._depth_hidden(z, tokens[:, : self.config.dep_q])
        return self._by_row(self.depformer.logits(hidden), *z.shape[:2])

    def depth_step(self, z: jax.Array, j: int, token: jax.Array, past):
        """Depth step j of `z [B, dim]` given the token before it `[B]`: logits `[B, card]` and keys for step j + 1."""
        return self.depformer.step(z, j, token, past)

    def _check_temporal(self, delayed, state):
        c = self.config
        streams = f"text, then n_q = {c.n_q} audio streams"
        check_tokens_shape("delayed", delayed, (None, c.num_streams, None), streams)
        if state is not None and not (isinstance(state, tuple | list) and len(state) == c.num_layers):
            got = f"{len(state)} entries" if isinstance(state, tuple | list) else type(state).__name__
            raise ValueError(f"state must hold a LayerState per layer (num_layers = {c.num_layers}), got {got}")

    def _check_depth(self, z, tokens):
        c = self.config
        if getattr(z, "ndim", None) != 3 or z.shape[-1] != c.dim or not jnp.issubdtype(z.dtype, jnp.floating):
            got = f"{z.dtype}{list(z.shape)}" if hasattr(z, "shape") else type(z).__name__
            raise ValueError(f"z must be floating of shape [B, T, dim = {c.dim}], as temporal returns it, got {got}")
        streams = f"text, then dep_q = {c.dep_q} audio streams, for each of z's rows and frames"
        check_tokens_shape("tokens", tokens, (z.shape[0], c.dep_q + 1, z.shape[1]), streams)

    def _depth_hidden(self, z, tokens):
        """Step-major `[dep_q, B * T, depformer_dim]`, from `z [B, T, dim]` and the tokens read `[B, dep_q, T]`."""
        positions = z.shape[0] * z.shape[1]
        tokens = jnp.moveaxis(tokens, 1, 0).reshape(tokens.shape[1], positions)
        return self.depformer.hidden(z.reshape(positions, z.shape[-1]), tokens)

    def _by_row(self, logits, batch: int, frames: int):
        """`[S, B * T, card]` to `[B, S, T, card]`."""
        return jnp.moveaxis(logits.reshape(logits.shape[0], batch, frames, logits.shape[-1]), 0, 1)
