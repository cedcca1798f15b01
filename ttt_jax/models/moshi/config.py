"""What a Moshi is: sizes, delays, attention contexts, and where TTT goes in."""

import dataclasses
import difflib
import hashlib
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ttt_jax.files import read_json
from ttt_jax.layers.ttt import TTTConfig
from ttt_jax.models.moshi import kyutai

AttentionKind = Literal["window", "segment"]
ATTENTION_KINDS = ("window", "segment")
Design = Literal["after_attention", "before_attention", "kv_cache"]
DESIGNS = ("after_attention", "before_attention", "kv_cache")

ZERO_TOKEN = -1
"""No embedding at this position of the stream, and no loss."""

UNGENERATED_TOKEN = -2
"""Not generated yet: what streaming returns while the delays fill."""

ABSENT = -1
"""Row of a conditioner's table that stands for no value."""

MODEL_TYPES = ("moshi", "hibiki", "stt", "personaplex")


class LayerAttention(NamedTuple):
    """What the attention of one temporal layer sees; sizes in frames."""

    kind: AttentionKind
    context: int
    sinks: int


@dataclasses.dataclass(frozen=True)
class TTTInsertion:
    """TTT in some layers of the temporal transformer, as a memory beside or beyond their attention.

    The designs, of a layer whose residual branch is `h = SA(RMS(x))` without TTT:

    - "after_attention" (TTT-Video-DiT's, causal): `h = SA(RMS(x)); h + tanh(gate) * TTT(RMS(h))`.
    - "before_attention": `u = RMS(x); h = SA(u + tanh(gate) * TTT(u))`, so that attention looks up what TTT read.
    - "kv_cache": a key and value, when `context` frames have come after it, is one token that the inner model learns,
      and the attention's queries read it: `h + tanh(gate) * read(q)`. It has no projections of its own but the last.
      What a window still holds has not been learned yet; sinks are learned, too.

    Attributes:
        layers: indices of the temporal transformer's layers that get one.
        design: where TTT reads and writes, see above.
        kind: the inner model, "linear" or "mlp".
        num_heads: of the TTT layer; None takes the model's, as "kv_cache" must.
        mini_batch_size: tokens per inner-loop step.
        base_lr: inner-loop base step size; None takes the published one (1.0 linear, 0.1 mlp).
        backbone: "mamba" (shared Q/K projection, causal convolutions, output gate) or "base"; not for "kv_cache".
        attention: kind of attention in these layers.
        context: their attention context in frames; None takes the model's.
        sinks: first frames that they see for ever, beside the context; None takes the model's.
        gate_init: initial value of the gate, non-zero so that the output projection gets a gradient.
        init: of the layer in front of its output projection, which is 0: "associative", a memory from the start, or
            "published"; see `TTTLayer.associative_init`.
    """

    layers: tuple[int, ...]
    design: Design = "after_attention"
    kind: Literal["linear", "mlp"] = "linear"
    num_heads: int | None = None
    mini_batch_size: int = 16
    base_lr: float | None = None
    backbone: Literal["mamba", "base"] = "mamba"
    attention: AttentionKind = "window"
    context: int | None = None
    sinks: int | None = None
    gate_init: float = 0.1
    init: Literal["associative", "published"] = "associative"

    def __post_init__(self):
        try:
            layers: list[Any] = list(self.layers)
        except TypeError:
            layers = [None]
        if not all(isinstance(layer, int | np.integer) for layer in layers):
            raise ValueError(f"ttt.layers must be indices of layers, such as (1, 3), got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(map(int, layers)))
        _check_choice("ttt.design", self.design, DESIGNS)
        _check_choice("ttt.kind", self.kind, ("linear", "mlp"))
        _check_choice("ttt.backbone", self.backbone, ("mamba", "base"))
        _check_choice("ttt.init", self.init, ("associative", "published"))
        _check_choice("ttt.attention", self.attention, ATTENTION_KINDS)
        _check_positive("ttt.mini_batch_size", self.mini_batch_size)
        for name in ("num_heads", "context"):
            if getattr(self, name) is not None:
                _check_positive(f"ttt.{name}", getattr(self, name))
        if self.sinks is not None:
            _check_not_negative("ttt.sinks", self.sinks, "frames")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"ttt.layers must not repeat, got {self.layers}")
        if self.base_lr is not None and not (isinstance(self.base_lr, int | float | np.number) and self.base_lr > 0):
            raise ValueError(f"ttt.base_lr must be > 0, or None for the published value, got {self.base_lr!r}")
        if self.gate_init == 0:
            raise ValueError("ttt.gate_init must not be 0: neither the gate's layer nor the gate would get a gradient")


