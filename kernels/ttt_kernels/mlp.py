"""Which of TTT-MLP's kernels takes a call."""

from typing import Any

import jax.numpy as jnp

from ttt_kernels import (
    mlp_backward,
    mlp_backward_c64,
    mlp_forward,
    mlp_forward_float32,
)
from ttt_kernels.blocks import MLPBlocks


def forward(q, *arguments: Any, keep: bool, **options: Any) -> Any:
    """As `mlp_forward.forward`; float32 tokens are only taken where no checkpoints are kept."""
    if q.dtype == jnp.float32:
        return mlp_forward_float32.forward(q, *arguments, **options)
    return mlp_forward.forward(q, *arguments, keep=keep, **options)


def backward(q, k, v, lr_read, lr_update, scale, *arguments: Any, blocks: MLPBlocks, **options: Any) -> Any:
    """As `mlp_backward.backward`."""
    kernel = mlp_backward if scale.shape[0] == mlp_backward.C else mlp_backward_c64
    return kernel.backward(q, k, v, lr_read, lr_update, scale, *arguments, blocks=blocks, **options)
