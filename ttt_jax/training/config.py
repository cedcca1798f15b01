"""The typed configuration of a training run, made once from a ConfigDict at the boundary."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ttt_jax.checkpoint import has_checkpoint
from ttt_jax.config import from_mapping
from ttt_jax.data.tokens import TokenInfo
from ttt_jax.files import read_json, write_atomically
from ttt_jax.models.infill import InfillConfig
from ttt_jax.models.moshi import MoshiConfig
from ttt_jax.models.video_dit import VideoDiTConfig
from ttt_jax.training import distributed

ObjectiveName = Literal["next_token", "infill", "diffusion"]
Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES = ("cosine", "linear", "constant")
TrainMode = Literal["all", "qkvo", "ttt", "lora"]
TRAIN_MODES = ("all", "qkvo", "ttt", "lora")
GROUPS = ("base", "ttt", "gates")

_DTYPE = "{}, as precision.activations sets it (leave model.dtype out)"

_ONLY_MOSHI = "another value: there is such only for objective='next_token'"

RESUMABLE = ("checkpoint", "log", "validation", "mesh")
"""Sections that may differ when a run is resumed: they do not change the parameters, `mesh` but for rounding."""


def _require(**conditions: tuple[bool, str, Any]) -> None:
    for name, (holds, expected, value) in conditions.items():
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class Stage:
    """An early part of the training, `steps` updates long, with sizes of its own; state is not carried out of it.

    Attributes:
        steps: Updates.
        num_frames: As in `DataConfig`.
        recording_frames: As in `DataConfig`.
    """

    steps: int
    num_frames: int
    recording_frames: int | None = None

    def __post_init__(self):
        _require(steps=(self.steps >= 1, "at least 1", self.steps))
        _check_frames(self.num_frames, self.recording_frames)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What an update reads of the dataset in `directory`: `batch_size` rows of `num_frames` frames.

    Attributes:
        directory: Of the token dataset.
        num_frames: Frames of a row in one update, or in each of `gradient_chunks`.
        batch_size: Rows.
        mode: "crops": random crops, each a fresh start. "follow": each row walks through one recording after the other,
            chunk by chunk, with its attention caches and TTT states carried and reset where a recording starts.
        gradient_chunks: When following, chunks per update. Gradients flow through all of them and stop at the update's
            first frame; activations of one chunk at a time are in memory.
        recording_frames: When following, recordings are cut into pieces of so many frames; None leaves them whole.
        stages: A curriculum of shorter chunks or recordings before these sizes take over.
    """

    directory: str
    num_frames: int = 512
    batch_size: int = 4
    mode: Literal["crops", "follow"] = "crops"
    gradient_chunks: int = 1
    recording_frames: int | None = None
    stages: tuple[Stage, ...] = ()

    def __post_init__(self):
        _check_frames(self.num_frames, self.recording_frames)
        _require(
            batch_size=(self.batch_size >= 1, "at least 1", self.batch_size),
            gradient_chunks=(self.gradient_chunks >= 1, "at least 1", self.gradient_chunks),
        )
        if self.mode == "crops":
            pieces = [self.recording_frames, *(stage.recording_frames for stage in self.stages)]
            _require(
                gradient_chunks=(self.gradient_chunks == 1, "1 unless mode is 'follow'", self.gradient_chunks),
                recording_frames=(not any(pieces), "None unless mode is 'follow'", pieces),
            )


@dataclasses.dataclass(frozen=True)
class VideoDataConfig:
    """What an update reads of the dataset of videos in `directory`: `batch_size` of them, which all have these sizes.

    Attributes:
        directory: Of the dataset.
        batch_size: Rows, a video each.
        num_frames: Latent frames of a video.
        num_scenes: Texts of a video.
        text_length: Tokens of a text.
        height: Rows of a latent.
        width: Columns of a latent.
    """

    directory: str
    batch_size: int = 4
    num_frames: int = 13
    num_scenes: int = 1
    text_length: int = 498
    height: int = 60
    width: int = 90

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require(**{field.name: (field.name == "directory" or value >= 1, "at least 1", value)})