@dataclasses.dataclass(frozen=True)
class Conditioner:
    """A table of vectors for the values of one condition (Kyutai's lookup conditioner with its `sum` fuser).

    Attributes:
        name: of the condition, "description" for Hibiki.
        n_bins: rows of the table; one more is never read.
        dim: width of the table, projected to the model's.
        possible_values: the words that rows 0, 1, ... stand for; None takes any word, its row by a hash.
    """

    name: str
    n_bins: int
    dim: int
    possible_values: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.possible_values is not None:
            object.__setattr__(self, "possible_values", tuple(self.possible_values))
        for field in ("n_bins", "dim"):
            _check_positive(f"conditioners[{self.name!r}].{field}", getattr(self, field))
        values = self.possible_values or ()
        if len(set(values)) != len(values) or len(values) > self.n_bins:
            raise ValueError(
                f"conditioners[{self.name!r}].possible_values must be at most n_bins = {self.n_bins} different words, "
                f"got {values}"
            )

    def row(self, value: str | None) -> int:
        """The row of a value.

        Raises:
            ValueError: it is none of the possible values.
        """
        if value is None:
            return ABSENT
        if not isinstance(value, str):
            raise ValueError(f"condition {self.name!r} must be a word or None, got {value!r}")
        if self.possible_values is None:
            return int.from_bytes(hashlib.sha256(value.encode()).digest(), "big") % self.n_bins
        if value not in self.possible_values:
            raise ValueError(f"condition {self.name!r} must be one of {self.possible_values} or None, got {value!r}")
        return self.possible_values.index(value)


