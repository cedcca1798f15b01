"""What a Mimi is: sizes of its convolutions, transformers and codebooks, and how many of these are used."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from ttt_jax.files import read_json
from ttt_jax.models.mimi.published import as_kyutai, hugging_face_fields, kyutai_fields


@dataclasses.dataclass(frozen=True)
class MimiConfig:
    """The published Mimi's values as defaults.

    Attributes:
        sample_rate: of the waveform in Hz; one channel.
        frame_rate: of the codes in Hz.
        dimension: width of the latent and of both transformers.
        n_filters: channels of the outermost convolutions, doubled by every ratio.
        n_residual_layers: residual blocks before (decoder: after) every change of rate.
        ratios: strides of the decoder's transposed convolutions; the encoder's are the same, reversed.
        kernel_size: width of the encoder's first and the decoder's first convolution.
        residual_kernel_size: of the residual blocks.
        last_kernel_size: of the encoder's last and the decoder's last convolution.
        dilation_base: residual block j is dilated by `dilation_base ** j`.
        compress: channels of a residual block over those inside it.
        num_heads: of the transformers.
        num_layers: of each of them.
        dim_feedforward: their hidden size.
        context: steps that their attention sees, the present one included; a frame is `stride` steps.
        max_period: theta of the rotary embedding.
        layer_scale: initial scale of their branches.
        codebook_dim: width of the codebooks' entries.
        n_q: codebooks in the parameters.
        n_q_semantic: how many of them are semantic; the rest are acoustic.
        bins: entries per codebook.
        num_codebooks: codebooks used, the first ones.
        published_ring: reproduce the published streaming, which pushes the `stride` steps of a frame at once into a
            ring of `context` entries, so that step j of a frame sees only `context - (stride - 1 - j)`. It streams
            what the published model streams, frame by frame; False streams what the published model computes in one
            pass. Either way any split into calls gives the same.
    """

    sample_rate: int = 24000
    frame_rate: float = 12.5
    dimension: int = 512
    n_filters: int = 64
    n_residual_layers: int = 1
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2
    num_heads: int = 8
    num_layers: int = 8
    dim_feedforward: int = 2048
    context: int = 250
    max_period: float = 10000
    layer_scale: float = 0.01
    codebook_dim: int = 256
    n_q: int = 32
    n_q_semantic: int = 1
    bins: int = 2048
    num_codebooks: int = 8
    published_ring: bool = False

    def __post_init__(self):
        object.__setattr__(self, "ratios", tuple(self.ratios))
        self._check_sizes()
        self._check_rates()
        self._check_codebooks()

    @classmethod
    def from_kyutai(cls, config: Mapping[str, Any] | str | os.PathLike, num_codebooks: int = 8) -> "MimiConfig":
        """From the config of a Kyutai checkpoint, as a mapping or a path to its JSON.

        Args:
            config: with the parts `seanet`, `quantizer` and `transformer`; what is missing or None takes the
                published value, so `{}` is the published Mimi.
            num_codebooks: codebooks used, the first ones.

        Raises:
            ValueError: a field is unknown (with a suggestion), or holds a value this model does not implement.
        """
        raw = config if isinstance(config, Mapping) else read_json(config)
        return cls(**kyutai_fields(raw, _published()), num_codebooks=num_codebooks)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], num_codebooks: int = 8) -> "MimiConfig":
        """From the config.json of a Mimi in transformers; what is missing or None takes the published value.

        Raises:
            ValueError: a field holds a value this model does not implement.
        """
        return cls(**hugging_face_fields(config, _published()), num_codebooks=num_codebooks)

    def to_kyutai(self) -> dict[str, Any]:
        """The config that `from_kyutai` reads, JSON-serializable; how the model is used is not part of it."""
        return as_kyutai(dataclasses.asdict(self))

    @property
    def stride(self) -> int:
        """Steps of the transformers per frame: between them and the codes the rate falls by it."""
        return round(self.sample_rate / math.prod(self.ratios) / self.frame_rate)

    @property
    def frame_samples(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios) * self.stride

    def _check_sizes(self):
        for name in _SIZES:
            _check_positive(name, getattr(self, name))
        for ratio in self.ratios:
            _check_positive("ratios (each)", ratio)
        for name in ("frame_rate", "max_period"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        if self.dimension % self.num_heads or self.dimension // self.num_heads % 2:
            raise ValueError(
                "dimension must be an even multiple of num_heads, for the rotary embedding, got "
                f"dimension={self.dimension} and num_heads={self.num_heads}"
            )
        if self.n_filters % self.compress:
            raise ValueError(
                f"n_filters must be divisible by compress, got n_filters={self.n_filters}, compress={self.compress}"
            )

    def _check_rates(self):
        samples = self.sample_rate / self.frame_rate
        if self.stride < 2 or self.frame_samples != samples:
            raise ValueError(
                f"a frame must be a multiple (>= 2) of the product of ratios, {math.prod(self.ratios)} samples, got "
                f"sample_rate / frame_rate = {samples:g} samples; do ratios and rates belong together?"
            )
        if self.published_ring and self.context < self.stride:
            raise ValueError(
                f"context must be >= {self.stride} steps (one frame) with published_ring, got {self.context}"
            )

    def _check_codebooks(self):
        if self.n_q_semantic >= self.n_q:
            raise ValueError(f"n_q_semantic must be < n_q = {self.n_q}, got {self.n_q_semantic}")
        if self.num_codebooks > self.n_q:
            raise ValueError(f"num_codebooks must be in 1 .. n_q = {self.n_q}, got {self.num_codebooks}")


_SIZES = (
    *("sample_rate", "dimension", "n_filters", "n_residual_layers", "kernel_size", "residual_kernel_size"),
    *("last_kernel_size", "dilation_base", "compress", "num_heads", "num_layers", "dim_feedforward", "context"),
    *("codebook_dim", "n_q", "n_q_semantic", "bins", "num_codebooks"),
)


def _check_positive(name: str, value: Any):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def _published() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(MimiConfig)}
