"""What the programs have in common: their libraries are quiet, and an error about what the user gave is one line."""

import functools
import opcode
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging


def run(main: Callable[[], Any]) -> None:
    """Runs a program of flags alone, as `absl.app.run` does.

    Exit codes are `main`'s own, 0, or 1 after an error: one line (`is_about_input`), or a traceback. `--verbosity=1`
    shows tracebacks of all.
    """
    app.run(functools.partial(_run, main), flags_parser=_parsed)


def _parsed(argv: list[str]) -> list[str]:
    """What is left of the arguments without flags."""
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError) as error:
        # ml_collections' answer to a field of --config that is not there, unless a config file asked for it.
        rooms = {frame.f_globals["__name__"].split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}
        if not rooms <= {"absl", "ml_collections", "ttt_jax"}:
            raise
        cause = error.args[0]
        hint = cause.args[0] if isinstance(cause, KeyError) else cause
        sys.exit(f"error: a flag names no field of --config: {' '.join(str(hint).split())}")


def _run(main: Callable[[], Any], argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it reads and writes at INFO.
    try:
        main()
    except Exception as error:
        if logging.level_debug() or not is_about_input(error):
            raise
        sys.exit(f"error: {error}")


def is_about_input(error: Exception) -> bool:
    """Whether an error says in its own words what the user is to change: the system's, or one that ttt_jax raises.

    Errors that JAX or another library raises beneath us are not: they need the traceback.
    """
    if isinstance(error, OSError):
        return True
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    frame = place.tb_frame
    ours = frame.f_globals.get("__name__", "").split(".")[0] in ("ttt_jax", "__main__")
    return ours and frame.f_code.co_code[place.tb_lasti] == opcode.opmap["RAISE_VARARGS"]
