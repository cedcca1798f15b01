"""Where every array of a run lies on a mesh of devices, by rules on names and shapes; the models know nothing of it.

The mesh has three axes. Rows of a batch, and of what they carry from chunk to chunk, are split over `data` and `fsdp`.
Parameters and their optimizer moments are split over `tensor` by heads and hidden units, and over `fsdp` by whatever
axis is left; `gathering_view` puts the `fsdp` parts of a layer together again where the layer is computed. What no rule
fits is replicated. The compiler makes the program for each device out of this, so a bad rule costs time, never
correctness.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ttt_jax.models.moshi import View
from ttt_jax.training.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))
"""Of an array whose leading axis is the batch."""

SMALLEST_SHARDED = 1024
"""Parameters of fewer elements are not worth a collective of their own."""

BY_COLUMN = (
    *("in_proj", "linear_in", "text_linear", "linears", "wq", "wk", "wv", "wg", "step_size"),
    *("q", "k", "v", "layer1", "modulation"),
)
BY_ROW = ("out_proj", "linear_out", "wo", "o", "layer2")
BY_HEAD = ("inner",)
"""Names of a parameter or of its module: `tensor` splits the last axis, the one before it, or the leading one."""

WHOLE_HEADS = ("in_proj", "out_proj", "wq", "wk", "wv", "wg", "wo", "q", "k", "v", "o")
"""Those whose split axis is made of heads, which are not cut."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config`: all devices, or the first ones when it asks for fewer and there is one process.

    Args:
        config: Its sizes.
        devices: The `jax.Device`s there are; None takes JAX's.

    Raises:
        ValueError: There are not as many devices as the mesh needs.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.devices() if devices is None else devices
    count, known = len(devices), math.prod(size for size in sizes if size > 0)
    shape = tuple(count // known if size == -1 else size for size in sizes)
    fits = math.prod(shape) == count or (jax.process_count() == 1 and 1 <= math.prod(shape) <= count)
    if not fits or (-1 in sizes and count % known):
        asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"config.mesh: expected sizes whose product is the number of devices, {count}, got {asked}. "
            "One of them may be -1, which takes the devices that are left."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: math.prod(shape)])


def check_batch_size(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Checks that every device gets as many rows as every other, in each of `accumulate` parts of the batch.

    Raises:
        ValueError: The batch size is not a multiple.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (shards * accumulate):
        parts = f" x optimizer.accumulate = {accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"config.data.batch_size: expected a multiple of {shards * accumulate} "
            f"(mesh.data x mesh.fsdp = {shards}{parts}), got {batch_size}. Change it or config.mesh."
        )


def parameter_spec(names: tuple[str, ...], shape: tuple[int, ...], model: Any, mesh: Mapping[str, int]):
    """How a parameter, or a moment of it, is split.

    Args:
        names: The dictionary keys on the way to it, such as `("layers_0", "self_attn", "in_proj")`.
        shape: Its shape.
        model: The model, for its numbers of heads.
        mesh: The sizes of the mesh's axes by name.
    """
    axes: list[str | None] = [None] * len(shape)
    if sum(size > 1 for size in shape) < 2:  # norms, biases, gates
        return PartitionSpec()
    axis = _tensor_axis(names, shape, model, mesh["tensor"])
    if axis is not None and mesh["tensor"] > 1:
        axes[axis] = "tensor"
    if mesh["fsdp"] > 1 and math.prod(shape) >= SMALLEST_SHARDED:
        free = [i for i, size in enumerate(shape) if axes[i] is None and size % mesh["fsdp"] == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def _tensor_axis(names, shape, model: Any, size: int) -> int | None:
    last = names[-2:] if names[-1:] == ("kernel",) else names[-1:]
    if any(name in names for name in BY_HEAD):
        axis = 0
    elif any(name in BY_COLUMN for name in last):
        axis = len(shape) - 1
    elif any(name in BY_ROW for name in last):
        axis = len(shape) - 2
    else:
        return None
    cut_heads = any(name in WHOLE_HEADS for name in last) and _num_heads(names, model) % size
    return None if shape[axis] % size or cut_heads else axis


def _num_heads(names, model: Any) -> int:
    if "depformer" in names:
        return model.depformer_num_heads
    inserted = getattr(model, "ttt", None) if "ttt" in names else None
    return (inserted and inserted.num_heads) or model.num_heads


def carried_spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Mapping[str, int]) -> PartitionSpec:
    """How a leaf of what rows carry is split: `names` as of `parameter_spec`, and the fields of its named tuples."""
    axis = None
    if "attention" in names and len(shape) == 4:  # keys and values [B, size, H, D]
        axis = 2
    elif {"weights", "gradient"} & set(names):  # fast weights [B, H, ...]
        axis = 1
    elif "conv_inputs" in names:  # [B, reach, width]
        axis = 2
    if axis is None or mesh["tensor"] == 1 or shape[axis] % mesh["tensor"]:
        return ROWS
    return PartitionSpec(*(*ROWS, *[None] * (axis - 1), "tensor"))


