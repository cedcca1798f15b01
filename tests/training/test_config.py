import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from configs import audio_infill, conversations, moshi_7b_ttt, pairs, quiz
from ttt_jax.config import from_mapping
from ttt_jax.data.tokens import TokenInfo
from ttt_jax.models.moshi import Moshi, MoshiConfig
from ttt_jax.training.config import (
    GROUPS,
    ExperimentConfig,
    claim_workdir,
    infill_with_vocabulary,
    with_vocabulary,
)
from ttt_jax.training.experiment import run
from ttt_jax.training.initial import initial_parameters
from ttt_jax.training.objective import objective_type
from ttt_jax.training.parameters import group_of, is_trained

INFO = TokenInfo("codec2", 12.5, 8000, num_codebooks=8, card=512, text_card=300)


def make(**sections) -> ExperimentConfig:
    return from_mapping(ExperimentConfig, {"data": {"directory": "somewhere"}, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"lerning_rate": 1.0}}, r"config\.optimizer\.lerning_rate: .*`learning_rate`"),
        ({"optimizer": {"steps": -1}}, r"config\.optimizer: steps: expected at least 1, got -1"),
        ({"optimizer": {"steps": 10, "warmup_steps": 10}}, r"warmup_steps: expected 0 <= warmup_steps < 10, got 10"),
        ({"optimizer": {"learning_rate": float("nan")}}, r"learning_rate: expected more than 0, got nan"),
        ({"model": {"ttt": {"layers": (1,), "mini_batch_size": 0}}}, r"config\.model\.ttt: .*mini_batch_size"),
        ({"model": {"dim": 65, "num_heads": 2}}, r"config\.model: .*num_heads"),
        (
            {"model": {"dim": 32, "num_heads": 2, "ttt": {"layers": (1,), "num_heads": 32}}},
            r"config\.model: ttt\.num_heads",
        ),
        ({"model": {"ttt": {"layers": (1,), "base_lr": -1}}}, r"config\.model\.ttt: ttt\.base_lr must be > 0"),
        ({"model": {"ttt": {"layer": (1,)}}}, r"config\.model\.ttt\.layer: .*`layers`"),
        ({"data": {"directory": "x", "num_frames": 0}}, r"config\.data: num_frames: expected at least 2 frames, got 0"),
        ({"checkpoint": {"keep": 1}}, r"keep: expected at least 2"),
        ({"log": {"tensorboard": False, "audio_every_steps": 5}}, r"audio_every_steps: .*with tensorboard=True, got 5"),
        ({"modle": {}}, r"config\.modle: .*`model`"),
        (
            {"optimizer": {"train": "ttt"}},
            r"config: optimizer\.train: expected .*without model\.ttt",
        ),
        (
            {"model": {"dtype": "bfloat16"}},
            r"config: model\.dtype: expected float32, as precision",
        ),
        ({"precision": {"activations": "float16"}}, r"config\.precision\.activations: .*'bfloat16'.*'float16'"),
        ({"precision": {"frozen": "int8"}}, r"config\.precision\.frozen: .*'bfloat16'.*'int8'"),
        ({"precision": {"parameters": "bfloat16"}}, r"config\.precision\.parameters: .*'float32'.*'bfloat16'"),
        ({"lora": {"rank": 0}}, r"config\.lora: rank: expected at least 1, got 0"),
        ({"objective": "next_tokn"}, r"config\.objective: expected one of \['next_token'.*, got 'next_tokn'"),
        ({"seed": -1}, r"config: seed: expected a non-negative"),
    ],
)
def test_a_bad_field_is_named(sections, message):
    with pytest.raises(ValueError, match=message):
        make(**sections)


def test_a_wrong_type_is_named():
    with pytest.raises(TypeError, match=r"config\.optimizer\.steps: expected int, got '100' \(str\)"):
        make(optimizer={"steps": "100"})


