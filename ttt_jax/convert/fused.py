"""The two names of attention projections: released files fuse what current ones of Kyutai's code hold apart."""

import re
from typing import Any

from ttt_jax.convert.table import Rule, Table, Tensors

_PROJECTION = re.compile(r"(?P<module>.+\.self_attn)\.(?P<part>in|out)_projs\.\d+\.weight")


def fused_name(rule: Rule) -> str | None:
    """The one tensor that holds the leaf in released files, its blocks after each other; None where there is none."""
    match = _PROJECTION.fullmatch(rule.names[0])
    if match is None:
        return None
    return f"{match['module']}.in_proj_weight" if match["part"] == "in" else f"{match['module']}.out_proj.weight"


def is_fused(table: Table, tensors: Tensors) -> bool:
    """Whether the tensors are named as in released files."""
    return any(fused_name(rule) in tensors for rule in table.rules)


def split_fused(table: Table, tensors: Tensors) -> dict[str, Any]:
    """The tensors with the released files' fused projections under the current names.

    Raises:
        ValueError: A projection is there under both.
    """
    current = dict(tensors)
    for rule in table.rules:
        fused = fused_name(rule)
        if fused not in current or not current[fused].shape or current[fused].shape[0] % len(rule.names):
            continue
        tensor = current.pop(fused)
        rows = tensor.shape[0] // len(rule.names)
        for i, name in enumerate(rule.names):
            if name in current:
                raise ValueError(f"both {fused} and {name} are there, expected one of the two namings")
            current[name] = tensor[i * rows : (i + 1) * rows]
    return current
