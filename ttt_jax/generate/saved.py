"""The whole state of a conversation on disk: attention caches, TTT states, delays, Mimi's states, random key."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore

from ttt_jax.config import from_mapping
from ttt_jax.files import new_path
from ttt_jax.generate.conversation import Configs, Conversation, init_conversation
from ttt_jax.models.mimi import MimiConfig
from ttt_jax.models.moshi import MoshiConfig

CONVERSATION = "conversation"
_SAMPLE = 64  # values of each parameter by which weights are told apart


def save_conversation(
    directory: str | pathlib.Path, configs: Configs, params: tuple[Any, Any], conversation: Conversation
) -> None:
    """Writes a conversation that `load_conversation` goes on with. The directory appears whole or not at all.

    Args:
        directory: must not exist yet.
        configs: of the two models.
        params: Moshi's parameter tree and Mimi's, of which a fingerprint is kept.
        conversation: to save.

    Raises:
        FileExistsError: `directory` exists.
    """
    directory = new_path(directory)
    model = {"rows": conversation.stream.position.shape[0], **_model(configs, params)}
    ocp.save_checkpointables(str(directory), {CONVERSATION: _named(conversation)}, custom_metadata=model)


def load_conversation(directory: str | pathlib.Path, configs: Configs, params: tuple[Any, Any]) -> Conversation:
    """Reads a conversation with the same models, onto the default device.

    Raises:
        FileNotFoundError: there is no conversation.
        ValueError: it cannot be read, or was with models of another config or of other weights.
    """
    directory = pathlib.Path(directory).absolute()
    if not (directory / CONVERSATION).is_dir():
        raise FileNotFoundError(f"{directory} holds no saved conversation; expected what save_conversation wrote.")
    try:
        saved: Any = ocp.checkpointables_metadata(str(directory)).custom_metadata
        rows = int(saved["rows"])
        # With the defaults of fields that there were not when it was saved.
        moshi, mimi = (
            from_mapping(MoshiConfig, saved["moshi"], "moshi"),
            from_mapping(MimiConfig, saved["mimi"], "mimi"),
        )
        saved = {**saved, **_fields(moshi, mimi)}
    # Orbax, the JSON parser and the file system each raise their own types for a damaged file.
    except Exception as error:
        raise ValueError(f"{directory}: the saved conversation cannot be read ({error})") from error
    differing = _differing(saved, {"rows": rows, **_model(configs, params)})
    if differing:
        raise ValueError(
            f"{directory} is a conversation with another model: {'; '.join(differing)}. Go on with the model that it "
            "was saved with, or start a new conversation"
        )
    shapes = jax.eval_shape(lambda params: init_conversation(configs, params, rows), params)
    named, device = _named(shapes), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), named)
    try:
        _read_everything(directory / CONVERSATION)
        leaves: Any = ocp.load(str(directory), abstract, checkpointable_name=CONVERSATION)
    except Exception as error:  # of many types, as above
        raise ValueError(f"{directory}: the saved conversation cannot be read ({error})") from error
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in named])


def _read_everything(directory: pathlib.Path) -> None:
    """Raises an error of TensorStore's where something is damaged.

    Orbax would raise one too, but leaves its other reads running, each of which then reports that nobody waits for it.
    """
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()
    for key in store.list().result():
        store.read(key).result()


def _named(tree: Any) -> dict[str, Any]:
    """A tree's leaves in order, by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _model(configs: Configs, params: tuple[Any, Any]) -> dict[str, Any]:
    mimi = dataclasses.replace(configs.mimi, num_codebooks=1)  # how many are used follows from Moshi
    return {**_fields(configs.moshi, mimi), "weights": fingerprint(params)}


def _fields(moshi: MoshiConfig, mimi: MimiConfig) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps({"moshi": dataclasses.asdict(moshi), "mimi": dataclasses.asdict(mimi)}))


def fingerprint(params: Any) -> str:
    """Tells parameters apart: a hash of every leaf's path, shape, dtype and first values."""
    digest = hashlib.sha256()
    for (path, leaf), corner in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.device_get(_corners(jax.tree.leaves(params))), strict=True
    ):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode() + corner.tobytes())
    return digest.hexdigest()


@jax.jit
def _corners(leaves: list[jax.Array]) -> list[jax.Array]:
    """The first values of each, cut out before anything is flattened, which would copy it all."""
    return [leaf[tuple(slice(0, 1) for _ in leaf.shape[:-1])][..., :_SAMPLE] for leaf in leaves]


def _differing(saved: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """What differs, most telling first; weights are only told where the configs are the same."""
    found = []
    for name in sorted(saved.keys() | now.keys()):
        old, new = saved.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differing(old, new, f"{path}{name}.")
        elif old != new and name != "weights":
            found.append(f"{path}{name} was {old!r}, is {new!r}")
    if not found and saved.get("weights") != now.get("weights"):
        found.append("its weights are others (another checkpoint, or another --ttt)")
    return found
