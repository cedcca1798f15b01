"""What `import ttt_jax` promises, each in a fresh process: another test's imports would hide a missing one."""

import subprocess
import sys

import pytest

FUNCTIONS = (
    *("TTTLinearParams", "TTTMLPParams", "ttt_linear", "ttt_mlp", "ttt_loss", "init_state", "explain"),
    *("window_attention", "segment_attention"),
)
LAZY = {
    "layer": ("TTTConfig.ttt_lm", "TTTConfig.video_dit", "TTTLayer"),
    "load": ("load", "save_model"),
    "moshi": ("models.moshi.MoshiConfig.from_kyutai", "models.moshi.Moshi", "models.moshi.stream_step"),
    "convert": ("convert.moshi_params", "convert.ttt_lm_params"),
}


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_functions_need_neither_flax_nor_orbax():
    names = "; ".join(f"ttt_jax.{name}" for name in FUNCTIONS)
    run(f"import sys, ttt_jax; {names}; assert not {{'flax', 'orbax', 'orbax.checkpoint'}} & set(sys.modules)")


@pytest.mark.parametrize("names", LAZY.values(), ids=LAZY)
def test_what_needs_flax_is_imported_when_first_asked_for(names):
    run("; ".join(["import ttt_jax", *(f"ttt_jax.{name}" for name in names)]))