def test_the_vocabulary_comes_from_the_dataset():
    model = with_vocabulary({"dim": 64, "num_heads": 2, "text_card": 300}, INFO)
    assert (model.n_q, model.dep_q, model.card, model.text_card) == (16, 8, 512, 300)
    with pytest.raises(ValueError, match=r"config\.model\.card: the dataset has 512, the config says 2048"):
        with_vocabulary({"card": 2048}, INFO)
    with pytest.raises(ValueError, match=r"config\.model\.dep_q: the dataset has 8, the config says 4"):
        with_vocabulary({"dep_q": 4}, INFO)


def test_a_start_that_came_to_nothing_does_not_claim_the_workdir(tmp_path):
    claim_workdir(tmp_path, make(seed=1))
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    claim_workdir(tmp_path, make(seed=2))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2
    (tmp_path / "checkpoints" / "7").mkdir()
    with pytest.raises(ValueError, match="seed: 2 -> 3"):
        claim_workdir(tmp_path, make(seed=3))


def test_a_workdir_with_a_checkpoint_belongs_to_one_experiment(tmp_path):
    config = make()
    claim_workdir(tmp_path, config)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    logging_only = make(log={"every_steps": 3}, checkpoint={"keep": 7})
    claim_workdir(tmp_path, logging_only)
    assert json.loads((tmp_path / "config.json").read_text())["checkpoint"]["keep"] == 7
    other = make(optimizer={"learning_rate": 0.5}, model={"ttt": {"layers": (1,)}})
    with pytest.raises(ValueError, match="made by another config") as error:
        claim_workdir(tmp_path, other)
    assert "optimizer.learning_rate: 0.001 -> 0.5" in str(error.value)
    assert "model.ttt: None -> {'layers': [1]" in str(error.value)
    assert "checkpoint" not in str(error.value).split("Use a new")[0]
    claim_workdir(tmp_path, dataclasses.replace(config))


def test_infill_has_sections_of_its_own(dataset):
    data = {"directory": str(dataset), "num_frames": 32, "longest_span": 16, "shortest_span": 4}
    mapping = {"objective": "infill", "data": data, "model": {"dim": 16, "num_heads": 2}}
    config = objective_type(from_mapping(ExperimentConfig, mapping)).with_dataset(
        from_mapping(ExperimentConfig, mapping), mapping["model"]
    )
    assert (config.model.dim, config.model.num_codebooks, config.model.card, config.model.text_card) == (16, 16, 20, 20)
    for section, changed, message in (
        (
            "data",
            {"longest_span": 64},
            r"longest_span: expected 1 <= shortest_span = 4 <= longest_span <= num_frames, got",
        ),
        ("data", {"masked_share": 1.0}, r"masked_share: expected a share in \(0, 1\), got 1\.0"),
        ("data", {"mode": "follow"}, r"config\.data\.mode"),
        ("model", {"ssm_layer": None}, r"optimizer\.train: expected something else than 'ttt' without model\.ttt or"),
    ):
        wrong = mapping | {section: mapping[section] | changed, "optimizer": {"train": "ttt"}}
        with pytest.raises((ValueError, TypeError), match=message):
            from_mapping(ExperimentConfig, wrong)
    with pytest.raises(ValueError, match=r"config\.model\.card: the dataset has 20, the config says 2048"):
        objective_type(config).with_dataset(config, {"card": 2048})


def test_the_two_infill_configs_have_equal_numbers_of_parameters_and_the_groups_that_train_py_knows():
    def parameters(size):
        config = from_mapping(ExperimentConfig, audio_infill.get_config(size).to_dict())
        return flatten_dict(jax.eval_shape(lambda: initial_parameters(config)[0]), sep="/")

    for size in ("small", "medium"):
        own, plain = parameters(size), parameters(size + "-without-ttt")
        numbers = [sum(leaf.size for leaf in leaves.values()) for leaves in (own, plain)]
        assert abs(numbers[0] / numbers[1] - 1) < 1e-3
        assert {group_of(path) for path in plain} == {"base"}
        groups = {path.split("/")[2] if "two_way" in path else "": group_of(path) for path in own}
        assert groups["ttt"] == "ttt"
        assert groups["gate_forward_audio"] == groups["gate_backward_audio"] == "gates"
        assert groups["self_attn"] == "base"
    with pytest.raises(ValueError, match=r"audio_infill\.py:large: expected one of"):
        audio_infill.get_config("large")


