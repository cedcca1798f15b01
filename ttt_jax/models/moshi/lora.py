"""Low-rank adaptation (Hu et al. 2021) of Moshi's linear layers, as Kyutai's: `W + scaling * A B` with W frozen.

The factors are a tree of their own, `{"A": [..., in, rank], "B": [..., rank, out]}` in the place of each kernel
`[..., in, out]`; leading axes, the depth transformer's steps, are batch axes. Kyutai stores all three transposed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ttt_jax.layers.linear import LORA

LINEARS = (
    *("in_proj", "out_proj", "linear_in", "linear_out", "text_linear", "depformer_in", "linears"),
    "depformer_low_rank",
)
"""Names of the kernels that get factors: Moshi's linear layers; not embeddings, norms, conditioners, extra heads, TTT
layers and gates."""

FACTORS = ("A", "B")


def init_factors(rng: jax.Array, params: Any, rank: int) -> dict[str, Any]:
    """Factors for every linear layer of Moshi's `params`: A uniform in +-1/sqrt(in), B zero, both float32."""
    leaves: dict[tuple[str, ...], Any] = flatten_dict(params)
    kernels = {path: leaf for path, leaf in leaves.items() if path[-1] in LINEARS}
    factors = {}
    for key, (path, kernel) in zip(jax.random.split(rng, len(kernels)), sorted(kernels.items()), strict=True):
        *batch, inputs, outputs = kernel.shape
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(batch))))
        factors[*path, "A"] = init(key, (*batch, inputs, rank), jnp.float32)
        factors[*path, "B"] = jnp.zeros((*batch, rank, outputs), jnp.float32)
    return unflatten_dict(factors)


def collection(factors: Any, scaling: float) -> dict[str, Any]:
    """The variables to apply Moshi with beside its "params", for `W + scaling * A B` in the place of each kernel W."""
    return {LORA: jax.tree.map_with_path(lambda path, leaf: leaf * scaling if path[-1].key == "A" else leaf, factors)}


def merge(params: Any, factors: Any, scaling: float) -> Any:
    """A plain Moshi tree: `params` with `scaling * A B` added to each kernel that has `factors`; dtypes stay."""
    merged = dict(params)
    for name, node in factors.items():
        merged[name] = _adapted(params[name], node, scaling) if "A" in node else merge(params[name], node, scaling)
    return merged


def _adapted(kernel, factors, scaling):
    # Full precision whatever the default is, so that the model in training and the exported one agree.
    product = jnp.matmul(factors["A"], factors["B"], precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(product.dtype) + scaling * product).astype(kernel.dtype)
