"""Kyutai's Mimi checkpoints to this library's parameter tree, and back by the same table."""

import re
from typing import Any

import numpy as np

from ttt_jax.convert.fused import split_fused
from ttt_jax.convert.hugging_face import interleaved
from ttt_jax.convert.table import Rule, Table, Tensors, make_params
from ttt_jax.convert.tensors import computed
from ttt_jax.models.mimi.config import MimiConfig

_HUGGING_FACE_NAMES = {
    r"(\.conv(tr)?)+\.": ".conv.",
    r"coder\.model\.": "coder.layers.",
    r"_transformer\.transformer\.": "_transformer.",
    r"self_attn\.out_projs\.0": "self_attn.o_proj",
    r"linear(\d)": r"mlp.fc\1",
    r"norm1": "input_layernorm",
    r"norm2": "post_attention_layernorm",
    r"layer_scale_1": "self_attn_layer_scale",
    r"layer_scale_2": "mlp_layer_scale",
    r"rvq_first(\.vq)?": "semantic_residual_vector_quantizer",
    r"rvq_rest(\.vq)?": "acoustic_residual_vector_quantizer",
    r"_codebook\._?": "codebook.",
    r"embedding_sum": "embed_sum",
}
"""Parts of Kyutai's names, and what they are in transformers."""

_JOINED = "self_attn.in_projs.0"
"""Is q, k and v there."""


def mimi_params(config: MimiConfig, tensors: Tensors) -> dict[str, Any]:
    """The Flax parameter tree of `Mimi(config)` from Kyutai's tensors, in float32.

    Kernels are transposed, the quantizer's levels (all of them, used or not) stacked on a leading axis.
    `self_attn.in_proj_weight` / `out_proj.weight` and `in_projs.0.weight` / `out_projs.0.weight` are both read.

    Args:
        config: sizes.
        tensors: name to array (anything `numpy.asarray` takes).

    Raises:
        ValueError: one error that lists every missing, unexpected or misshapen tensor.
    """
    table = mimi_table(config)
    return make_params(table, split_fused(table, tensors), np.float32)


def is_hugging_face(tensors: Tensors) -> bool:
    """Whether the tensors are named as in transformers (`MimiModel`)."""
    return any(name.startswith("encoder.layers.") for name in tensors)


def mimi_from_hugging_face(config: MimiConfig, tensors: Tensors) -> dict[str, Any]:
    """The tensors of a `MimiModel` of transformers under Kyutai's current names; unknown ones keep their names.

    There q, k and v are separate, and q and k permuted for a rotary embedding of half-split instead of interleaved
    pairs.
    """
    renamed = dict(tensors)
    for name in mimi_table(config).shapes:
        theirs = name
        for ours, pattern in _HUGGING_FACE_NAMES.items():
            theirs = re.sub(ours, pattern, theirs)
        parts = [theirs]
        if _JOINED in name:
            parts = [theirs.replace(_JOINED, f"self_attn.{part}_proj") for part in "qkv"]
        if all(part in renamed for part in parts):  # else an error will list them
            found = [renamed.pop(part) for part in parts]
            renamed[name] = _joined(config, *found) if len(found) > 1 else found[0]
    return renamed


def _joined(config: MimiConfig, q, k, v):
    def join():
        return np.concatenate([interleaved(q, config.num_heads), interleaved(k, config.num_heads), np.asarray(v)])

    return computed((3 * q.shape[0], *q.shape[1:]), q.dtype, join)


def mimi_table(config: MimiConfig) -> Table:
    """Every parameter of `Mimi(config)`, by the current names of Kyutai's code."""
    c = config
    square = (c.dimension, c.dimension, 2 * c.stride)
    rules = [*_encoder(c), *_decoder(c)]
    rules.append(Rule("downsample/kernel", ("downsample.conv.conv.conv.weight",), square, transpose=True))
    upsample = (c.dimension, 1, 2 * c.stride)
    rules.append(Rule("upsample/kernel", ("upsample.convtr.convtr.convtr.weight",), upsample, transpose=True))
    for side in ("encoder", "decoder"):
        for i in range(c.num_layers):
            rules += _block(c, f"{side}_transformer/layers_{i}", f"{side}_transformer.transformer.layers.{i}")
    parts = (("semantic", "rvq_first", c.n_q_semantic), ("acoustic", "rvq_rest", c.n_q - c.n_q_semantic))
    constants = {}
    for part, name, levels in parts:
        books = [f"quantizer.{name}.vq.layers.{i}._codebook" for i in range(levels)]
        rules += _quantizer(c, f"quantizer/{part}", f"quantizer.{name}", books)
        constants |= {f"{book}._initialized": np.ones(1, np.float32) for book in books}
    return Table(tuple(rules), constants)