def _check_frames(num_frames: int, recording_frames: int | None) -> None:
    _require(
        num_frames=(num_frames >= 2, "at least 2 frames", num_frames),
        recording_frames=(recording_frames is None or recording_frames >= 2, "at least 2 frames", recording_frames),
    )


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """How one group of parameters is trained; None takes the run's value.

    Attributes:
        learning_rate_factor: Times the run's `learning_rate`, the peak of this group.
        schedule: See `OptimizerConfig`.
        warmup_steps: Updates until the group's peak.
        final_learning_rate_fraction: Learning rate after the last update, as a fraction of the group's peak.
        weight_decay: Of the group's matrices.
    """

    learning_rate_factor: float = 1.0
    schedule: Schedule | None = None
    warmup_steps: int | None = None
    final_learning_rate_fraction: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        factor, final = self.learning_rate_factor, self.final_learning_rate_fraction
        _require(
            learning_rate_factor=(factor > 0, "more than 0 (optimizer.train says what is frozen)", factor),
            schedule=(self.schedule in (None, *SCHEDULES), f"one of {SCHEDULES}", self.schedule),
            warmup_steps=(self.warmup_steps is None or self.warmup_steps >= 0, "0 or more updates", self.warmup_steps),
            final_learning_rate_fraction=(final is None or 0 <= final <= 1, "a fraction in [0, 1]", final),
            weight_decay=(self.weight_decay is None or self.weight_decay >= 0, "0 or more", self.weight_decay),
        )


