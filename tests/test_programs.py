"""What a user sees when a program cannot go on."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import app, flags
from absl.testing import flagsaver

import ttt_jax
from ttt_jax import programs
from ttt_jax.files import new_directory

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def parsed_flags():
    with flagsaver.flagsaver():
        flags.FLAGS(["program"])
        yield


def run(main, *arguments):
    programs._run(main, ["program", *arguments])


def test_what_the_library_says_of_the_users_input_is_one_line(tmp_path):
    def overwrite():
        with new_directory(tmp_path):
            pass

    wrong_width = functools.partial(ttt_jax.window_attention, *jnp.zeros((3, 1, 8, 2, 4)), window=0)
    for main, message in [
        (overwrite, f"error: {tmp_path} exists; choose another directory"),
        (wrong_width, "error: window"),
        ((tmp_path / "none").read_text, "No such file"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(main)
        with flagsaver.flagsaver():
            flags.FLAGS(["program", "--verbosity=1"])
            with pytest.raises((ValueError, OSError)):
                run(main)


def test_what_other_libraries_raise_has_its_traceback():
    def in_the_library(code):
        return functools.partial(exec, code, {"__name__": "ttt_jax.some", "jnp": jnp, "jax": jax})

    for code, error in [
        ("jax.jit(jnp.add)(jnp.zeros(2), jnp.zeros(3))", TypeError),
        ("jnp.zeros(2).reshape(3)", TypeError),
        ("int('x')", ValueError),
        ("{}['x']", KeyError),
    ]:
        with pytest.raises(error):
            run(in_the_library(code))
    with pytest.raises(SystemExit, match="error: x"):
        run(in_the_library("raise ValueError('x')"))


def test_arguments_that_are_no_flags_are_refused():
    with pytest.raises(app.UsageError, match=r"unexpected arguments: \['stray'\]"):
        run(lambda: None, "stray")


def start(program, *arguments, directory):
    """Runs a program of the root as a user does, in a directory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / program, *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval.py", "--workdir=none"], "none does not exist; expected a workdir of train.py or a checkpoint."),
        (
            ["train.py", f"--config={ROOT / 'configs' / 'quickstart.py'}", "--workdir=run", "--config.mesh.data=7"],
            "no finished token dataset at data/quickstart",
        ),
        (
            ["train.py", f"--config={ROOT / 'configs' / 'quickstart.py'}", "--workdir=run", "--config.modell.dim=7"],
            "a flag names no field of --config: 'modell' Did you mean \"model\"",
        ),
        (
            ["train.py", f"--config={ROOT / 'configs' / 'quickstart.py'}", "--workdir=run", "--config.model.dimm=7"],
            "a flag names no field of --config: 'dimm' Did you mean \"dim\"",
        ),
    ],
)
def test_training_and_evaluation_end_in_one_line(command, message, tmp_path):
    ended = start(*command, directory=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_config_file_that_fails_keeps_its_traceback(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from configs import quickstart\ndef get_config():\n    return quickstart.get_config().modell\n"
    )
    ended = start("train.py", "--config=mine.py", "--workdir=run", directory=tmp_path)
    assert ended.returncode == 1
    assert 'mine.py", line 3, in get_config' in ended.stderr
