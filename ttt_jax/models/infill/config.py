"""What a model that fills masked spans is: sizes, segments, and its TTT layers."""

import dataclasses
from typing import Any, Literal

import numpy as np

from ttt_jax.layers.ttt import TTTConfig

Layer = Literal["ttt_linear", "ttt_mlp"]


@dataclasses.dataclass(frozen=True)
class InfillConfig:
    """Sizes; the defaults are a small model on two speakers' Codec2 codes.

    Attributes:
        num_codebooks: streams of audio codes, those of all speakers together; beside them there is one of text.
        card: audio codes lie in [0, card).
        text_card: text tokens lie in [0, text_card).
        dim: width of the layers.
        num_layers: each attention and TTT, then an MLP.
        num_heads: of attention and TTT.
        hidden_scale: hidden units of an MLP by `dim`.
        segment: frames that see each other in attention.
        overlap: frames that a segment shares with the one before.
        ssm_layer: the inner model of the TTT layers, "ttt_linear" or "ttt_mlp"; None leaves TTT out.
        mini_batch_size: frames per step of the inner loop; None takes the published one (16 linear, 64 mlp).
        ttt_base_lr: inner-loop base step size; None takes the published one (1.0 linear, 0.1 mlp).
        rope_theta: of the rotary embeddings of attention and TTT.
        gating_alpha_init: initial value of the gates around TTT, not 0 so that what lies behind them gets a gradient.
        dtype: of the computation; parameters, norms, softmax and the inner loop are float32 (float64 if this is).
    """

    num_codebooks: int = 16
    card: int = 512
    text_card: int = 1000
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    hidden_scale: float = 4.0
    segment: int = 32
    overlap: int = 0
    ssm_layer: Layer | None = "ttt_linear"
    mini_batch_size: int | None = None
    ttt_base_lr: float | None = None
    rope_theta: float = 10000.0
    gating_alpha_init: float = 0.1
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("num_codebooks", "card", "text_card", "dim", "num_layers", "num_heads", "segment"):
            _check(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        heads = f"a multiple of 2 * num_heads = {2 * self.num_heads}, since rotary embeddings turn pairs"
        _check("dim", self.dim % (2 * self.num_heads) == 0, heads, self.dim)
        _check("overlap", 0 <= self.overlap < self.segment, f"0 <= overlap < segment = {self.segment}", self.overlap)
        _check("hidden_scale", self.hidden_scale * self.dim >= 1, f"at least 1 / dim, {self.dim}", self.hidden_scale)
        choices = ("ttt_linear", "ttt_mlp", None)
        _check("ssm_layer", self.ssm_layer in choices, f"one of {choices}", self.ssm_layer)
        for name in ("mini_batch_size", "ttt_base_lr"):
            value = getattr(self, name)
            _check(name, value is None or value > 0, "more than 0, or None for the published value", value)
        _check("rope_theta", self.rope_theta > 0, "more than 0", self.rope_theta)
        gate = "not 0, else nothing behind the gates would get a gradient"
        _check("gating_alpha_init", self.gating_alpha_init != 0, gate, self.gating_alpha_init)
        dtypes = ("float32", "bfloat16", "float64")
        _check("dtype", self.dtype in dtypes, f"one of {dtypes}", self.dtype)

    @property
    def hidden_size(self) -> int:
        """Hidden units of an MLP."""
        return round(self.hidden_scale * self.dim)

    @property
    def cards(self) -> tuple[int, ...]:
        """Vocabulary of each stream, text first."""
        return (self.text_card, *[self.card] * self.num_codebooks)

    @property
    def ttt_config(self) -> TTTConfig | None:
        """The config of its TTT layers, None without."""
        if self.ssm_layer is None:
            return None
        kind = "mlp" if self.ssm_layer == "ttt_mlp" else "linear"
        options = {"mini_batch_size": self.mini_batch_size, "base_lr": self.ttt_base_lr, "rope_theta": self.rope_theta}
        return TTTConfig.video_dit(kind, self.dim, self.num_heads, **options)

    def check_inputs(self, codes: Any, masked: Any, length: Any = None) -> None:
        """Checks what the model is given.

        Args:
            codes: `[B, 1 + num_codebooks, T]` integer.
            masked: `[B, T]` bool.
            length: `[B]` integer, or None.

        Raises:
            ValueError: names the argument, what was expected, and what came.
        """
        streams = 1 + self.num_codebooks
        shape = getattr(codes, "shape", None)
        if shape is None or len(shape) != 3 or shape[1] != streams or not np.issubdtype(codes.dtype, np.integer):
            expected = f"integers [B, 1 + num_codebooks = {streams}, T], text first"
            raise ValueError(f"codes: expected {expected}, got {_describe(codes)}.")
        batch, _, frames = shape
        expected = {"masked": (masked, (batch, frames), np.bool_), "length": (length, (batch,), np.integer)}
        for name, (x, wanted, kind) in expected.items():
            if name == "length" and x is None:
                continue
            if getattr(x, "shape", None) != wanted or not np.issubdtype(x.dtype, kind):
                what = "bool" if kind is np.bool_ else "integers"
                raise ValueError(f"{name}: expected {what} {list(wanted)}, as codes has them, got {_describe(x)}.")


def _describe(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else type(x).__name__


def _check(name: str, holds: bool, expected: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
