"""GPU kernels for the TTT inner loop, on NVIDIA Hopper. Depends on jax alone; `kernels/README.md` has the design."""

from ttt_kernels.blocks import LinearBlocks
from ttt_kernels.interpreter import interpreted
from ttt_kernels.linear import ttt_linear

__all__ = ["LinearBlocks", "interpreted", "ttt_linear"]