def state_shardings(mesh: Mesh, model: Any, state: Any) -> Any:
    """Shardings of a `TrainState`: its `params`, `lora` and `optimizer` as parameters, its `carry` by rows.

    Args:
        mesh: The mesh.
        model: The model whose state it is.
        state: The state, or its shapes.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    parameter = functools.partial(_parameter_sharding, mesh, model)

    def carried(path, leaf):
        return NamedSharding(mesh, carried_spec(_names(path), leaf.shape, mesh.shape))

    rules: dict[str, Callable] = {"params": parameter, "optimizer": parameter, "lora": parameter, "carry": carried}
    fields = {
        name: jax.tree.map_with_path(rules.get(name, lambda path, leaf: replicated), value)
        for name, value in state._asdict().items()
    }
    return state._replace(**fields)


def _parameter_sharding(mesh: Mesh, model: Any, path, leaf) -> NamedSharding:
    return NamedSharding(mesh, parameter_spec(_names(path), leaf.shape, model, mesh.shape))


def parameter_shardings(mesh: Mesh, model: Any, params: Any) -> Any:
    """Shardings of parameters, of their low-rank factors, or of the shapes of either."""
    return jax.tree.map_with_path(functools.partial(_parameter_sharding, mesh, model), params)


def gathering_view(model: Any) -> View | None:
    """The `view` of a model in training: parameters as they are used, no longer split over `fsdp`; None: as they are.

    Their gradients come back summed and split again. Without this the compiler may choose to split activations instead
    and give every device the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh().shape
    if mesh.get("fsdp", 1) == 1:
        return None

    def view(names: tuple[str, ...], params: Any) -> Any:
        def gather(path, leaf):
            spec = parameter_spec((*names, *_names(path)), leaf.shape, model, mesh)
            return _gather(leaf, spec) if "fsdp" in spec else leaf

        return jax.tree.map_with_path(gather, params)

    return view


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(leaf, spec: PartitionSpec):
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(leaf, whole)


def _gather_forward(leaf, spec):
    return _gather(leaf, spec), None


def _scatter_gradient(spec, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(_gather_forward, _scatter_gradient)


def splitting_width(width: int) -> Callable[[Any], Any] | None:
    """What a model in training does with `[B, ..., width]` activations between its layers; None: nothing.

    They are split over `tensor` along their width, so that what a layer reads, and what the backward pass keeps of it,
    is on no device whole.
    """
    size = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    if size == 1 or width % size:
        return None

    def split(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(*ROWS, *[None] * (x.ndim - 2), "tensor")
        return jax.lax.with_sharding_constraint(x, spec)

    return functools.partial(jax.tree.map, split)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch, ascending, that lie on this process' devices."""
    indices = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices])).tolist()


def put_rows(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """A pytree of NumPy arrays that hold this process' rows, as global arrays of `batch_size` rows."""
    rows = NamedSharding(mesh, ROWS)

    def put(leaf):
        return jax.make_array_from_process_local_data(rows, np.asarray(leaf), (batch_size, *leaf.shape[1:]))

    return jax.tree.map(put, batch)


def _names(path) -> tuple[str, ...]:
    keys = (getattr(key, "key", getattr(key, "name", None)) for key in path)
    return tuple(key for key in keys if isinstance(key, str))
