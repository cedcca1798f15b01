"""What the processes of one run have to agree on. With one process nothing is asked and nothing waits."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of those of a run; to be called before any other use of JAX.

    Args:
        coordinator: `HOST:PORT` of process 0. None, as for the others: Slurm, Open MPI or the TPU slice tells.
        num_processes: In all.
        process_id: Of this one, from 0.

    Raises:
        ValueError: Only some of the three are given, or none and nothing tells.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)}: missing; {', '.join(given)} are given together, or --distributed alone."
        )
    # It would take SIGTERM for itself; `Wishes` brings it to all processes, with SIGINT and the checkpoints' clock.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(coordinator, num_processes, process_id)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def everywhere(holds: bool) -> bool:
    """Whether something holds in all processes."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.array(holds))))


def of_first(numbers: Sequence[int]) -> list[int]:
    """The numbers that the first process calls this with."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.asarray(numbers if is_first() else [0] * count, np.int32)
    return multihost_utils.broadcast_one_to_all(mine).tolist()


def check_same(value: bytes, what: str) -> None:
    """Checks that all processes call this with the same bytes.

    Raises:
        ValueError: They do not; raised in every process.
    """
    digest = list(hashlib.sha256(value).digest())
    if not everywhere(of_first(digest) == digest):
        raise ValueError(
            f"{what}: expected the same in all {jax.process_count()} processes; start them by one command."
        )


def alone() -> ocp.Context:
    """Orbax calls inside wait for no other process, of which one may fail where this one does not."""
    context = ocp.Context()
    process = jax.process_index()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{process}"
    return context


class Answer(NamedTuple):
    """What some process wishes."""

    stop: bool
    save: bool


class Wishes:
    """What any process wishes after an update, known to all of them after the same one.

    With several processes an answer is that of the question before: by then the devices have it, and while it is read
    they work on the update that follows.
    """

    def __init__(self, mesh: Mesh, *, stop: Callable[[], bool], save: Callable[[], bool]):
        """`stop` and `save` tell what this process wishes."""
        self._stop, self._save = stop, save
        self._mesh = mesh
        self._by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda wishes: jnp.any(wishes, 0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def ask(self) -> Answer:
        """What some process wished, this one or another; all processes call this before and after every update."""
        own = Answer(self._stop(), self._save())
        if jax.process_count() == 1:
            return own
        mine = np.tile(np.array(own), (len(self._mesh.local_devices), 1))
        wishes = jax.make_array_from_process_local_data(self._by_device, mine, (self._mesh.size, 2))
        before, self._pending = self._pending, self._any(wishes)
        return Answer(False, False) if before is None else Answer(*np.asarray(before).tolist())

    def forget(self) -> None:
        """Drops the answer that is under way, once its wish is granted."""
        self._pending = None
