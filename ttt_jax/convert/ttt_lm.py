"""One layer of TTT-LM's Flax checkpoints (ttt-lm-jax) to the parameter tree of `TTTLayer`."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from ttt_jax.convert.checks import check_tensors

RENAMED = {
    "learnable_ttt_lr/kernel": "step_size/kernel",
    "learnable_ttt_lr/bias": "step_size/bias",
    "learnable_token_idx": "token_scale_offset",
    "ttt_norm/scale": "inner/ln_scale",
    "ttt_norm/bias": "inner/ln_bias",
    "ttt_dense_0": "inner/w1",
    "ttt_bias_0": "inner/b1",
    "ttt_dense_1": "inner/w2",
    "ttt_bias_1": "inner/b2",
}


def ttt_lm_params(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter tree of a `TTTLayer` from the tensors of one TTT-LM layer, dtypes kept.

    The inner model and the backbone follow from the names that are there: `ttt_dense_1` means TTT-MLP, `conv_q/kernel`
    the Mamba backbone.

    Args:
      tensors: name to array, names joined by "/" below the layer (`wq/kernel`, `ttt_dense_0`, ...).

    Raises:
      ValueError: lists every missing, unexpected or misshapen tensor.
    """
    check_tensors(_expected_shapes(tensors), tensors)
    renamed = {RENAMED.get(name, name): np.asarray(x) for name, x in tensors.items()}
    renamed["step_size/kernel"] = renamed["step_size/kernel"][:, :, 0].T
    renamed["step_size/bias"] = renamed["step_size/bias"][:, 0]
    for bias in ("inner/b1", "inner/b2"):
        if bias in renamed:
            renamed[bias] = renamed[bias][:, 0]
    return flax.traverse_util.unflatten_dict(renamed, sep="/")


def _expected_shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the layer needs, its sizes read off the tensors that tell them."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = tuple(tensors[name].shape) if name in tensors else ()
        return found if len(found) == rank else (0,) * rank

    width = shape("wq/kernel", 2)[0]
    num_heads, d, hidden = shape("ttt_dense_0", 3)
    (mini_batch_size,) = shape("learnable_token_idx", 1)
    square, vector = (width, width), (width,)
    shapes = {f"{name}/kernel": square for name in ("wq", "wv", "wo")}
    shapes |= {"post_norm/scale": vector, "post_norm/bias": vector}
    shapes |= {"learnable_ttt_lr/kernel": (num_heads, width, 1), "learnable_ttt_lr/bias": (num_heads, 1)}
    shapes |= {"learnable_token_idx": (mini_batch_size,)}
    shapes |= {"ttt_norm/scale": (num_heads, d), "ttt_norm/bias": (num_heads, d)}
    shapes |= {"ttt_dense_0": (num_heads, d, hidden), "ttt_bias_0": (num_heads, 1, hidden)}
    if "ttt_dense_1" in tensors:
        shapes |= {"ttt_dense_1": (num_heads, hidden, d), "ttt_bias_1": (num_heads, 1, d)}
    if "conv_q/kernel" not in tensors:
        return shapes | {"wk/kernel": square}
    conv = (shape("conv_q/kernel", 3)[0], 1, width)
    shapes |= {"conv_q/kernel": conv, "conv_k/kernel": conv, "conv_q/bias": vector, "conv_k/bias": vector}
    return shapes | {"wg/kernel": square}
