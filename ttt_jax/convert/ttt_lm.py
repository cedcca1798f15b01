"""One layer of TTT-LM's Flax checkpoints (ttt-lm-jax) and the parameter tree of `TTTLayer`."""

from typing import Any

from ttt_jax.convert.table import Rule, Table, Tensors, make_params
from ttt_jax.layers.ttt import TTTConfig


def ttt_lm_params(tensors: Tensors) -> dict[str, Any]:
    """The parameter tree of a `TTTLayer` from the tensors of one TTT-LM layer, dtypes kept.

    The inner model and the backbone follow from the names that are there: `ttt_dense_1` means TTT-MLP, `conv_q/kernel`
    the Mamba backbone.

    Args:
      tensors: name to array, names joined by "/" below the layer (`wq/kernel`, `ttt_dense_0`, ...).

    Raises:
      ValueError: lists every missing, unexpected or misshapen tensor.
    """
    return make_params(ttt_lm_table(tensors), tensors)


def ttt_lm_config(tensors: Tensors, **options: Any) -> TTTConfig:
    """The layer's config: what the tensors tell, and the rest as `TTTConfig.ttt_lm` takes it.

    Args:
        tensors: As in `ttt_lm_params`.
        **options: Arguments of `TTTConfig.ttt_lm` by name. `base_lr` and `rope_theta` are what the tensors do not tell.

    Raises:
        ValueError: An option is unknown, or says something else than the tensors.
    """
    num_heads, width = _shape(tensors, "learnable_ttt_lr/kernel", 3)[:2]
    told: dict[str, Any] = {"kind": "mlp" if "ttt_dense_1" in tensors else "linear", "width": width}
    told |= {"num_heads": num_heads, "mini_batch_size": _shape(tensors, "learnable_token_idx", 1)[0]}
    told["backbone"] = "mamba" if "conv_q/kernel" in tensors else "base"
    if "conv_q/kernel" in tensors:
        told["conv_width"] = _shape(tensors, "conv_q/kernel", 3)[0]
    known = {*told, "conv_width", "base_lr", "rope_theta"}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"unknown fields {unknown} in the TTT-LM config; known fields: {', '.join(sorted(known))}")
    wrong = {name: options[name] for name, size in told.items() if options.get(name, size) != size}
    if wrong:
        raise ValueError(f"the config is not that of this layer: it says {wrong}, the tensors say {told}")
    return TTTConfig.ttt_lm(**(told | options))


def ttt_lm_table(tensors: Tensors) -> Table:
    """What the layer needs, its sizes read off the tensors that tell them."""
    width = _shape(tensors, "wq/kernel", 2)[0]
    h, d, hidden = _shape(tensors, "ttt_dense_0", 3)
    (mini_batch_size,) = _shape(tensors, "learnable_token_idx", 1)
    square, vector = (width, width), (width,)
    rules = [_same(f"{name}/kernel", square) for name in ("wq", "wv", "wo")]
    rules += [_same("post_norm/scale", vector), _same("post_norm/bias", vector)]
    rules += [
        Rule("step_size/kernel", ("learnable_ttt_lr/kernel",), (h, width, 1), view=(h, width), transpose=True),
        Rule("step_size/bias", ("learnable_ttt_lr/bias",), (h, 1), view=(h,)),
        Rule("token_scale_offset", ("learnable_token_idx",), (mini_batch_size,)),
        Rule("inner/ln_scale", ("ttt_norm/scale",), (h, d)),
        Rule("inner/ln_bias", ("ttt_norm/bias",), (h, d)),
        Rule("inner/w1", ("ttt_dense_0",), (h, d, hidden)),
        Rule("inner/b1", ("ttt_bias_0",), (h, 1, hidden), view=(h, hidden)),
    ]
    if "ttt_dense_1" in tensors:
        rules += [
            Rule("inner/w2", ("ttt_dense_1",), (h, hidden, d)),
            Rule("inner/b2", ("ttt_bias_1",), (h, 1, d), view=(h, d)),
        ]
    if "conv_q/kernel" not in tensors:
        return Table((*rules, _same("wk/kernel", square)))
    conv = (_shape(tensors, "conv_q/kernel", 3)[0], 1, width)
    for name in ("conv_q", "conv_k"):
        rules += [_same(f"{name}/kernel", conv), _same(f"{name}/bias", vector)]
    return Table((*rules, _same("wg/kernel", square)))


def _same(path: str, shape: tuple[int, ...]) -> Rule:
    return Rule(path, (path,), shape)


def _shape(tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    found = tuple(tensors[name].shape) if name in tensors else ()
    return found if len(found) == rank else (0,) * rank
