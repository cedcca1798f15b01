"""Work in fresh processes, forked from a server that has imported the libraries and used none of them."""

import multiprocessing
import multiprocessing.process
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

# A process tells its exit code once, to whoever asks first, and starting one asks after all others.
_ASKING = threading.Lock()
_PRELOAD = ["ttt_jax.data.pipeline", "ttt_jax.data.mimi", "ttt_jax.data.speech", "absl.app", "absl.flags"]


def run_in_fresh_processes(tasks: Sequence[tuple[str, Callable, tuple]], workers: int) -> Iterator[str]:
    """Run `(name, function, args)` tasks, each in a process of its own, and yield the names as they finish.

    RuntimeError if a process dies; the tasks after it are not started. Threads may run tasks at the same time.
    """
    waiting = list(reversed(tasks))
    running: dict[int, tuple[str, multiprocessing.process.BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name, function, args = waiting.pop()
                process = _start(function, args)
                running[process.sentinel] = (name, process)
            for sentinel in connection.wait(list(running)):
                name, process = running.pop(sentinel)  # type: ignore[arg-type]
                _check(name, _exit_code(process))
                yield name
    finally:
        for _, process in running.values():
            process.terminate()
            _exit_code(process)


def iterate_in_a_fresh_process(name: str, function: Callable[..., Iterator[Any]], args: tuple) -> Iterator[Any]:
    """Yield what `function(*args)` yields in a process of its own, which is ahead by what a pipe holds.

    RuntimeError if the process dies.
    """
    receiver, sender = _context().Pipe(duplex=False)
    process = _start(_send_all, (sender, function, args))
    sender.close()  # this process's copy, so that the pipe ends with the other's
    try:
        while (item := receiver.recv()) is not None:
            yield item[0]
    except EOFError:
        _check(name, _exit_code(process))
        raise
    finally:
        receiver.close()
        process.terminate()
        _exit_code(process)


def _send_all(sender: connection.Connection, function: Callable[..., Iterator[Any]], args: tuple) -> None:
    for item in function(*args):
        sender.send((item,))
    sender.send(None)


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _start(function: Callable, args: tuple) -> multiprocessing.process.BaseProcess:
    process = _context().Process(target=function, args=args, daemon=True)
    with _ASKING:
        process.start()
    return process


def _exit_code(process: multiprocessing.process.BaseProcess) -> int | None:
    """Waits for a process that is ending."""
    with _ASKING:
        process.join()
        return process.exitcode


def _check(name: str, exit_code: int | None) -> None:
    if exit_code != 0:
        raise RuntimeError(f"the process for {name!r} ended with exit code {exit_code} (see above)")