@dataclasses.dataclass(frozen=True)
class MoshiConfig:
    """Kyutai's field names with the 7B model's values as defaults, then this project's own fields.

    Attributes:
        dim: width of the temporal transformer.
        text_card: text vocabulary; token `text_card` is the initial one.
        existing_text_padding_id: text token between words.
        existing_text_end_padding_id: text token that ends a padding.
        n_q: audio streams read (the model's own, then the user's).
        dep_q: audio streams predicted by the depth transformer (the first ones); 0 is a model that only writes text.
        card: audio vocabulary per stream; token `card` is the initial one.
        num_heads: of the temporal transformer.
        num_layers: of the temporal transformer.
        hidden_scale: feed-forward size over `dim`, before gating takes its two thirds.
        context: frames that attention sees, the present one included.
        max_period: theta of the rotary embedding.
        depformer_dim: width of the depth transformer.
        depformer_dim_feedforward: its feed-forward size before gating; None is `hidden_scale * depformer_dim`.
        depformer_num_heads: of the depth transformer.
        depformer_num_layers: of the depth transformer.
        depformer_weights_per_step_schedule: weight set used by each of the dep_q steps; None gives each its own.
        depformer_low_rank_embeddings: width of the depth transformer's tables, projected to `depformer_dim`; None is
            `depformer_dim` without a projection.
        extra_heads_num_heads: linear classifiers of the temporal output, such as the voice activity of speech to text.
        extra_heads_dim: classes of each.
        conditioners: tables of the conditions whose vectors are added to every frame's input.
        model_type: what the model is for: "moshi", "hibiki" (translation), "stt" (speech to text) or "personaplex".
        delays: frames by which each of the 1 + n_q streams (text first) is delayed.
        attention: kind of the temporal attention, "window" or "segment".
        sinks: first frames that it sees for ever, beside the window or segment.
        ttt: TTT layers to insert, or None.
        dtype: of the computation; parameters, norms, softmax and states of TTT are float32.
        remat: recompute each temporal block and the depth transformer in the backward pass.
    """

    dim: int = 4096
    text_card: int = 32000
    existing_text_padding_id: int = 3
    existing_text_end_padding_id: int = 0
    n_q: int = 16
    dep_q: int = 8
    card: int = 2048
    num_heads: int = 32
    num_layers: int = 32
    hidden_scale: float = 4.125
    context: int = 3000
    max_period: float = 10000
    depformer_dim: int = 1024
    depformer_dim_feedforward: int | None = 4224
    depformer_num_heads: int = 16
    depformer_num_layers: int = 6
    depformer_weights_per_step_schedule: tuple[int, ...] | None = None
    depformer_low_rank_embeddings: int | None = None
    extra_heads_num_heads: int = 0
    extra_heads_dim: int = 6
    conditioners: tuple[Conditioner, ...] = ()
    model_type: str = "moshi"
    delays: tuple[int, ...] = (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
    attention: AttentionKind = "window"
    sinks: int = 0
    ttt: TTTInsertion | None = None
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        object.__setattr__(self, "delays", tuple(self.delays))
        object.__setattr__(self, "conditioners", tuple(self.conditioners))
        if self.depformer_weights_per_step_schedule is not None:
            schedule = tuple(self.depformer_weights_per_step_schedule)
            object.__setattr__(self, "depformer_weights_per_step_schedule", schedule)
        self._check_sizes()
        self._check_streams()
        self._check_conditioners()
        self._check_ttt()

    @classmethod
    def from_kyutai(cls, config: Mapping[str, Any] | str | os.PathLike) -> "MoshiConfig":
        """From the `config.json` of a Kyutai checkpoint, as a mapping or a path; missing fields keep the 7B values.

        Raises:
            ValueError: a field is unknown (with a suggestion), or holds a value this model does not implement.
        """
        raw = dict(config) if isinstance(config, Mapping) else read_json(config)
        chosen = kyutai.read_fields(raw, _kyutais(dataclasses.asdict(cls())))
        chosen["conditioners"] = tuple(Conditioner(**fields) for fields in kyutai.read_conditioners(raw))
        return cls(**chosen)

    def to_kyutai(self) -> dict[str, Any]:
        """The `config.json` that Kyutai's code reads, in full; it has no fields for TTT, segments, sinks and dtypes."""
        return kyutai.write_fields(_kyutais(dataclasses.asdict(self)))

    @property
    def num_streams(self) -> int:
        """Streams read: text and n_q of audio."""
        return 1 + self.n_q

    @property
    def user_q(self) -> int:
        """Audio streams of the user, the last ones; PersonaPlex predicts them too, they may be given all the same."""
        return self.n_q // 2 if self.model_type == "personaplex" else self.n_q - self.dep_q

    @property
    def voice_q(self) -> int:
        """Audio streams of the model's own voice, the first ones."""
        return self.n_q - self.user_q

    @property
    def max_delay(self) -> int:
        """Frames between the first call of a stream and its first output."""
        return max(self.delays)

    @property
    def initial_tokens(self) -> tuple[int, ...]:
        """The token each stream starts with, text first."""
        return (self.text_card,) + (self.card,) * self.n_q

    @property
    def depth_schedule(self) -> tuple[int, ...]:
        """Weight set of each depth step."""
        return self.depformer_weights_per_step_schedule or tuple(range(self.dep_q))

    @property
    def text_padding_ids(self) -> tuple[int, int]:
        """Text tokens that stand for "no word here"."""
        return (self.existing_text_padding_id, self.existing_text_end_padding_id)

    @property
    def ttt_layers(self) -> tuple[int, ...]:
        """The temporal layers that have a TTT layer."""
        return () if self.ttt is None else self.ttt.layers

    @property
    def ttt_config(self) -> TTTConfig | None:
        """The config of its TTT layers, None without."""
        ttt = self.ttt
        if ttt is None or not ttt.layers:
            return None
        backbone = "base" if ttt.design == "kv_cache" else ttt.backbone
        options: dict[str, Any] = {"mini_batch_size": ttt.mini_batch_size, "base_lr": ttt.base_lr}
        options |= {"backbone": backbone, "liftable_token_scale": True}
        return TTTConfig.ttt_lm(ttt.kind, self.dim, ttt.num_heads or self.num_heads, **options)

    @property
    def longest_context(self) -> int:
        """Frames that the attention of the layer that sees most sees, without sinks."""
        return max(self.layer_attention(layer).context for layer in range(self.num_layers))

    def layer_ttt(self, layer: int) -> TTTConfig | None:
        """The config of the TTT layer of temporal layer `layer`, None where it has none."""
        return self.ttt_config if layer in self.ttt_layers else None

    def layer_attention(self, layer: int) -> LayerAttention:
        """Kind, context and sinks of the attention of temporal layer `layer`."""
        ttt = self.ttt
        if ttt is None or layer not in ttt.layers:
            return LayerAttention(self.attention, self.context, self.sinks)
        sinks = self.sinks if ttt.sinks is None else ttt.sinks
        return LayerAttention(ttt.attention, ttt.context or self.context, sinks)

    def _check_sizes(self):
        names = ("dim", "text_card", "n_q", "card", "num_heads", "num_layers", "context")
        names += ("depformer_dim", "depformer_num_heads", "depformer_num_layers", "extra_heads_dim")
        for name in names:
            _check_positive(name, getattr(self, name))
        _check_not_negative("dep_q", self.dep_q, "streams")
        _check_not_negative("extra_heads_num_heads", self.extra_heads_num_heads, "heads")
        for name in ("existing_text_padding_id", "existing_text_end_padding_id"):
            _check_not_negative(name, getattr(self, name), "a text token")
        _check_not_negative("sinks", self.sinks, "frames")
        for name in ("hidden_scale", "max_period"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        for name in ("depformer_dim_feedforward", "depformer_low_rank_embeddings"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        _check_divisible("dim", self.dim, "num_heads", self.num_heads)
        _check_divisible("depformer_dim", self.depformer_dim, "depformer_num_heads", self.depformer_num_heads)
        if self.dim // self.num_heads % 2:
            raise ValueError(f"dim / num_heads must be even for the rotary embedding, got {self.dim // self.num_heads}")
        _check_choice("model_type", self.model_type, MODEL_TYPES)
        _check_choice("attention", self.attention, ATTENTION_KINDS)
        _check_choice("dtype", self.dtype, ("float32", "bfloat16", "float64"))

    def _check_streams(self):
        if self.dep_q > self.n_q:
            raise ValueError(f"dep_q must be <= n_q = {self.n_q}: predicted streams are read back, got {self.dep_q}")
        if len(self.delays) != self.num_streams:
            raise ValueError(
                f"delays must hold n_q + 1 = {self.num_streams} values (text first), "
                f"got {len(self.delays)}: {self.delays}"
            )
        if min(self.delays) < 0:
            raise ValueError(f"delays must be >= 0 frames, got {self.delays}")
        schedule = self.depformer_weights_per_step_schedule
        if schedule is None:
            return
        if len(schedule) != self.dep_q:
            raise ValueError(
                f"depformer_weights_per_step_schedule must hold dep_q = {self.dep_q} values, got {len(schedule)}"
            )
        if set(schedule) != set(range(len(set(schedule)))):
            raise ValueError(
                f"depformer_weights_per_step_schedule must use every weight set 0 .. max, got {schedule}: unused sets "
                "would never be trained"
            )

    def _check_conditioners(self):
        names = [conditioner.name for conditioner in self.conditioners]
        if len(set(names)) != len(names):
            raise ValueError(f"conditioners must have different names, got {names}")

    def _check_ttt(self):
        if self.ttt is None:
            return
        bad = [layer for layer in self.ttt.layers if not 0 <= layer < self.num_layers]
        if bad:
            raise ValueError(f"ttt.layers must lie in 0 .. {self.num_layers - 1} (num_layers - 1), got {bad}")
        heads = self.ttt.num_heads or self.num_heads
        if self.ttt.design == "kv_cache" and heads != self.num_heads:
            raise ValueError(
                f"ttt.num_heads must be None or num_heads = {self.num_heads} with ttt.design='kv_cache', which learns "
                f"the attention's keys and values, got {heads}"
            )
        _check_divisible("dim", self.dim, "ttt.num_heads", heads)
        if self.dim // heads % 2:
            raise ValueError(
                f"ttt.num_heads must leave heads of an even size for the rotary embedding, "
                f"got dim / ttt.num_heads = {self.dim} / {heads} = {self.dim // heads}"
            )


def check_codes(config: MoshiConfig, codes) -> None:
    """Checks codes `[B, 1 + n_q, T]`: integers, text in [-2, text_card], audio in [-2, card].

    -1 is "no token", -2 "to be generated", the cardinality itself the initial token.

    Raises:
        ValueError: wrong shape or dtype, or a value out of range, naming row, stream, position, value and range.
    """
    check_codes_shape(config, codes)
    codes = np.asarray(codes)
    highest = np.asarray(config.initial_tokens)[None, :, None]
    bad = np.argwhere((codes < UNGENERATED_TOKEN) | (codes > highest))
    if len(bad):
        row, stream, position = (int(i) for i in bad[0])
        name = "text" if stream == 0 else f"audio codebook {stream - 1}"
        raise ValueError(
            f"codes[{row}, {stream}, {position}] = {codes[row, stream, position]} is outside "
            f"[{UNGENERATED_TOKEN}, {config.initial_tokens[stream]}] of stream {stream} ({name}), "
            f"at position {position}; {len(bad)} such values in all. Was the data made with another codec or tokenizer?"
        )


def check_codes_shape(config: MoshiConfig, codes) -> None:
    """The part of `check_codes` that also works on traced arrays."""
    streams = f"text, then n_q = {config.n_q} audio streams"
    check_tokens_shape("codes", codes, (None, config.num_streams, None), streams)


def check_tokens_shape(name: str, tokens, shape: tuple[int | None, int, int | None], streams: str) -> None:
    """Checks that `tokens` are integers of shape `[B, K, T]`, where None in `shape` fits any size.

    Raises:
        ValueError: wrong type, shape or dtype, naming `name` and what its `streams` are.
    """
    if not hasattr(tokens, "shape"):
        raise ValueError(f"{name} must be an array, got {type(tokens).__name__}; make it one with jnp.asarray")
    got = tuple(tokens.shape)
    if len(got) != 3 or any(size not in (None, n) for size, n in zip(shape, got, strict=True)):
        expected = ", ".join(letter if size is None else str(size) for letter, size in zip("BKT", shape, strict=True))
        raise ValueError(f"{name} must have shape [{expected}] ({streams}), got {got}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} must be integers (int32), got {tokens.dtype}")


def _kyutais(fields: dict[str, Any]) -> dict[str, Any]:
    """Without this project's own fields."""
    own = ("attention", "sinks", "ttt", "dtype", "remat")
    return {name: value for name, value in fields.items() if name not in own}


def _check_positive(name: str, value: Any):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def _check_not_negative(name: str, value: Any, unit: str):
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int >= 0 ({unit}), got {value!r}")


def _check_divisible(name: str, value: int, by: str, divisor: int):
    if value % divisor:
        raise ValueError(f"{name} must be divisible by {by}, got {name}={value} and {by}={divisor}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]):
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{hint}")