def _encoder(c: MimiConfig):
    """Kyutai counts the activations between the convolutions too."""
    yield from _conv("encoder/conv_in", "encoder.model.0.conv.conv", (c.n_filters, 1, c.kernel_size))
    width, index = c.n_filters, 1
    for i, ratio in enumerate(reversed(c.ratios)):
        yield from _residual_blocks(c, f"encoder/residual_{i}", "encoder.model", index, width)
        index += c.n_residual_layers + 1
        yield from _conv(f"encoder/down_{i}", f"encoder.model.{index}.conv.conv", (2 * width, width, 2 * ratio))
        width, index = 2 * width, index + 1
    shape = (c.dimension, width, c.last_kernel_size)
    yield from _conv("encoder/conv_out", f"encoder.model.{index + 1}.conv.conv", shape)


def _decoder(c: MimiConfig):
    width, index = c.n_filters * 2 ** len(c.ratios), 2
    yield from _conv("decoder/conv_in", "decoder.model.0.conv.conv", (width, c.dimension, c.kernel_size))
    for i, ratio in enumerate(c.ratios):
        name, width = f"decoder.model.{index}.convtr.convtr", width // 2
        yield Rule(f"decoder/up_{i}/kernel", (f"{name}.weight",), (2 * width, width, 2 * ratio))
        yield Rule(f"decoder/up_{i}/bias", (f"{name}.bias",), (width,))
        yield from _residual_blocks(c, f"decoder/residual_{i}", "decoder.model", index + 1, width)
        index += c.n_residual_layers + 2
    yield from _conv("decoder/conv_out", f"decoder.model.{index}.conv.conv", (1, width, c.last_kernel_size))


def _residual_blocks(c: MimiConfig, path: str, name: str, index: int, width: int):
    hidden = width // c.compress
    for j in range(c.n_residual_layers):
        block = f"{name}.{index + j}.block"
        yield from _conv(f"{path}_{j}/conv1", f"{block}.1.conv.conv", (hidden, width, c.residual_kernel_size))
        yield from _conv(f"{path}_{j}/conv2", f"{block}.3.conv.conv", (width, hidden, 1))


def _conv(path: str, name: str, shape: tuple[int, int, int]):
    yield Rule(f"{path}/kernel", (f"{name}.weight",), shape, transpose=True)
    yield Rule(f"{path}/bias", (f"{name}.bias",), shape[:1])


def _block(c: MimiConfig, path: str, name: str):
    matrices = {
        "self_attn/in_proj": ("self_attn.in_projs.0", (3 * c.dimension, c.dimension)),
        "self_attn/out_proj": ("self_attn.out_projs.0", (c.dimension, c.dimension)),
        "linear1": ("linear1", (c.dim_feedforward, c.dimension)),
        "linear2": ("linear2", (c.dimension, c.dim_feedforward)),
    }
    for leaf, (tensor, shape) in matrices.items():
        yield Rule(f"{path}/{leaf}", (f"{name}.{tensor}.weight",), shape, transpose=True)
    for i in (1, 2):
        yield Rule(f"{path}/norm{i}/scale", (f"{name}.norm{i}.weight",), (c.dimension,))
        yield Rule(f"{path}/norm{i}/bias", (f"{name}.norm{i}.bias",), (c.dimension,))
        yield Rule(f"{path}/scale{i}", (f"{name}.layer_scale_{i}.scale",), (c.dimension,))


def _quantizer(c: MimiConfig, path: str, name: str, books: list[str]):
    input_proj, output_proj = (c.codebook_dim, c.dimension, 1), (c.dimension, c.codebook_dim, 1)
    yield Rule(f"{path}/input_proj", (f"{name}.input_proj.weight",), input_proj, transpose=True)
    yield Rule(f"{path}/output_proj", (f"{name}.output_proj.weight",), output_proj, transpose=True)
    for leaf, shape in (("embedding_sum", (c.bins, c.codebook_dim)), ("cluster_usage", (c.bins,))):
        names = tuple(f"{book}.{leaf}" for book in books)
        yield Rule(f"{path}/{leaf}", names, shape, stack=True)