@dataclasses.dataclass(frozen=True)
class GroupsConfig:
    """The groups: `ttt`, the inserted TTT layers and their norms; `gates`, in front of them; `base`, all the rest."""

    base: GroupConfig = GroupConfig()
    ttt: GroupConfig = GroupConfig()
    gates: GroupConfig = GroupConfig()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the learning rate rises linearly over `warmup_steps`, then follows the schedule.

    Attributes:
        learning_rate: Peak learning rate.
        steps: Updates in all, warm-up included.
        warmup_steps: Updates until the peak.
        schedule: After the peak: by a "cosine" or "linear" to the final fraction at `steps`, or "constant".
        final_learning_rate_fraction: Learning rate after the last update, as a fraction of the peak; a constant
            schedule ignores it.
        clip_norm: Gradients are scaled down to this L2 norm, over all that is trained.
        accumulate: Groups of rows that are read one after the other to save memory; the update is the same.
        train: What changes: "all"; "qkvo" (the temporal attention's projections, TTT and gates); "ttt" (TTT and gates);
            "lora" (low-rank factors beside Moshi's linear layers, see `LoRAConfig`, and TTT and gates).
        groups: What differs between groups of parameters.
    """

    learning_rate: float = 1e-3
    steps: int = 1000
    warmup_steps: int = 100
    schedule: Schedule = "cosine"
    final_learning_rate_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulate: int = 1
    train: TrainMode = "all"
    groups: GroupsConfig = GroupsConfig()

    def __post_init__(self):
        final = self.final_learning_rate_fraction
        _require(
            learning_rate=(self.learning_rate > 0, "more than 0", self.learning_rate),
            steps=(self.steps >= 1, "at least 1", self.steps),
            warmup_steps=(0 <= self.warmup_steps < self.steps, f"0 <= warmup_steps < {self.steps}", self.warmup_steps),
            schedule=(self.schedule in SCHEDULES, f"one of {SCHEDULES}", self.schedule),
            final_learning_rate_fraction=(0 <= final <= 1, "a fraction in [0, 1]", final),
            b1=(0 <= self.b1 < 1, "a decay in [0, 1)", self.b1),
            b2=(0 <= self.b2 < 1, "a decay in [0, 1)", self.b2),
            weight_decay=(self.weight_decay >= 0, "0 or more", self.weight_decay),
            clip_norm=(self.clip_norm > 0, "more than 0", self.clip_norm),
            accumulate=(self.accumulate >= 1, "at least 1", self.accumulate),
            train=(self.train in TRAIN_MODES, f"one of {TRAIN_MODES}", self.train),
        )
        for name in GROUPS:
            warmup = getattr(self.groups, name).warmup_steps or 0
            in_time = (warmup < self.steps, f"less than steps = {self.steps}", warmup)
            _require(**{f"groups.{name}.warmup_steps": in_time})

    def group(self, name: str) -> GroupConfig:
        """The settings of group `name`, with the run's in place of each None."""
        group = getattr(self.groups, name)
        own = {field: value for field, value in vars(group).items() if value is not None}
        return GroupConfig(**{field: getattr(self, field) for field in vars(group) if field not in own}, **own)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank factors, used when `optimizer.train` is "lora": `W + scaling * A B` with `rank` columns in A."""

    rank: int = 128
    scaling: float = 2.0

    def __post_init__(self):
        _require(
            rank=(self.rank >= 1, "at least 1", self.rank),
            scaling=(self.scaling > 0, "more than 0", self.scaling),
        )


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which numbers are of which dtype; what is not named here is float32 always: loss, gradients, moments, TTT state.

    Attributes:
        parameters: As stored and updated; the layers cast them to the activations' dtype where they multiply.
        frozen: Of the parameters that `optimizer.train` leaves alone, as stored.
        activations: Sets `model.dtype`.
    """

    parameters: Literal["float32"] = "float32"
    frozen: Literal["float32", "bfloat16"] = "float32"
    activations: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        _require(
            parameters=(self.parameters == "float32", "float32", self.parameters),
            frozen=(self.frozen in ("float32", "bfloat16"), "float32 or bfloat16", self.frozen),
            activations=(self.activations in ("float32", "bfloat16"), "float32 or bfloat16", self.activations),
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights inside the audio and text cross-entropies, as moshi-finetune's."""

    first_codebook_weight: float = 100.0
    text_padding_weight: float = 0.5

    def __post_init__(self):
        _require(
            first_codebook_weight=(self.first_codebook_weight > 0, "more than 0", self.first_codebook_weight),
            text_padding_weight=(self.text_padding_weight >= 0, "0 or more", self.text_padding_weight),
        )


@dataclasses.dataclass(frozen=True)
class DiffusionLossConfig:
    """Of `text_dropout` of all rows the model sees the empty text in every scene, which guidance needs."""

    text_dropout: float = 0.1

    def __post_init__(self):
        _require(text_dropout=(0 <= self.text_dropout <= 1, "a probability in [0, 1]", self.text_dropout))


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep. The last step and a SIGTERM always save.

    Attributes:
        every_steps: Updates between checkpoints.
        every_seconds: Also save when this many seconds went by since the last one; 0 turns it off.
        keep: The newest checkpoints that are kept.
        keep_every_steps: Checkpoints at its multiples are kept for good; 0 turns it off.
    """

    every_steps: int = 1000
    every_seconds: float = 600.0
    keep: int = 3
    keep_every_steps: int = 0

    def __post_init__(self):
        _require(
            every_steps=(self.every_steps >= 1, "at least 1", self.every_steps),
            every_seconds=(self.every_seconds >= 0, "0 (off) or more seconds", self.every_seconds),
            keep=(self.keep >= 2, "at least 2, so that a damaged checkpoint has one before it", self.keep),
            keep_every_steps=(self.keep_every_steps >= 0, "0 (off) or more", self.keep_every_steps),
        )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run tells, and every how many updates; 0 is never.

    Attributes:
        every_steps: Losses to metrics.jsonl.
        diagnostics_every_steps: Diagnostics of the TTT layers to metrics.jsonl, on what an update reads first.
        tensorboard: Also write all of it to the workdir's `tensorboard` folder.
        audio_every_steps: A short continuation of a validation recording to TensorBoard. Compiles the stream each time.
    """

    every_steps: int = 10
    diagnostics_every_steps: int = 100
    tensorboard: bool = True
    audio_every_steps: int = 0

    def __post_init__(self):
        every, audio = self.diagnostics_every_steps, self.audio_every_steps
        with_board = audio == 0 or (audio > 0 and self.tensorboard)
        _require(
            every_steps=(self.every_steps >= 1, "at least 1", self.every_steps),
            diagnostics_every_steps=(every >= 0, "0 (off) or more", every),
            audio_every_steps=(with_board, "0 (off), or more with tensorboard=True", audio),
        )


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Loss on the same `num_batches` crops of the validation split every `every_steps` updates (0: never)."""

    every_steps: int = 500
    num_batches: int = 2

    def __post_init__(self):
        _require(
            every_steps=(self.every_steps >= 0, "0 (off) or more", self.every_steps),
            num_batches=(self.num_batches >= 1, "at least 1", self.num_batches),
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices of all processes are laid out; -1 takes those that are left.

    Runs on the same mesh are equal bit by bit; on another one sums are taken in another order.

    Attributes:
        data: Groups of devices that each hold the parameters once and train on rows of their own.
        fsdp: Devices that share one copy of parameters and optimizer, and train on rows of their own.
        tensor: Devices that share heads and hidden units, and train on the same rows.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        for name, size in dataclasses.asdict(self).items():
            _require(**{name: (size == -1 or size >= 1, "at least 1, or -1 for the devices left", size)})
        _require(mesh=(sizes.count(-1) <= 1, "at most one axis of -1", sizes))


@dataclasses.dataclass(frozen=True)
class InfillDataConfig:
    """What an update reads of the dataset in `directory`: random crops with masked spans.

    Attributes:
        directory: Of the token dataset.
        num_frames: Frames of a crop.
        batch_size: Crops.
        masked_share: Of the crop's frames that are masked.
        shortest_span: Frames of a masked span, at least.
        longest_span: Frames of a masked span, at most.
    """

    directory: str
    num_frames: int = 512
    batch_size: int = 4
    masked_share: float = 0.3
    shortest_span: int = 16
    longest_span: int = 96

    def __post_init__(self):
        shortest, longest = self.shortest_span, self.longest_span
        in_order = 1 <= shortest <= longest <= self.num_frames
        _require(
            num_frames=(self.num_frames >= 2, "at least 2 frames", self.num_frames),
            batch_size=(self.batch_size >= 1, "at least 1", self.batch_size),
            masked_share=(0 < self.masked_share < 1, "a share in (0, 1)", self.masked_share),
            longest_span=(in_order, f"1 <= shortest_span = {shortest} <= longest_span <= num_frames", longest),
        )


@dataclasses.dataclass(frozen=True)
class InfillLossConfig:
    """Nothing to choose: every code of a masked frame counts alike."""


class Sections(NamedTuple):
    """The types of the sections that every objective has its own of."""

    model: type  # has `dtype`
    data: type  # has `directory` and `batch_size`
    loss: type


SECTIONS: dict[str, Sections] = {
    "next_token": Sections(MoshiConfig, DataConfig, LossConfig),
    "infill": Sections(InfillConfig, InfillDataConfig, InfillLossConfig),
    "diffusion": Sections(VideoDiTConfig, VideoDataConfig, DiffusionLossConfig),
}
"""By objective."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A whole training run; with the dataset and `init_from` it determines the trained parameters.

    Attributes:
        data: What an update reads: the objective's type in `SECTIONS`, such as `DataConfig`.
        model: The objective's type, such as `MoshiConfig`; None: that with its defaults. Its `dtype` is set by
            `precision.activations`.
        objective: What the model learns: "next_token", the next frame of a Moshi; "infill", a recording's masked spans;
            "diffusion", the velocity of a noisy video.
        seed: Of fresh parameters and of the order of the data.
        init_from: Directory of the model to start from, as `ttt_jax.load` takes it; "" starts from fresh parameters.
            TTT layers and gates that it does not have are inserted fresh, without effect on its logits.
        optimizer: What changes, and how.
        lora: Low-rank factors, when `optimizer.train` asks for them.
        precision: Dtypes.
        loss: What it is made of: the objective's type, such as `LossConfig`; None: that with its defaults.
        checkpoint: When to save.
        log: What goes to metrics.jsonl.
        validation: How often, and on how much.
    """

    data: Any
    model: Any = None
    objective: ObjectiveName = "next_token"
    seed: int = 0
    init_from: str = ""
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoRAConfig = LoRAConfig()
    precision: Precision = Precision()
    loss: Any = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    validation: ValidationConfig = ValidationConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        self._check_sections()
        groups, rows = self.optimizer.accumulate, self.data.batch_size
        dtype, default = self.precision.activations, type(self.model).dtype
        is_possible = self.model.ttt_config is not None or self.optimizer.train != "ttt"
        _require(
            seed=(0 <= self.seed < 2**31, "a non-negative 31-bit integer", self.seed),
            **{"optimizer.accumulate": (rows % groups == 0, f"a divisor of data.batch_size = {rows}", groups)},
            **{
                "optimizer.train": (
                    is_possible,
                    "something else than 'ttt' without model.ttt or model.ssm_layer",
                    self.optimizer.train,
                )
            },
            **{"model.dtype": (self.model.dtype in (default, dtype), _DTYPE.format(dtype), self.model.dtype)},
        )
        object.__setattr__(self, "model", dataclasses.replace(self.model, dtype=dtype))

    @classmethod
    def field_types(cls, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """The types of the objective's own sections, as `from_mapping` asks for them."""
        sections = SECTIONS.get(mapping.get("objective", cls.objective), SECTIONS[cls.objective])
        optional = {name: kind | None for name, kind in sections._asdict().items() if name != "data"}
        return {"data": sections.data} | optional

    def _check_sections(self) -> None:
        _require(objective=(self.objective in SECTIONS, f"one of {tuple(SECTIONS)}", self.objective))
        for name, kind in SECTIONS[self.objective]._asdict().items():
            if getattr(self, name) is None and name != "data":
                object.__setattr__(self, name, kind())
            section = getattr(self, name)
            expected = f"a {kind.__name__}, as objective={self.objective!r} has it"
            _require(**{name: (isinstance(section, kind), expected, section)})
        is_moshi = isinstance(self.model, MoshiConfig)
        _require(
            **{"optimizer.train": (is_moshi or self.optimizer.train != "lora", _ONLY_MOSHI, self.optimizer.train)},
            **{"log.audio_every_steps": (is_moshi or not self.log.audio_every_steps, _ONLY_MOSHI, "more than 0")},
        )


def with_vocabulary(model: Mapping[str, Any], info: TokenInfo) -> MoshiConfig:
    """The model's config with its streams and vocabularies taken from the dataset.

    Args:
        model: The `model` section of the experiment's config.
        info: The dataset's description. Its `num_codebooks` are per speaker; a model reads both speakers.

    Raises:
        ValueError: The section names a value that contradicts the dataset.
    """
    vocabulary = {
        "n_q": 2 * info.num_codebooks,
        "dep_q": info.num_codebooks,
        "card": info.card,
        "text_card": info.text_card,
        "existing_text_padding_id": info.text_padding_id,
        "existing_text_end_padding_id": info.end_of_padding_id,
    }
    return _with_dataset(MoshiConfig, model, vocabulary)


def infill_with_vocabulary(model: Mapping[str, Any], info: TokenInfo) -> InfillConfig:
    """The same for the model that fills spans, which hears both speakers.

    Raises:
        ValueError: The section names a value that contradicts the dataset.
    """
    vocabulary = {"num_codebooks": 2 * info.num_codebooks, "card": info.card, "text_card": info.text_card}
    return _with_dataset(InfillConfig, model, vocabulary)


def _with_dataset[T](kind: type[T], model: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> T:
    for name, value in vocabulary.items():
        if name in model and model[name] != value:
            raise ValueError(
                f"config.model.{name}: the dataset has {value}, the config says {model[name]!r}. "
                "Leave it out of the config: it is read from the dataset."
            )
    return from_mapping(kind, {**model, **vocabulary}, "config.model")


def claim_workdir(workdir: pathlib.Path, config: ExperimentConfig) -> None:
    """Lets the first process write `config.json` into `workdir`, or checks that the one there is the same experiment.

    Sections named in `RESUMABLE` may differ; the file then takes the new values. While there is no finished checkpoint
    there is nothing to go on with, and any config may take the place of the one there.

    Raises:
        ValueError: The directory belongs to another experiment; lists the fields that differ.
    """
    path = workdir / "config.json"
    new = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists() and has_checkpoint(workdir):
        old = _with_fields_of_today(read_json(path))
        differing = [d for d in _differences(old, new) if not d.startswith(RESUMABLE)]
        if differing:
            lines = "\n  ".join(differing)
            raise ValueError(
                f"--workdir={workdir} was made by another config. Differing fields (there -> now):\n  {lines}\n"
                f"Use a new --workdir, or restore these values; only {', '.join(RESUMABLE)} may change on resume."
            )
    if distributed.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(new, indent=2) + "\n")


def _with_fields_of_today(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what it means where it lacks fields, since it was written before there were such."""
    config = {"objective": ExperimentConfig.objective, **config}
    if config["model"].get("ttt"):
        ttt = {"design": "after_attention", "init": "published", **config["model"]["ttt"]}
        config["model"] = {**config["model"], "ttt": ttt}
    return config


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
