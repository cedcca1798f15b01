"""ttt-video-dit's and CogVideoX' (diffusers') checkpoints and the parameter tree of `VideoDiT`."""

import itertools
from collections.abc import Iterable
from typing import Any

from ttt_jax.convert.table import Rule, Table, Tensors, make_params
from ttt_jax.models.video_dit import VideoDiTConfig
from ttt_jax.models.video_dit.published import state_dict


def video_dit_params(config: VideoDiTConfig, tensors: Tensors) -> dict[str, Any]:
    """The Flax parameter tree of `VideoDiT(config)` from a ttt-video-dit state_dict, dtypes kept.

    Args:
        config: `VideoDiTConfig.from_ttt_video_dit(metadata, tensors)`.
        tensors: name to array (anything `numpy.asarray` takes); as `state_dict` takes them.

    Raises:
        ValueError: one error that lists every missing, unexpected or misshapen tensor.
    """
    return make_params(ttt_video_dit_table(config), state_dict(tensors))


def ttt_video_dit_table(config: VideoDiTConfig) -> Table:
    """Every parameter of `VideoDiT(config)`, by the names of ttt-video-dit's state_dict."""
    c = config
    rules = [
        *_ends(c, "patch_embedding.vid_proj", "patch_embedding.text_proj", ("time_embed.0", "time_embed.2")),
        *_norm("transformer_norm", "transformer_norm", c.model_dim),
        *_norm("final_layer/norm", "final_layer.norm", c.model_dim),
        *_linear("final_layer/modulation", "final_layer.adaLN_modulation.1", c.time_embed_dim, 2 * c.model_dim),
        *_linear("final_linear", "final_layer.linear", c.model_dim, c.in_channels * c.patch_size**2),
    ]
    for i in range(c.num_layers):
        path, name = f"layers_{i}", f"layers.{i}"
        for norm in ("pre_seq", "pre_mlp"):
            rules += _norm(f"{path}/{norm}/norm", f"{name}.{norm}_layernorm", c.model_dim)
            modulation = f"{name}.{norm}_adaLN_modulation.1"
            rules += _linear(f"{path}/{norm}/modulation", modulation, c.time_embed_dim, 6 * c.model_dim)
        rules += _attention(c, f"{path}/self_attn", f"{name}.seq_modeling_block", "qkvo")
        rules += _linear(f"{path}/mlp/layer1", f"{name}.mlp.layer1", c.model_dim, 4 * c.model_dim)
        rules += _linear(f"{path}/mlp/layer2", f"{name}.mlp.layer2", 4 * c.model_dim, c.model_dim)
        rules += _ttt(c, path, f"{name}.seq_modeling_block")
    return Table(tuple(rules))


def cogvideox_table(config: VideoDiTConfig) -> Table:
    """The parameters of `VideoDiT(config)` that CogVideoX has too, by the names of diffusers' transformer."""
    c = config
    rules = [
        *_ends(c, "patch_embed.proj", "patch_embed.text_proj", ("time_embedding.linear_1", "time_embedding.linear_2")),
        *_norm("transformer_norm", "norm_final", c.model_dim),
        *_norm("final_layer/norm", "norm_out.norm", c.model_dim),
        *_linear("final_layer/modulation", "norm_out.linear", c.time_embed_dim, 2 * c.model_dim),
        *_linear("final_linear", "proj_out", c.model_dim, c.in_channels * c.patch_size**2),
    ]
    for i in range(c.num_layers):
        path, name = f"layers_{i}", f"transformer_blocks.{i}"
        for ours, theirs in (("pre_seq", "norm1"), ("pre_mlp", "norm2")):
            rules += _norm(f"{path}/{ours}/norm", f"{name}.{theirs}.norm", c.model_dim)
            rules += _linear(f"{path}/{ours}/modulation", f"{name}.{theirs}.linear", c.time_embed_dim, 6 * c.model_dim)
        rules += _attention(c, f"{path}/self_attn", f"{name}.attn1", ("to_q", "to_k", "to_v", "to_out.0"))
        rules += _linear(f"{path}/mlp/layer1", f"{name}.ff.net.0.proj", c.model_dim, 4 * c.model_dim)
        rules += _linear(f"{path}/mlp/layer2", f"{name}.ff.net.2", 4 * c.model_dim, c.model_dim)
    return Table(tuple(rules))


