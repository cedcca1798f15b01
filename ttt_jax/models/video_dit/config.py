"""What a Video-DiT is: sizes, scenes, and its TTT layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from ttt_jax.layers.ttt import TTTConfig
from ttt_jax.models.video_dit.published import as_cogvideox, cogvideox_fields, ttt_video_dit_fields

Layer = Literal["ttt_linear", "ttt_mlp"]

SIZES: dict[str, dict[str, Any]] = {
    "5B": {},
    "debug": {"model_dim": 512, "num_heads": 8, "num_layers": 6},
    "small": {"model_dim": 256, "num_heads": 4, "num_layers": 6, "text_dim": 64, "time_embed_dim": 128},
    "tiny": {
        **{"model_dim": 64, "num_heads": 4, "num_layers": 2, "text_dim": 16, "time_embed_dim": 64, "in_channels": 3},
        **{"attn_length": 4, "ssm_layer": "ttt_linear"},
    },
}
"""By name, what differs from the published 5B model; "debug" is published too."""


@dataclasses.dataclass(frozen=True)
class VideoDiTConfig:
    """TTT-Video-DiT's field names with the 5B model's values as defaults, then this project's own fields.

    Attributes:
        model_dim: width of the transformer.
        num_heads: of attention and TTT.
        num_layers: of the transformer.
        text_dim: width of the text's embeddings.
        time_embed_dim: width of the timestep's embedding.
        patch_size: rows and columns of a patch, which is one token.
        in_channels: channels of the latent, in and out.
        attn_length: latent frames by which one scene starts after the other.
        prefix_temporal_length: latent frames that a scene sees beyond its attn_length, shared with the next one.
        theta: of attention's rotary embedding.
        ssm_layer: the inner model of the TTT layers, "ttt_linear" or "ttt_mlp".
        mini_batch_size: tokens per step of the inner loop; None takes the published one (16 linear, 64 mlp).
        ttt_base_lr: inner-loop base step size; None takes the published one (1.0 linear, 0.1 mlp).
        rope_theta: of the TTT layers' rotary embedding.
        gating_alpha_init: initial value of the gates around TTT, not 0 so that what lies behind them gets a gradient.
        dtype: of the computation; parameters, norms, softmax and the inner loop are float32 (float64 if this is).
        remat: recompute each block in the backward pass; training compiles all blocks as one loop.
        remat_group: with `remat`, blocks of which only the first one's input is kept; the backward pass computes those
            of the others again.
        remat_layers: recompute attention, each TTT pass and the MLP on their own, so that a block's backward pass
            keeps what lies inside of one of them at a time.
    """

    model_dim: int = 3072
    num_heads: int = 48
    num_layers: int = 42
    text_dim: int = 4096
    time_embed_dim: int = 512
    patch_size: int = 2
    in_channels: int = 16
    attn_length: int = 12
    prefix_temporal_length: int = 1
    theta: float = 10000
    ssm_layer: Layer = "ttt_mlp"
    mini_batch_size: int | None = None
    ttt_base_lr: float | None = None
    rope_theta: float = 10000
    gating_alpha_init: float = 0.1
    dtype: str = "float32"
    remat: bool = False
    remat_group: int = 1
    remat_layers: bool = False

    def __post_init__(self):
        names = ("model_dim", "num_heads", "num_layers", "text_dim", "time_embed_dim", "patch_size", "in_channels")
        for name in (*names, "attn_length", "remat_group"):
            _check_int(name, getattr(self, name), 1)
        _check_int("prefix_temporal_length", self.prefix_temporal_length, 0)
        if self.mini_batch_size is not None:
            _check_int("mini_batch_size", self.mini_batch_size, 1)
        if self.model_dim % self.num_heads or self.model_dim // self.num_heads % 16:
            raise ValueError(
                "model_dim must be num_heads times a multiple of 16, for the rotary embedding's three axes, got "
                f"model_dim={self.model_dim} and num_heads={self.num_heads}"
            )
        for name in ("theta", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        if self.ttt_base_lr is not None and not self.ttt_base_lr > 0:
            raise ValueError(f"ttt_base_lr must be > 0, or None for the published value, got {self.ttt_base_lr!r}")
        if self.gating_alpha_init == 0:
            raise ValueError("gating_alpha_init must not be 0: nothing behind the gates would get a gradient")
        for name, choices in (
            ("ssm_layer", ("ttt_linear", "ttt_mlp")),
            ("dtype", ("float32", "bfloat16", "float64")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> "VideoDiTConfig":
        """One of `SIZES`: "5B" and "debug" as published, "small" and "tiny" for a few CPU cores; with fields changed.

        Raises:
            ValueError: there is no such size.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {tuple(SIZES)}, got {size!r}")
        return cls(**(SIZES[size] | changes))

    @classmethod
    def from_ttt_video_dit(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> "VideoDiTConfig":
        """From a ttt-video-dit state_dict and what is said about it.

        Args:
            metadata: field to value, sizes as strings or numbers: fields of this config, `kind` for `ssm_layer`, and
                sizes of videos, which are not the model's. What is missing is read off the tensors, or has the
                published value where they do not tell (scenes, mini-batches, step size, rotary embeddings).
            tensors: name to what has a shape; the state_dict alone, or below a prefix such as `model.`.

        Raises:
            ValueError: an unknown field, a value that is no number, or one that the tensors contradict.
        """
        return cls(**ttt_video_dit_fields(metadata, tensors, _field_types()))

    @classmethod
    def from_cogvideox(cls, config: Mapping[str, Any]) -> "VideoDiTConfig":
        """From the config.json of a CogVideoX transformer in diffusers, and fields of this config beside its own.

        What is missing has the value of the 5B model.

        Raises:
            ValueError: a field is unknown (with a suggestion), or holds a value that this model does not implement.
        """
        return cls(**cogvideox_fields(config, _field_types()))

    def to_ttt_video_dit(self) -> dict[str, Any]:
        """The metadata that `from_ttt_video_dit` reads, JSON-serializable; dtype and remat are not part of it."""
        return {name: getattr(self, name) for name in _field_types()}

    def to_cogvideox(self) -> dict[str, Any]:
        """The config.json of a CogVideoX transformer that diffusers reads; it has no fields for scenes and TTT."""
        return as_cogvideox(self.to_ttt_video_dit())

    @property
    def ttt_config(self) -> TTTConfig:
        """The config of its TTT layers."""
        kind = "mlp" if self.ssm_layer == "ttt_mlp" else "linear"
        options = {"mini_batch_size": self.mini_batch_size, "base_lr": self.ttt_base_lr, "rope_theta": self.rope_theta}
        return TTTConfig.video_dit(kind, self.model_dim, self.num_heads, **options)

    def check_inputs(self, video: Any, text: Any, timestep: Any) -> None:
        """Checks what the model is given.

        Args:
            video: `[B, frames, in_channels, h, w]` floating.
            text: `[B, scenes, L, text_dim]` floating.
            timestep: `[B]` integer or floating.

        Raises:
            ValueError: names the argument, what was expected, what came, and the likely fix.
        """
        letters = {"video": "[B, frames, in_channels, h, w]", "text": "[B, scenes, L, text_dim]", "timestep": "[B]"}
        for name, x in (("video", video), ("text", text), ("timestep", timestep)):
            if not hasattr(x, "shape"):
                raise ValueError(f"{name} must be an array, got {type(x).__name__}; make it one with jnp.asarray")
            if x.ndim != letters[name].count(",") + 1:
                raise ValueError(f"{name} must have shape {letters[name]}, got {tuple(x.shape)}")
            if name != "timestep" and not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{name} must be floating, got {x.dtype}; cast it first")
        self._check_sizes(tuple(video.shape), tuple(text.shape), tuple(timestep.shape))

    def _check_sizes(self, video, text, timestep):
        batch, frames, channels, *grid = video
        if channels != self.in_channels:
            raise ValueError(f"video must have in_channels = {self.in_channels} on its third axis, got shape {video}")
        if frames < 1 or any(size < 1 or size % self.patch_size for size in grid):
            raise ValueError(
                f"video must have frames, and rows and columns that patch_size = {self.patch_size} divides, got shape "
                f"{video}; crop or pad the latent"
            )
        if text[0] != batch or text[3] != self.text_dim or text[1] < 1:
            expected = f"[{batch}, scenes, L, text_dim = {self.text_dim}] with at least one scene"
            raise ValueError(f"text must have shape {expected}, got {text}")
        if timestep != (batch,):
            raise ValueError(f"timestep must have shape [{batch}], one for each video, got {timestep}")
        most = text[1] * self.attn_length + self.prefix_temporal_length
        if frames > most:
            raise ValueError(
                f"video must have at most scenes * attn_length + prefix_temporal_length = {text[1]} * "
                f"{self.attn_length} + {self.prefix_temporal_length} = {most} frames, else no scene would see the "
                f"rest, got {frames}; pass a text for each of its {-(-(frames - 1) // self.attn_length)} scenes"
            )


def _check_int(name: str, value: Any, lowest: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be an int >= {lowest}, got {value!r}")


_OF_RUNS = ("dtype", "remat", "remat_group", "remat_layers")


def _field_types() -> dict[str, type]:
    """Fields that a file may tell, and what to read them as."""
    own = {"ssm_layer": str, "theta": float, "ttt_base_lr": float, "rope_theta": float, "gating_alpha_init": float}
    names = (field.name for field in dataclasses.fields(VideoDiTConfig) if field.name not in _OF_RUNS)
    return {name: own.get(name, int) for name in names}
