"""A transformer that says what was in the masked frames of a recording, from all that lies before and behind them.

Attention sees a segment of the recording; TTT layers read the whole of it forwards and backwards (Dalal et al. 2025).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.mlp import GeluMLP
from ttt_jax.layers.norm import LayerNorm
from ttt_jax.layers.rope import RotaryEmbedding
from ttt_jax.layers.two_way import NormedAttention, TTTBidirectional, attend_segments
from ttt_jax.models.infill.config import InfillConfig

INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """`x += TTT(SA(LN(x))); x += MLP(LN(x))`, TTT in two gated passes, or left out."""

    config: InfillConfig

    @nn.compact
    def __call__(self, x: jax.Array, length: jax.Array | None = None) -> jax.Array:
        """`[B, T, dim]` to the same; the first `length [B]` frames of each row are real, None: all."""
        c, dtype, ttt = self.config, jnp.dtype(self.config.dtype), self.config.ttt_config
        seen = LayerNorm(name="norm_seq")(x)
        if ttt is None:
            rope = RotaryEmbedding(c.rope_theta)
            attend = attend_segments(segment=c.segment, overlap=c.overlap, rope=rope, length=length)
            mixed = NormedAttention(c.num_heads, dtype, name="self_attn")({"audio": seen}, attend)["audio"]
        else:
            options = {"gate_init": c.gating_alpha_init, "dtype": dtype, "name": "two_way"}
            mixed = TTTBidirectional(ttt, c.segment, c.overlap, **options)(seen, length)
        x = x + mixed
        return x + GeluMLP(c.hidden_size, dtype, name="mlp")(LayerNorm(name="norm_mlp")(x))


class Infill(nn.Module):
    """Codes and which frames are masked, to logits of every frame's codes; see `__call__`."""

    config: InfillConfig

    @nn.compact
    def __call__(
        self,
        codes: jax.Array,
        masked: jax.Array,
        length: jax.Array | None = None,
        frames: jax.Array | None = None,
    ) -> jax.Array:
        """Read whole recordings, or crops of them.

        Args:
            codes: [B, 1 + num_codebooks, T] int32, text first; -1 is no token. Those of masked frames are not read.
            masked: [B, T] bool, the frames to be filled: nothing is known of them but that they are there.
            length: [B] int, real frames of each row; the others never matter. None: all are.
            frames: [B, N] int, the places whose logits are wanted; None: all T. Logits take most of the memory.

        Returns:
            Logits [B, num_codebooks, N, card] of the audio codes, float32 (float64 if the config's dtype is). Text is
            read where it is known, not predicted.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        c = self.config
        c.check_inputs(codes, masked, length)
        dtype = jnp.dtype(c.dtype)
        wide = at_least_float32(dtype)
        x = self._embedded(jnp.asarray(codes), wide)
        gap: Any = self.param("masked", INIT, (c.dim,), wide)
        x = jnp.where(masked[..., None], gap.reshape(1, 1, -1), x).astype(dtype)
        for i in range(c.num_layers):
            x = Block(c, name=f"layers_{i}")(x, length)
        x = x if frames is None else jnp.take_along_axis(x, frames[..., None], axis=1)
        x = LayerNorm(name="out_norm")(x)
        heads: Any = self.param("heads", INIT, (c.num_codebooks, c.dim, c.card), wide)
        return jnp.einsum("btd,kdn->bktn", x, heads.astype(dtype), preferred_element_type=wide)

    def _embedded(self, codes: jax.Array, wide: Any) -> jax.Array:
        """Sum of the streams' embeddings, [B, T, dim]; -1 adds nothing."""
        c = self.config
        text: Any = self.param("text_embedding", INIT, (c.text_card, c.dim), wide)
        audio: Any = self.param("embedding", INIT, (c.num_codebooks * c.card, c.dim), wide)
        # One table for all codebooks, each in rows of its own: one gather instead of many.
        rows = codes[:, 1:] + c.card * jnp.arange(c.num_codebooks, dtype=codes.dtype)[None, :, None]
        embedded = jnp.where((codes[:, 1:] >= 0)[..., None], audio[jnp.maximum(rows, 0)], jnp.zeros((), wide))
        words = jnp.where((codes[:, 0] >= 0)[..., None], text[jnp.maximum(codes[:, 0], 0)], jnp.zeros((), wide))
        return words + jnp.sum(embedded, axis=1)