def _ends(c: VideoDiTConfig, patches: str, text: str, time: tuple[str, str]) -> Iterable[Rule]:
    patch = (c.in_channels, c.patch_size, c.patch_size)
    size = c.in_channels * c.patch_size**2
    names = (f"{patches}.weight",)
    yield Rule("vid_proj/kernel", names, (c.model_dim, *patch), view=(c.model_dim, size), transpose=True)
    yield Rule("vid_proj/bias", (f"{patches}.bias",), (c.model_dim,))
    yield from _linear("text_proj", text, c.text_dim, c.model_dim)
    yield from _linear("time_embed/linear1", time[0], c.model_dim, c.time_embed_dim)
    yield from _linear("time_embed/linear2", time[1], c.time_embed_dim, c.time_embed_dim)


def _attention(c: VideoDiTConfig, path: str, name: str, linears: Iterable[str]) -> Iterable[Rule]:
    for ours, theirs in zip("qkvo", linears, strict=True):
        yield from _linear(f"{path}/{ours}", f"{name}.{theirs}", c.model_dim, c.model_dim)
    for ours in ("q_norm", "k_norm"):
        theirs = ours if linears == "qkvo" else "_".join(reversed(ours.split("_")))
        yield from _norm(f"{path}/{ours}", f"{name}.{theirs}", c.model_dim // c.num_heads)


def _ttt(c: VideoDiTConfig, path: str, name: str) -> Iterable[Rule]:
    h, d, width = c.num_heads, c.model_dim // c.num_heads, c.model_dim
    for direction in ("forward", "backward"):
        for part in ("text", "video"):
            gate = f"{name}.{direction}_ssm_gating_{part}.gating_alpha"
            yield Rule(f"{path}/gate_{direction}_{part}", (gate,), (width,))
    path, name = f"{path}/ttt", f"{name}.ssm.ttt"
    for linear in ("wq", "wk", "wv", "wo"):
        yield from _linear(f"{path}/{linear}", f"{name}.{linear}", width, width)
    yield from _norm(f"{path}/post_norm", f"{name}.post_norm", width)
    step_size = (f"{name}.learnable_ttt_lr_weight",)
    yield Rule(f"{path}/step_size/kernel", step_size, (h, 1, width), view=(h, width), transpose=True)
    yield Rule(f"{path}/step_size/bias", (f"{name}.learnable_ttt_lr_bias",), (h, 1), view=(h,))
    yield Rule(f"{path}/inner/ln_scale", (f"{name}.ttt_norm_weight",), (h, d))
    yield Rule(f"{path}/inner/ln_bias", (f"{name}.ttt_norm_bias",), (h, d))
    sizes = [d, d] if c.ssm_layer == "ttt_linear" else [d, 4 * d, d]
    for i, (size, out) in enumerate(itertools.pairwise(sizes), start=1):
        yield Rule(f"{path}/inner/w{i}", (f"{name}.W{i}",), (h, size, out))
        yield Rule(f"{path}/inner/b{i}", (f"{name}.b{i}",), (h, 1, out), view=(h, out))


def _linear(path: str, name: str, size: int, out: int) -> Iterable[Rule]:
    yield Rule(f"{path}/kernel", (f"{name}.weight",), (out, size), transpose=True)
    yield Rule(f"{path}/bias", (f"{name}.bias",), (out,))


def _norm(path: str, name: str, size: int) -> Iterable[Rule]:
    yield Rule(f"{path}/scale", (f"{name}.weight",), (size,))
    yield Rule(f"{path}/bias", (f"{name}.bias",), (size,))
