"""What a tile of tokens is cut into."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels.hopper import TILE, WGMMA


@dataclasses.dataclass(frozen=True)
class MiniBatches:
    """The mini-batches of a tile, and the blocks of tokens in which each is worked on.

    Attributes:
        size: C, tokens of a mini-batch.
        columns: tokens of a block.
    """

    size: int
    columns: int

    @property
    def per_tile(self) -> int:
        """Mini-batches of a tile."""
        return TILE // self.size

    @property
    def num_blocks(self) -> int:
        """Blocks of a mini-batch."""
        return self.size // self.columns

    def tokens(self, m) -> Any:
        """Those of the tile's mini-batch m."""
        return pl.ds(pl.multiple_of(m * self.size, self.size), self.size)

    def block(self, m, i) -> Any:
        """Tokens of block i of the tile's mini-batch m."""
        start = m * self.size + i * self.columns
        return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, self.columns), self.columns)

    def over_blocks(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """A loop over the blocks of a mini-batch."""
        return body(0, carry) if self.num_blocks == 1 else lax.fori_loop(0, self.num_blocks, body, carry)

    def is_seen(self, m, i, *, causal: bool) -> jax.Array:
        """`[TILE, columns]`: which of the tile's tokens are seen by those of block i of mini-batch m."""
        shape = (TILE, self.columns)
        source = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) - m * self.size
        reader = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + i * self.columns
        return (source >= 0) & (source <= reader if causal else source < self.size)
