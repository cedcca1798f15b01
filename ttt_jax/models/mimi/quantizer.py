"""Residual vector quantization (Zeghidour et al. 2021, arXiv 2107.03312), in a semantic and an acoustic part."""

import flax.linen as nn
import jax.numpy as jnp

from ttt_jax.dtypes import at_least_float32
from ttt_jax.layers.mlp import KERNEL_INIT
from ttt_jax.models.mimi.config import MimiConfig

SMALLEST_USAGE = 1e-5
MISSING_CODE = -1
"""Stands for no code at all."""


class ResidualQuantizer(nn.Module):
    """Each level quantizes what the levels before left over, by the nearest entry of its codebook.

    The entries are `embedding_sum / max(cluster_usage, 1e-5)`, the running averages they were learned as.
    """

    config: MimiConfig
    levels: int

    def setup(self):
        """Parameters."""
        c = self.config
        self.input_proj = self.param("input_proj", KERNEL_INIT, (1, c.dimension, c.codebook_dim), jnp.float32)
        self.output_proj = self.param("output_proj", KERNEL_INIT, (1, c.codebook_dim, c.dimension), jnp.float32)
        shape = (self.levels, c.bins, c.codebook_dim)
        self.embedding_sum = self.param("embedding_sum", nn.initializers.normal(1.0), shape, jnp.float32)
        self.cluster_usage = self.param("cluster_usage", nn.initializers.ones, shape[:2], jnp.float32)

    def encode(self, latent, levels: int):
        """`[B, T, dimension]` to codes `[B, levels, T]` int32 of the first `levels` codebooks."""
        rest = jnp.einsum("btd,de->bte", latent, self.input_proj[0].astype(latent.dtype))
        codes = [jnp.zeros((rest.shape[0], 0, rest.shape[1]), jnp.int32)]
        for level in range(levels):
            sums, usage = (x[level].astype(rest.dtype) for x in (self.embedding_sum, self.cluster_usage))
            entries = sums / jnp.maximum(usage, SMALLEST_USAGE)[:, None]
            # |x - e|^2 without |x|^2, which is the same for every entry e
            product = jnp.einsum("bte,ne->btn", rest, entries, precision="highest")  # TF32 would choose another entry
            distance = jnp.sum(entries**2, axis=-1)[None, None] - 2 * product
            nearest = jnp.argmin(distance, axis=-1).astype(jnp.int32)
            rest = rest - entries[nearest]
            codes.append(nearest[:, None])
        return jnp.concatenate(codes, axis=1)

    def decode(self, codes, dtype):
        """Codes `[B, levels, T]` to `[B, T, dimension]`."""
        total = jnp.zeros((codes.shape[0], codes.shape[2], self.config.codebook_dim), dtype)
        for level in range(codes.shape[1]):
            learned = (jnp.asarray(x[level]) for x in (self.embedding_sum, self.cluster_usage))
            sums, usage = (x[codes[:, level]].astype(dtype) for x in learned)
            total = total + sums / jnp.maximum(usage, SMALLEST_USAGE)[..., None]
        return jnp.einsum("bte,ed->btd", total, self.output_proj[0].astype(dtype))


class SplitQuantizer(nn.Module):
    """Both parts quantize the same latent; their sum is its reconstruction."""

    config: MimiConfig

    def setup(self):
        """The two parts, all their levels."""
        c = self.config
        self.semantic = ResidualQuantizer(c, c.n_q_semantic)
        self.acoustic = ResidualQuantizer(c, c.n_q - c.n_q_semantic)

    @property
    def dtype(self) -> jnp.dtype:
        """What the model computes in: the parameters' dtype, at least float32."""
        return at_least_float32(jnp.result_type(self.semantic.embedding_sum))

    def encode(self, latent):
        """`[B, T, dimension]` to codes `[B, num_codebooks, T]` int32."""
        semantic = min(self.config.num_codebooks, self.config.n_q_semantic)
        acoustic = self.config.num_codebooks - semantic
        codes = [self.semantic.encode(latent, semantic), self.acoustic.encode(latent, acoustic)]
        return jnp.concatenate(codes, axis=1)

    def decode(self, codes):
        """Codes `[B, num_codebooks, T]` to `[B, T, dimension]`, zeros for frames that `missing_frames` names."""
        missing = missing_frames(self.config, codes)
        codes = jnp.where(missing[:, None], 0, codes)
        semantic = self.semantic.decode(codes[:, : self.config.n_q_semantic], self.dtype)
        latent = semantic + self.acoustic.decode(codes[:, self.config.n_q_semantic :], self.dtype)
        return jnp.where(missing[:, :, None], jnp.zeros((), latent.dtype), latent)


def missing_frames(config: MimiConfig, codes):
    """Which frames of `codes [B, num_codebooks, T]` hold a code that is not in `[0, bins)`: `[B, T]` bool."""
    return jnp.any((codes < 0) | (codes >= config.bins), axis=1)
