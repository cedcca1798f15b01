"""Block sizes of the kernels, and what picks them."""

import dataclasses

from ttt_kernels.hopper import TILE


@dataclasses.dataclass(frozen=True)
class LinearBlocks:
    """Of TTT-Linear; `for_interpreter` has the two that the GPU interpreter cannot run switched off.

    Attributes:
        stages: tiles of tokens on their way at once in the forward kernel.
        tiles_per_checkpoint: tiles of 64 tokens between two checkpoints of the weights. Of each mini-batch between
            them the backward kernel keeps the weights, 8 KiB, beside 140 KiB of other things.
        columns: tokens of a mini-batch that the backward kernel has in registers at once.
        register_operands: left operands go from registers into the forward kernel's products, not through SMEM.
        fused_update: the update of the weights accumulates onto them inside of the forward kernel's product.
    """

    stages: int = 2
    tiles_per_checkpoint: int = 2
    columns: int = 16
    register_operands: bool = True
    fused_update: bool = True

    def for_interpreter(self) -> "LinearBlocks":
        """The same sizes without what the interpreter lacks."""
        return dataclasses.replace(self, register_operands=False, fused_update=False)

    @classmethod
    def for_checkpoints_every(cls, mini_batches: int, mini_batch_size: int) -> "LinearBlocks":
        """As many tiles between checkpoints as `mini_batches` fill, as far as SMEM holds the weights of each."""
        return cls(tiles_per_checkpoint=_tiles(mini_batches, mini_batch_size, at_most=8))


@dataclasses.dataclass(frozen=True)
class MLPBlocks:
    """Of TTT-MLP.

    Attributes:
        stages: tiles of tokens on their way at once in the forward kernel.
        tiles_per_checkpoint: tiles of 64 tokens between two checkpoints of the weights. Of each mini-batch between
            them each block of the backward kernel keeps the weights, 16 KiB.
        columns: tokens of a mini-batch in registers at once.
        through_gmem: sums over a cluster go through global memory: all that the GPU interpreter can do.
    """

    stages: int = 2
    tiles_per_checkpoint: int = 1
    columns: int = 16
    through_gmem: bool = False

    def for_interpreter(self) -> "MLPBlocks":
        """The same sizes without what the interpreter lacks."""
        return dataclasses.replace(self, through_gmem=True)

    @classmethod
    def for_checkpoints_every(cls, mini_batches: int, mini_batch_size: int) -> "MLPBlocks":
        """As many tiles between checkpoints as `mini_batches` fill, as far as SMEM holds the weights of each."""
        return cls(tiles_per_checkpoint=_tiles(mini_batches, mini_batch_size, at_most=4))


def _tiles(mini_batches: int, mini_batch_size: int, *, at_most: int) -> int:
    """Whole tiles in `mini_batches`, one at least and no more than `at_most` mini-batches fill."""
    return max(1, min(mini_batches, at_most) * mini_batch_size // TILE)
