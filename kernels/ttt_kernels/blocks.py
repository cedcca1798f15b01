"""Block sizes of the kernels, and what picks them."""

import dataclasses

MAX_TILES_PER_CHECKPOINT = 2
"""The backward kernel keeps 4 mini-batches' weights of each tile, 8 KiB each, beside 120 KiB of other things."""


@dataclasses.dataclass(frozen=True)
class LinearBlocks:
    """Of TTT-Linear; `for_interpreter` has the two that the GPU interpreter cannot run switched off.

    Attributes:
        stages: tiles of tokens on their way at once.
        tiles_per_checkpoint: tiles of 64 tokens between two checkpoints of the weights.
        register_operands: left operands go from registers into matrix products, not through SMEM.
        fused_update: the update of the weights accumulates onto them inside of the matrix product.
    """

    stages: int = 2
    tiles_per_checkpoint: int = 2
    register_operands: bool = True
    fused_update: bool = True

    def for_interpreter(self) -> "LinearBlocks":
        """The same sizes without what the interpreter lacks."""
        return dataclasses.replace(self, register_operands=False, fused_update=False)

    @classmethod
    def for_checkpoints_every(cls, mini_batches: int) -> "LinearBlocks":
        """As many tiles between checkpoints as `mini_batches` fill, as far as SMEM holds the weights of each."""
        return cls(tiles_per_checkpoint=min(max(1, mini_batches // 4), MAX_TILES_PER_CHECKPOINT))
