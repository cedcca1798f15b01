r"""What one update of an experiment takes of each device's memory, read off the compiled program. Nothing is run.

    python -m ttt_jax.training.memory_plan --config=configs/moshi_7b_ttt.py:qkvo --devices=8 --target=h100 \
      --output=plan.json

`--target=h100` compiles for H100s on a machine that has none; it needs `PLUGINS` installed. `--target=cpu` compiles for
as many CPU devices: its arguments are exact, its temporaries are those of another compiler.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from ttt_jax import programs
from ttt_jax.files import write_atomically

if TYPE_CHECKING:
    import jax

    from ttt_jax.training.config import ExperimentConfig
    from ttt_jax.training.step import TrainState

PLUGINS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13", "nvidia-nvvm")
DEVICES_PER_HOST = 8

CAPACITY = 84_929_347_584
"""Bytes of memory of an H100 with 80 GB."""

USABLE = 0.9
"""Of the capacity; the rest is for the CUDA context, NCCL's buffers, cuDNN's workspace and fragmentation."""


def compiled_memory(compiled: "jax.stages.Compiled") -> dict[str, int]:
    """Bytes on each device of any compiled program: what goes in, what it adds to that, and the most at one time."""
    memory: Any = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs_beside_arguments": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def bytes_per_device(tree: Any) -> int:
    """Bytes on each device of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    import jax

    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def lower(config: "ExperimentConfig", devices: Sequence[Any]) -> "tuple[jax.stages.Lowered, TrainState]":
    """An update of the experiment for `devices`, which need not be there; and the state by its shapes and shardings.

    Raises:
        ValueError: The mesh does not fit the devices, or the batch the mesh.
    """
    import jax
    from jax.sharding import NamedSharding

    from ttt_jax.training import sharding
    from ttt_jax.training.loop import Functions
    from ttt_jax.training.objective import objective_of

    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(mesh, config.data.batch_size, config.optimizer.accumulate)
    rows = NamedSharding(mesh, sharding.ROWS)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), objective_of(config).batch_shapes()
    )
    # The default device is what the layers choose their implementation by.
    with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
        functions = Functions(config, mesh)
        return functions.lower(batch), functions.abstract_state


def state_bytes(config: "ExperimentConfig", state: "TrainState") -> dict[str, int]:
    """Bytes per device of the parts of a run's state."""
    from ttt_jax.training.parameters import trained_part

    trained = bytes_per_device(trained_part(state.params, state.lora, config.optimizer.train))
    return {
        "trained": trained,
        "frozen": bytes_per_device((state.params, state.lora)) - trained,
        "optimizer": bytes_per_device(state.optimizer),
        "carried": bytes_per_device(state.carry),
    }


def plan(config: "ExperimentConfig", devices: Sequence[Any]) -> dict[str, Any]:
    """Compiles an update of the experiment for `devices`, which need not be there.

    Returns:
        What is compiled, and bytes per device: "state" by its parts, "program" as `compiled_memory`.

    Raises:
        ValueError: The mesh does not fit the devices, or the batch the mesh.
    """
    import jax

    lowered, state = lower(config, devices)
    step: Any = state.step
    program, mesh, data = lowered.compile(), step.sharding.mesh, config.data
    return {
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "train": config.optimizer.train,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((state.params, state.lora))),
        "rows_per_device": data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]),
        "accumulate": config.optimizer.accumulate,
        **{name: getattr(data, name) for name in ("num_frames", "gradient_chunks", "mode") if hasattr(data, name)},
        "state": state_bytes(config, state),
        "program": compiled_memory(program),
        "flash_attention_calls": (program.as_text() or "").count('custom_call_target="__cudnn$fmha'),
    }


def h100s(count: int) -> list[Any]:
    """Devices to compile for.

    Raises:
        RuntimeError: The plugins are not installed; names them.
    """
    import jax
    from jax.experimental import topologies
    from ttt_kernels.h100 import H100

    hosts = -(-count // DEVICES_PER_HOST)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x{hosts}x{count // hosts}", target_config=H100
        )
    except Exception as error:
        names = " ".join(f"{name}=={jax.__version__}" if "jax" in name else name for name in PLUGINS)
        raise RuntimeError(f"--target=h100 needs JAX's CUDA compiler: pip install --no-deps {names}") from error
    return list(topology.devices)


def _prepare(target: str, devices: int) -> None:
    """Sets what JAX reads when it is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target == "cpu":
        flag = f"--xla_force_host_platform_device_count={devices}"
    else:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        # Autotuning would run its candidates on the device. Without it some of Triton's products do not compile.
        flag = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


def read_config(mapping: dict[str, Any]) -> "ExperimentConfig":
    """The experiment; its vocabulary is that of the dataset where there is one, else Moshi 7B's."""
    from ttt_jax.config import from_mapping
    from ttt_jax.data.tokens import INFO_FILE
    from ttt_jax.training.config import ExperimentConfig
    from ttt_jax.training.objective import objective_type

    config = from_mapping(ExperimentConfig, mapping)
    if not (pathlib.Path(config.data.directory) / INFO_FILE).exists():
        return config
    return objective_type(config).with_dataset(config, mapping.get("model") or {})


def describe(result: dict[str, Any]) -> str:
    """The plan as lines of text."""
    sizes = {**{f"  {name}": n for name, n in result["state"].items()}, **result["program"]}
    axes = ", ".join(f"{name} {size}" for name, size in result["mesh"].items())
    lines = [
        f"{result['device']} ({axes}): train={result['train']} of {result['parameters'] / 1e9:.3f} G parameters, "
        f"{result['rows_per_device']} rows a device, {result.get('gradient_chunks', 1)} x {result['num_frames']} frames"
        + (f", {result['mode']}" if "mode" in result else ""),
        *(f"{name:26} {size / 1e9:8.2f} GB" for name, size in sizes.items()),
    ]
    return "\n".join(lines)


def define_flags() -> flags.FlagValues:
    """The program's flags, defined only where it runs as one."""
    config_flags.DEFINE_config_file("config", None, "Experiment, such as configs/moshi_7b_ttt.py:qkvo.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_integer("devices", 8, "Devices, 8 to a host.", lower_bound=1)
    flags.DEFINE_enum("target", "h100", ["h100", "cpu"], "What to compile for.")
    flags.DEFINE_string("output", None, "JSON file to write.")
    return flags.FLAGS


def main(options: flags.FlagValues) -> None:
    """Prints the plan that the flags ask for, and writes it."""
    _prepare(options.target, options.devices)
    import jax

    devices = jax.devices() if options.target == "cpu" else h100s(options.devices)
    result = plan(read_config(options.config.to_dict()), devices)
    if options.target == "h100":
        result["fits"] = result["program"]["total"] <= USABLE * CAPACITY
    print(describe(result))
    if "fits" in result:
        print(f"{'fits' if result['fits'] else 'DOES NOT FIT'} into {USABLE:.0%} of {CAPACITY / 1e9:.1f} GB")
    if options.output:
        write_atomically(pathlib.Path(options.output), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    programs.run(functools.partial(main, define_flags()))
