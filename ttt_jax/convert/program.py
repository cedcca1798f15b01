"""Published checkpoints to this library's checkpoints, tensor by tensor, and back."""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ttt_jax.checkpoint import GROUP_BYTES, save_leaves
from ttt_jax.config import from_mapping
from ttt_jax.convert.checks import check_tensors
from ttt_jax.convert.sources import Options, Source, open_source
from ttt_jax.convert.table import assemble, leaf_dtype
from ttt_jax.data.tokens import TOKENIZER_FILE
from ttt_jax.models.moshi import MoshiConfig, TTTInsertion
from ttt_jax.models.moshi import insertion as moshi_insertion
from ttt_jax.models.video_dit import VideoDiTConfig
from ttt_jax.models.video_dit import insertion as video_dit_insertion

DTYPES = ("float32", "bfloat16")
BASE_BYTES = 700 * 2**20
"""Of a process that has imported JAX and Orbax, measured."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One conversion: what becomes what."""

    source: Source
    config: Any  # of the model that is written
    dtype: np.dtype | None  # of its parameters; None as their tensors
    ttt: dict[str, jax.ShapeDtypeStruct]  # parameters that are drawn, not read

    def leaf_dtype(self, rule) -> np.dtype:
        """What the leaf of `rule` is stored in."""
        return leaf_dtype(rule, self.source.tensors) if self.dtype is None else self.dtype

    def leaf_bytes(self) -> list[int]:
        """Size of each leaf."""
        read = [math.prod(rule.leaf_shape) * self.leaf_dtype(rule).itemsize for rule in self.source.table.rules]
        return read + [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.ttt.values()]

    def peak_bytes(self) -> int:
        """About what the conversion needs of memory."""
        largest_tensor = max(
            math.prod(rule.shape) * np.dtype(self.source.tensors[name].dtype).itemsize
            for rule in self.source.table.rules
            for name in rule.names
        )
        # A group is held twice, by this program and by what writes it; a tensor beside the leaf that it goes into.
        return BASE_BYTES + 2 * max(GROUP_BYTES, *self.leaf_bytes()) + 2 * largest_tensor


