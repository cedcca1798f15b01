"""What `import ttt_jax` promises, each in a fresh process: another test's imports would hide a missing one."""

import subprocess
import sys

import pytest

FUNCTIONS = (
    *("TTTLinearParams", "TTTMLPParams", "ttt_linear", "ttt_mlp", "ttt_loss", "init_state", "explain"),
    *("window_attention", "segment_attention"),
)
LAZY = {
    "rooms": ("ttt.ttt_linear", "AttentionCache", "RotaryEmbedding"),
    "layer": ("TTTConfig.ttt_lm", "TTTConfig.video_dit", "TTTLayer"),
    "load": ("load", "save_model"),
    "moshi": ("models.moshi.MoshiConfig.from_kyutai", "models.moshi.Moshi", "models.moshi.stream_step"),
    "convert": ("convert.moshi_params", "convert.ttt_lm_params"),
}


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_imported_before_it_is_asked_for():
    """So that a program's --help and wrong flags answer at once."""
    run("import sys, ttt_jax, ttt_jax.programs; dir(ttt_jax); assert 'jax' not in sys.modules")


def test_the_functions_need_neither_flax_nor_orbax():
    names = "; ".join(f"ttt_jax.{name}" for name in FUNCTIONS)
    run(f"import sys, ttt_jax; {names}; assert not {{'flax', 'orbax', 'orbax.checkpoint'}} & set(sys.modules)")


def test_all_names_are_there():
    run("import ttt_jax; from ttt_jax import *; assert {*ttt_jax.__all__} <= {*dir(ttt_jax)}; ttt_linear, models")


@pytest.mark.parametrize("names", LAZY.values(), ids=LAZY)
def test_what_needs_flax_is_imported_when_first_asked_for(names):
    run("; ".join(["import ttt_jax", *(f"ttt_jax.{name}" for name in names)]))