def test_a_workdir_from_before_there_were_objectives_is_gone_on_with(tmp_path):
    claim_workdir(tmp_path, make())
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop("objective") == "next_token"
    (tmp_path / "config.json").write_text(json.dumps(stored))
    claim_workdir(tmp_path, make())
    assert json.loads((tmp_path / "config.json").read_text())["objective"] == "next_token"


def test_a_workdir_from_before_ttt_layers_had_an_init_began_with_the_published_one(tmp_path):
    claim_workdir(tmp_path, make(model={"ttt": {"layers": (1,)}}))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model"]["ttt"].pop("init"), stored["model"]["ttt"].pop("design")) == (
        "associative", "after_attention",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(
        ValueError, match=r"fields \(there -> now\):\n  model\.ttt\.init: 'published' -> 'associative'\nUse"
    ):
        claim_workdir(tmp_path, make(model={"ttt": {"layers": (1,)}}))
    claim_workdir(tmp_path, make(model={"ttt": {"layers": (1,), "init": "published"}}))


def test_a_missing_dataset_names_the_command_and_writes_nothing(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"python -m ttt_jax\.data\.prepare"):
        run({"data": {"directory": str(tmp_path / "nowhere")}}, workdir)
    assert not workdir.exists()


CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mapping = module.get_config().to_dict()
    config = from_mapping(ExperimentConfig, mapping)
    if config.objective != "diffusion":  # whose dataset says nothing of the model
        complete = infill_with_vocabulary if config.objective == "infill" else with_vocabulary
        assert complete(mapping["model"], INFO).dim == config.model.dim
    assert "--config=configs/" + path.name in module.__doc__


@pytest.mark.parametrize(
    ("module", "with_ttt", "without"),
    [
        *((conversations, size, size + conversations.WITHOUT) for size in conversations.SIZES),
        (pairs, "", pairs.WITHOUT),
        (quiz, "", quiz.WITHOUT),
    ],
)
def test_without_ttt_means_at_equal_parameters(module, with_ttt, without):
    def num_parameters(config) -> int:
        model = with_vocabulary(config.model.to_dict(), INFO)
        codes = jax.ShapeDtypeStruct((1, model.num_streams, 4), jnp.int32)
        shapes = jax.eval_shape(Moshi(model).init, jax.random.key(0), codes)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    with_ttt, without = module.get_config(with_ttt), module.get_config(without)
    assert with_ttt.model.ttt
    assert without.model.ttt is None
    assert with_ttt.data == without.data
    assert with_ttt.optimizer == without.optimizer
    assert abs(num_parameters(without) / num_parameters(with_ttt) - 1) < 0.01
    with pytest.raises(ValueError, match=rf"{module.__name__.split('.')[-1]}\.py:huge: expected"):
        module.get_config("huge")


@pytest.mark.parametrize("variant", moshi_7b_ttt.VARIANTS)
def test_the_7b_config_is_moshi_7b_with_ttt_in_some_layers(variant):
    mapping = moshi_7b_ttt.get_config(variant).to_dict()
    config = from_mapping(ExperimentConfig, mapping)
    assert config.optimizer.train == variant
    mimi = TokenInfo("mimi", 12.5, 24000, num_codebooks=8, card=2048, text_card=32000)
    model = with_vocabulary(mapping["model"], mimi)
    assert dataclasses.replace(model, ttt=None, remat=False) == MoshiConfig()
    assert {model.layer_attention(i) for i in range(32)} == {("window", 3000, 0)}
    assert model.remat
    assert config.precision.frozen == config.precision.activations == "bfloat16"
    codes = jax.ShapeDtypeStruct((1, 17, 2), jnp.int32)
    params = jax.eval_shape(Moshi(model).init, jax.random.key(0), codes)["params"]
    sizes = {"/".join(path): leaf.size for path, leaf in flatten_dict(params).items()}
    assert sum(size for path, size in sizes.items() if group_of(path) == "base") == 7_687_729_152
    trained = sum(size for path, size in sizes.items() if is_trained(path, variant))
    assert trained == sum(sizes.values()) if variant == "all" else 0 < trained < 2.5e9