def plan(kind: str, name: str, options: Options, *, dtype: str | None = None, ttt: TTTInsertion | None = None) -> Plan:
    """Opens a checkpoint, checks every tensor, and says what it will become; reads and writes no parameter.

    Args:
        kind: "moshi", "mimi", "ttt_lm", "video_dit" or "cogvideox".
        name: Its weights: a file, an index, a folder or a repository of the Hugging Face hub.
        options: Where the rest of it is.
        dtype: Of the parameters, one of `DTYPES`; None as the tensors are stored. A Moshi or a Video-DiT of bfloat16
            parameters alone also computes in it. Rounding Mimi's codebooks changes its codes.
        ttt: TTT layers to insert into a Moshi, with zero effect.

    Raises:
        ValueError: Something is missing, damaged or does not fit; names the argument and the likely fix.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {DTYPES}, got {dtype!r}")
    source = open_source(kind, name, options)
    check_tensors(source.table.shapes, source.tensors)
    _check_floating(source)
    config: Any = source.config
    if ttt is not None:
        if not isinstance(config, MoshiConfig):
            raise ValueError(f"--ttt: TTT layers go into a Moshi, --source is {kind}")
        config = dataclasses.replace(config, ttt=ttt)
    stored = {leaf_dtype(rule, source.tensors) for rule in source.table.rules} if dtype is None else {np.dtype(dtype)}
    if isinstance(config, MoshiConfig | VideoDiTConfig):
        narrow = stored == {np.dtype("bfloat16")}
        config = dataclasses.replace(config, dtype="bfloat16" if narrow else "float32")
    inserted = {}
    if ttt is not None:
        inserted = moshi_insertion.inserted_shapes(config)
    elif kind == "cogvideox":
        inserted = video_dit_insertion.inserted_shapes(config)
    return Plan(source, config, None if dtype is None else np.dtype(dtype), inserted)


def _check_floating(source: Source) -> None:
    names = [name for rule in source.table.rules for name in rule.names]
    wrong = [
        f"{name} {x.dtype}" for name in names if not jnp.issubdtype((x := source.tensors[name]).dtype, jnp.floating)
    ]
    if wrong:
        raise ValueError(f"parameters must be floating; the weights hold {'; '.join(wrong)}")


def describe(steps: Plan) -> Iterator[str]:
    """The plan, a line each leaf, and what it will need."""
    tensors = steps.source.tensors
    for rule in steps.source.table.rules:
        first, count = rule.names[0], len(rule.names)
        others = f" .. {rule.names[-1]} ({count})" if count > 1 else ""
        stored = f"{np.dtype(tensors[first].dtype).name}{list(rule.shape)}"
        yield f"{first}{others} {stored} -> {rule.path} {steps.leaf_dtype(rule).name}{list(rule.leaf_shape)}"
    for path, leaf in steps.ttt.items():
        yield f"inserted -> {path} {leaf.dtype.name}{list(leaf.shape)}"
    parameters = sum(math.prod(rule.leaf_shape) for rule in steps.source.table.rules)
    inserted = sum(math.prod(leaf.shape) for leaf in steps.ttt.values())
    yield (
        f"{len(tensors)} tensors, {parameters / 1e6:.1f} M parameters"
        + (f" and {inserted / 1e6:.1f} M of TTT" if inserted else "")
        + f": {sum(steps.leaf_bytes()) / 1e6:.1f} MB on the disk, about {steps.peak_bytes() / 1e9:.1f} GB of memory"
    )


def convert(steps: Plan, output: pathlib.Path, *, seed: int = 0) -> None:
    """Writes the checkpoint that `ttt_jax.load` reads, with the tokenizer beside it; it appears whole or not at all.

    Args:
        steps: From `plan`.
        output: Its directory, which must not exist.
        seed: Of the inserted TTT layers, and those that CogVideoX lacks.

    Raises:
        FileExistsError: `output` exists.
    """
    tokenizer, size = steps.source.tokenizer, sum(steps.leaf_bytes())
    files = {} if tokenizer is None else {TOKENIZER_FILE: tokenizer}
    with tqdm.tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:
        save_leaves(output, steps.config, _told(_leaves(steps, seed), bar), files, names=steps.source.names)


def _leaves(steps: Plan, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    for rule in steps.source.table.rules:
        yield rule.path, assemble(rule, steps.source.tensors, steps.dtype)
    insertion, layers = moshi_insertion, ()
    if steps.ttt and isinstance(steps.config, VideoDiTConfig):
        insertion, layers = video_dit_insertion, range(steps.config.num_layers)
    elif steps.ttt:
        layers = steps.config.ttt.layers
    for layer in layers:
        inserted = insertion.init_inserted(steps.config, layer, jax.random.fold_in(jax.random.key(seed), layer))
        yield from ((path, np.asarray(leaf)) for path, leaf in inserted.items())


def _told(leaves: Iterable[tuple[str, np.ndarray]], bar: tqdm.tqdm) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in leaves:
        bar.set_postfix_str(path, refresh=False)
        size = leaf.nbytes
        yield path, leaf
        del leaf
        bar.update(size)


def read_insertion(text: str) -> TTTInsertion:
    """What `--ttt` says: fields of `TTTInsertion` as JSON or in a JSON file, or a config file of train.py.

    Raises:
        ValueError: It is neither, or a field is wrong.
    """
    path = pathlib.Path(text)
    try:
        if path.suffix == ".json":
            text = path.read_text()
        elif (name := text.partition(":")[0]).endswith(".py"):
            return from_mapping(TTTInsertion, _config_file(name, text), "--ttt")
        return from_mapping(TTTInsertion, json.loads(text), "--ttt")
    except json.JSONDecodeError as error:
        raise ValueError(
            "--ttt: expected JSON such as '{\"layers\": [15, 31]}', a file with it, or a config file of train.py "
            f"(configs/NAME.py), got {text!r} ({error})"
        ) from error
    except OSError as error:
        raise ValueError(f"--ttt: {error}") from error
    except TypeError as error:  # names the field
        raise ValueError(str(error)) from error


def _config_file(name: str, text: str) -> dict[str, Any]:
    import runpy

    make = runpy.run_path(name)["get_config"]
    argument = text.partition(":")[2]
    config = (make(argument) if argument else make()).to_dict()
    if not config["model"].get("ttt"):
        raise ValueError(f"--ttt: {text} has no TTT layers (config.model.ttt)")
    return config["model"]["ttt"]
