"""TTT-Video-DiT (Dalal et al. 2025): a diffusion transformer over a video's scenes with their texts.

Attention is local to a scene; TTT layers read all scenes in both directions.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.mlp import GeluMLP
from ttt_jax.layers.norm import LayerNorm
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.layers.ttt import TTTLayer
from ttt_jax.layers.two_way import NormedAttention, Parts, gated_passes
from ttt_jax.models.video_dit import scenes
from ttt_jax.models.video_dit.config import VideoDiTConfig
from ttt_jax.remat import checkpointed_scan

MODULATION_INIT = nn.initializers.normal(0.02)
MODULATED = ("video", "text")
"""The parts in the order of their vectors in a modulation."""
MAX_PERIOD = 1e4
DIAGNOSTICS = "diagnostics"
"""The collection that TTT layers sow into."""

View = Callable[[tuple[str, ...], Any], Any]
"""(names on the way to them, parameters) -> the same parameters as a layer is to see them."""

Place = Callable[[Parts], Parts]
"""Parts to the same, as they are to lie on a mesh of devices."""


def _dense(config: VideoDiTConfig, features: int, name: str, **options: Any) -> nn.Dense:
    dtype = jnp.dtype(config.dtype)
    return nn.Dense(features, dtype=dtype, param_dtype=at_least_float32(dtype), name=name, **options)


def timestep_embedding(timestep: jax.Array, width: int) -> jax.Array:
    """`[cos(t w_i), sin(t w_i)]` with `w_i = 1e4^(-i / half)`, `i < half = width / 2`: `[B]` to float32 `[B, width]`.

    Float32 in every model, rounded as the published one rounds: at t = 1000 an angle's last bit is 6e-5.
    """
    half = width // 2
    exponents = -np.float32(np.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = jnp.asarray(np.exp(exponents.astype(np.float64)), jnp.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """`Linear(SiLU(Linear(timestep_embedding(t))))`."""

    config: VideoDiTConfig

    @nn.compact
    def __call__(self, timestep: jax.Array) -> jax.Array:
        """`[B]` to `[B, time_embed_dim]`."""
        c = self.config
        x = timestep_embedding(jnp.asarray(timestep), c.model_dim)
        return _dense(c, c.time_embed_dim, "linear2")(nn.silu(_dense(c, c.time_embed_dim, "linear1")(x)))


class AdaptiveNorm(nn.Module):
    """`LN(x) * (1 + scale) + shift`, shift and scale made of the timestep, others for every part (adaLN).

    Attributes:
        config: of the model.
        gated: whether to make gates too.
    """

    config: VideoDiTConfig
    gated: bool = True

    @nn.compact
    def __call__(self, parts: Parts, time: jax.Array) -> tuple[Parts, Parts]:
        """Parts `[B, ..., model_dim]` to such, and gates to multiply such with (none unless `gated`).

        `modulation` makes shift, scale and gate of each part, in the order of `MODULATED`.
        """
        c, kinds = self.config, 2 + self.gated
        modulation = _dense(c, kinds * len(parts) * c.model_dim, "modulation", kernel_init=MODULATION_INIT)
        chunks = jnp.split(modulation(nn.silu(time)), kinds * len(parts), axis=-1)
        norm = LayerNorm(name="norm")
        out, gates = {}, {}
        for i, name in enumerate(name for name in MODULATED if name in parts):
            x = parts[name]
            vectors = [
                chunk.reshape(len(chunk), *(1,) * (x.ndim - 2), chunk.shape[1]) for chunk in chunks[kinds * i :][:kinds]
            ]
            out[name] = norm(x) * (1 + vectors[1]) + vectors[0]
            gates |= {name: vectors[2]} if self.gated else {}
        return out, gates


class Block(nn.Module):
    """`x += gate * TTT(SA(adaLN(x))); x += gate * MLP(adaLN(x))`, TTT in two gated passes."""

    config: VideoDiTConfig
    place: Place | None = None

    @nn.compact
    def __call__(self, parts: Parts, time: jax.Array) -> Parts:
        """Text `[B, scenes, L, model_dim]` and video `[B, frames, h, w, model_dim]`, the timestep's embedding."""
        c = self.config
        seen, gates = AdaptiveNorm(c, name="pre_seq")(parts, time)
        parts = _add(parts, gates, self.mixed(seen))
        seen, gates = AdaptiveNorm(c, name="pre_mlp")(parts, time)
        feed_forward = GeluMLP(4 * c.model_dim, jnp.dtype(c.dtype), name="mlp")
        mlp = self.layer(feed_forward, lambda mlp, parts: {name: mlp(x) for name, x in parts.items()})
        return self.placed(_add(parts, gates, mlp(seen)))

    def mixed(self, parts: Parts) -> Parts:
        """What lets tokens see each other: attention inside scenes, then TTT over all of them."""
        c = self.config
        learn = self.layer(TTTLayer(c.ttt_config, dtype=jnp.dtype(c.dtype), name="ttt"), scenes.read_scenes)
        return gated_passes(self, learn, self.attended(parts), scenes.reverse, c.gating_alpha_init)

    def attended(self, parts: Parts) -> Parts:
        """Attention inside scenes."""
        c = self.config
        rope = RotaryEmbedding(c.theta)

        def attend(q: Parts, k: Parts, v: Parts) -> Parts:
            return scenes.attend_scenes(q, k, v, stride=c.attn_length, shared=c.prefix_temporal_length, rope=rope)

        attention = NormedAttention(c.num_heads, jnp.dtype(c.dtype), name="self_attn")
        return self.layer(attention, lambda attention, parts: attention(parts, attend))(parts)

    def layer(self, module: nn.Module, read: Callable[[Any, Parts], Parts]) -> Callable[[Parts], Parts]:
        """`read` of a module, placed before and after; with `remat_layers` the backward pass computes it again."""

        def run(module: nn.Module, parts: Parts) -> Parts:
            return self.placed(read(module, parts))

        run = nn.remat(run) if self.config.remat_layers else run
        return lambda parts: run(module, self.placed(parts))

    def placed(self, parts: Parts) -> Parts:
        """As they are to lie on a mesh."""
        return parts if self.place is None else self.place(parts)


