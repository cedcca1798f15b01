"""Block sizes of the kernels, and what picks them."""

import dataclasses

from ttt_kernels.hopper import TILE, D


@dataclasses.dataclass(frozen=True)
class LinearBlocks:
    """Of TTT-Linear; `for_interpreter` has off what the GPU interpreter cannot run, or runs slowly.

    Attributes:
        stages: tiles of tokens on their way at once in the forward kernel.
        tiles_per_checkpoint: tiles of 64 tokens between two checkpoints of the weights. Of each mini-batch between
            them the backward kernel keeps the weights, 8 KiB of global memory for each row and head; 32 at D = 128.
        columns: tokens of a mini-batch that the backward kernel has in registers at once; the forward kernel, if wide
            or of 64 float32 tokens.
        register_operands: left operands go from registers into the forward kernel's products, not through SMEM; never
            if wide, nor for float32 tokens.
        fused_update: the update of the weights accumulates onto them inside of a product: in the forward kernel, and
            if wide also where the backward kernel walks forward. Not for float32 tokens: products truncate their sums,
            all towards zero, which adds up over a long sequence.
        wide: for D = 128, where registers and SMEM hold no second float32 matrix. Weights move directly between
            registers and global memory, where the backward kernel also has their derivative; products read SMEM.
        hidden_addresses: the compiler is kept from computing addresses long before they are needed.
    """

    stages: int = 2
    tiles_per_checkpoint: int = 4
    columns: int = 16
    register_operands: bool = True
    fused_update: bool = True
    wide: bool = False
    hidden_addresses: bool = False

    def for_interpreter(self) -> "LinearBlocks":
        """The same sizes without what the interpreter lacks."""
        return dataclasses.replace(self, register_operands=False, fused_update=False, hidden_addresses=False)

    @classmethod
    def choose(cls, mini_batch_size: int, mini_batches_per_checkpoint: int, head_dim: int = D) -> "LinearBlocks":
        """For a call: as many tiles between checkpoints as wanted."""
        tiles, wide = _tiles(mini_batches_per_checkpoint, mini_batch_size), head_dim > D
        return cls(tiles_per_checkpoint=tiles, wide=wide, hidden_addresses=wide)


@dataclasses.dataclass(frozen=True)
class MLPBlocks:
    """Of TTT-MLP.

    Attributes:
        tiles_per_checkpoint: tiles of 64 tokens between two checkpoints of the weights. Of each mini-batch between
            them the backward kernel keeps the weights, 64 KiB of global memory for each row and head.
        columns: tokens of a mini-batch in registers at once.
        interpreted: sums over a cluster go through global memory, since the GPU interpreter has no other way, and
            addresses are known when compiled, which costs it less.
    """

    tiles_per_checkpoint: int = 4
    columns: int = 16
    interpreted: bool = False

    def for_interpreter(self) -> "MLPBlocks":
        """The same sizes without what the interpreter lacks."""
        return dataclasses.replace(self, interpreted=True)

    @classmethod
    def choose(cls, mini_batch_size: int, mini_batches_per_checkpoint: int) -> "MLPBlocks":
        """For a call: as many tiles between checkpoints as wanted."""
        return cls(tiles_per_checkpoint=_tiles(mini_batches_per_checkpoint, mini_batch_size))


_MOST = 16
"""Mini-batches between two checkpoints: more would save little, and what the backward kernels keep is to stay in L2."""


def _tiles(mini_batches: int, mini_batch_size: int) -> int:
    """Whole tiles in `mini_batches`, one at least and no more than `_MOST` mini-batches fill."""
    return max(1, min(mini_batches, _MOST) * mini_batch_size // TILE)