def test_an_unknown_size_or_variant_is_named():
    with pytest.raises(ValueError, match=r"moshi_7b_ttt\.py:dora: expected one of \['ttt', 'qkvo', 'lora', 'all'\]"):
        moshi_7b_ttt.get_config("dora")
    with pytest.raises(ValueError, match=r"conversations\.py:tiny: expected one of \['small', 'medium', 'large'\]"):
        conversations.get_config("tiny")


FROM_THE_DATASET = {
    *("n_q", "dep_q", "card", "text_card", "existing_text_padding_id", "existing_text_end_padding_id"),
    "num_codebooks",
}
VARIANTS = {"depformer_low_rank_embeddings", "extra_heads_num_heads", "extra_heads_dim", "conditioners", "model_type"}
NOT_FLAGS = FROM_THE_DATASET | VARIANTS | {"dtype"}  # which precision.activations sets


def field_names(value: object, path: str = "") -> dict[str, object]:
    """Every field below a dataclass by its dotted name, such as "optimizer.steps"."""
    names = {}
    for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            names |= field_names(inner, f"{path}{field.name}.")
        else:
            names[path + field.name] = inner
    return names


def on_the_command_line(monkeypatch, path, settings) -> dict[str, object]:
    """The fields of the experiment that train.py would run with these flags."""
    arguments = ["train.py", f"--config={path}", *(f"--config.{name}={value}" for name, value in settings.items())]
    monkeypatch.setattr(sys, "argv", arguments)  # where config_flags looks for what is set
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(arguments)
    fields = field_names(from_mapping(ExperimentConfig, holder.value.to_dict()))
    return {name: value for name, value in fields.items() if name.rsplit(".", 1)[-1] not in NOT_FLAGS}


OF_A_GROUP = {"schedule": "linear", "warmup_steps": 9, "final_learning_rate_fraction": 0.5, "weight_decay": 0.25}


OF_AN_OBJECTIVE = {
    "next_token": {
        **{"data.mode": "follow", "data.recording_frames": 100},
        **{"model.ttt.base_lr": 0.5, "model.ttt.num_heads": 8, "model.ttt.context": 60, "model.ttt.sinks": 2},
        **{"model.depformer_dim_feedforward": 64, "model.delays": (0,) * 9 + (1,) * 8},
        "model.depformer_weights_per_step_schedule": (0, 1, 2, 3, 3, 3, 3, 3),
        "model.remat": True,
    },
    "infill": {"data.masked_share": 0.2, "model.mini_batch_size": 8, "model.ttt_base_lr": 0.5},
    "diffusion": {"model.remat": True, "model.mini_batch_size": 8, "model.ttt_base_lr": 0.5, "loss.text_dropout": 0.2},
}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_field_is_a_flag(path, monkeypatch):
    fields = on_the_command_line(monkeypatch, path, {})
    settings = {name: value for name, value in fields.items() if value is not None} | {
        "optimizer.clip_norm": 0.25,
        "precision.activations": "bfloat16",
        "precision.frozen": "bfloat16",
        "seed": 5,
        **OF_AN_OBJECTIVE[str(fields["objective"])],
        **{f"optimizer.groups.{group}.{name}": value for group in GROUPS for name, value in OF_A_GROUP.items()},
    }
    assert settings.keys() == fields.keys()
    assert on_the_command_line(monkeypatch, path, settings) == settings