def _add(parts: Parts, gates: Parts, branch: Parts) -> Parts:
    return {name: x + gates[name] * branch[name] for name, x in parts.items()}


class VideoDiT(nn.Module):
    """The denoising network: noisy latents, the scenes' texts and the timestep to its prediction; see `__call__`.

    Attributes:
        config: what it is.
        view: applied to the parameters where they are used: to those of each block inside of what `config.remat`
            computes again, so that what it returns never lies in memory for all blocks. None when initializing.
        place: applied to what a block's layers are given and return. None: it lies as the compiler decides.
    """

    config: VideoDiTConfig
    view: View | None = None
    place: Place | None = None

    @nn.compact
    def __call__(self, video: jax.Array, text: jax.Array, timestep: jax.Array) -> jax.Array:
        """The network's output for noisy latents.

        Scene i attends to its own text and to the frames `[attn_length * i, attn_length * (i + 1) +
        prefix_temporal_length)`, as far as there are any. TTT reads `frames // scenes` frames after each text, and
        after the first one the remainder too; in the backward pass after the last one.

        Args:
            video: `[B, frames, in_channels, h, w]` floating; h and w are multiples of patch_size.
            text: `[B, scenes, L, text_dim]` floating, a text of L tokens for every scene.
            timestep: `[B]` integer or floating.

        Returns:
            `[B, frames, in_channels, h, w]`, float32 (float64 if the config's dtype is).

        Raises:
            ValueError: shapes that do not fit the config or each other, or frames that no scene sees.
        """
        c = self.config
        c.check_inputs(video, text, timestep)
        dtype = jnp.dtype(c.dtype)
        time = self._viewed(TimeEmbedding, "time_embed")(c)(timestep)
        parts = {
            "text": self._dense(c.model_dim, "text_proj")(text.astype(dtype)),
            "video": self._dense(c.model_dim, "vid_proj")(_patches(video.astype(dtype), c.patch_size)),
        }
        is_scanned = c.remat and not self.is_initializing()
        parts = self._scanned(parts, time) if is_scanned else self._in_turn(parts, time)
        x = LayerNorm(name="transformer_norm")(parts["video"])
        seen, _ = self._viewed(AdaptiveNorm, "final_layer")(c, gated=False)({"video": x}, time)
        x = self._dense(c.in_channels * c.patch_size**2, "final_linear")(seen["video"])
        return _video(x.astype(at_least_float32(dtype)), c.patch_size)

    def _in_turn(self, parts: Parts, time: jax.Array) -> Parts:
        """The blocks one by one, each with parameters of its own, as in a checkpoint."""
        for i in range(self.config.num_layers):
            parts = self._viewed(Block, f"layers_{i}")(self.config, self.place)(parts, time)
        return parts

    def _scanned(self, parts: Parts, time: jax.Array) -> Parts:
        """The same as one loop over their stacked parameters: it is compiled once, and recomputed block by block."""
        c, block = self.config, Block(self.config, self.place, parent=None)
        layers = [self.variables["params"][f"layers_{i}"] for i in range(c.num_layers)]

        kinds = [DIAGNOSTICS] if self.is_mutable_collection(DIAGNOSTICS) else []

        @jax.checkpoint
        def run(parts: Parts, params: Any) -> tuple[Parts, Any]:
            params = params if self.view is None else self.view(("layers_0",), params)
            return block.apply({"params": params}, parts, time, mutable=kinds)

        scan: Any = jax.lax.scan
        if c.remat_group > 1:
            scan = functools.partial(checkpointed_scan, every=c.remat_group)
        parts, sown = scan(run, parts, jax.tree.map(lambda *x: jnp.stack(x), *layers))
        for kind, of_layers in sown.items():
            for i in range(c.num_layers):
                self.put_variable(kind, f"layers_{i}", jax.tree.map(lambda x, i=i: x[i], of_layers))
        return parts

    def _viewed(self, module: Any, name: str) -> Any:
        """A layer of that name which sees its parameters through `view`."""
        view = self.view
        if view is not None:

            def see(variables):
                return {kind: view((name,), tree) for kind, tree in variables.items()}

            module = nn.map_variables(module, "params", see)
        return functools.partial(module, name=name)

    def _dense(self, features: int, name: str) -> nn.Dense:
        dtype = jnp.dtype(self.config.dtype)
        return self._viewed(nn.Dense, name)(features, dtype=dtype, param_dtype=at_least_float32(dtype))


def _patches(video: jax.Array, size: int) -> jax.Array:
    """`[B, F, C, h * size, w * size]` to `[B, F, h, w, C * size * size]`."""
    batch, frames, channels, height, width = video.shape
    x = video.reshape(batch, frames, channels, height // size, size, width // size, size)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(batch, frames, height // size, width // size, channels * size * size)


def _video(patches: jax.Array, size: int) -> jax.Array:
    """The opposite of `_patches`."""
    batch, frames, height, width, features = patches.shape
    channels = features // size**2
    x = patches.reshape(batch, frames, height, width, channels, size, size).transpose(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, frames, channels, height * size, width * size)
