"""GPU kernels for the TTT inner loop, on NVIDIA Hopper. Depends on jax alone; `kernels/README.md` has the design."""

from ttt_kernels.blocks import LinearBlocks, MLPBlocks
from ttt_kernels.interpreter import interpreted
from ttt_kernels.operations import ttt_linear, ttt_mlp
from ttt_kernels.step import ttt_step

__all__ = ["LinearBlocks", "MLPBlocks", "interpreted", "ttt_linear", "ttt_mlp", "ttt_step"]
