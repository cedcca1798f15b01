"""Checkpoints whose matrices are stored in parts, as the plain matrices that they stand for."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ttt_jax.convert.tensors import computed

LORA_PARTS = (".lora_A.weight", ".lora_B.weight")
FROZEN = ".frozen_W.weight"
SCALE = "_scb"
INT8_STEPS = 127


def dequantized(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Int8 matrices `NAME` with a scale per row `NAME_scb` as float32: `W = NAME * NAME_scb / 127`.

    Raises:
        ValueError: A scale without its matrix, or of another number of rows; an int8 matrix without a scale.
    """
    plain = {name: x for name, x in tensors.items() if not name.endswith(SCALE)}
    scaled = {name.removesuffix(SCALE) for name in tensors.keys() - plain.keys()}
    int8 = {name for name, x in plain.items() if x.dtype == np.int8}
    if int8 != scaled:
        raise ValueError(
            f"int8 tensors and their scales `NAME{SCALE}` must come in pairs; alone are {sorted(int8 ^ scaled)}"
        )
    for name in int8:
        matrix, scale = plain[name], tensors[name + SCALE]
        if scale.shape != matrix.shape[:1]:
            raise ValueError(
                f"{name}{SCALE}: expected a scale per row, {list(matrix.shape[:1])}, got {list(scale.shape)}"
            )
        plain[name] = computed(matrix.shape, np.float32, lambda matrix=matrix, scale=scale: _product(matrix, scale))
    return plain


def _product(matrix, scale) -> np.ndarray:
    return np.asarray(matrix).astype(np.float32) * (np.asarray(scale).astype(np.float32)[:, None] / INT8_STEPS)


def with_lora_merged(tensors: Mapping[str, Any], scaling: float) -> dict[str, Any]:
    """`X.lora_A.weight [rank, in]` and `X.lora_B.weight [out, rank]` added to `X.frozen_W.weight` or `X.weight`.

    The sum `W + scaling * B A` is computed in float32 and has the dtype of W.

    Raises:
        ValueError: A factor alone, without a matrix that it belongs to, or of a shape that does not fit.
    """
    factors = {name: x for name, x in tensors.items() if name.endswith(LORA_PARTS)}
    frozen = {name: x for name, x in tensors.items() if name.endswith(FROZEN)}
    plain = {name: x for name, x in tensors.items() if name not in factors and name not in frozen}
    for name, x in frozen.items():
        if (target := name.removesuffix(FROZEN) + ".weight") in plain:
            raise ValueError(f"both {name} and {target} are there, expected one of them")
        plain[target] = x
    for module in sorted({name.removesuffix(part) for name in factors for part in LORA_PARTS if name.endswith(part)}):
        a, b = (factors.get(module + part) for part in LORA_PARTS)
        w = plain.get(f"{module}.weight")
        if a is None or b is None or w is None:
            raise ValueError(f"LoRA needs {module}.weight, .lora_A.weight and .lora_B.weight; one of them is missing")
        if w.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            shapes = f"W {list(w.shape)}, A {list(a.shape)}, B {list(b.shape)}"
            raise ValueError(
                f"{module}: expected LoRA factors A [rank, in] and B [out, rank] of W [out, in], got {shapes}"
            )
        plain[f"{module}.weight"] = computed(w.shape, w.dtype, lambda w=w, a=a, b=b: _merged(w, a, b, scaling))
    return plain


def _merged(w, a, b, scaling: float) -> np.ndarray:
    w, a, b = (np.asarray(x) for x in (w, a, b))
    return (w.astype(np.float32) + np.float32(scaling) * (b.astype(np.float32) @ a.astype(np.float32))).astype(w.dtype)
