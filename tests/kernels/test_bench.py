"""The benchmark's arithmetic and its files; its times mean something on a GPU alone."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from ttt_kernels import bench

LINEAR, MLP = bench.PLOTTED
RATES = bench.Rates(bytes_per_second=3e12, flops_per_second=8e14)
TIMES = {"forward": 1.0, "forward_backward": 4.0}


@pytest.fixture
def result():
    times = {"pallas": TIMES, "scan": {part: 12 * ms for part, ms in TIMES.items()}}
    shapes = [
        {"variant": dataclasses.asdict(variant), "rows": rows, "tokens": tokens, "heads": 32, "ms": dict(times)}
        for variant in bench.PLOTTED
        for rows, tokens in ((8, 8192), (1, 8192), (1, 16384))
    ]
    for shape in shapes[:2]:  # it could not take the longest
        shape["ms"]["fla_chunk"] = {part: 3 * ms for part, ms in TIMES.items()}
    found = {name: {"out": 2e-3, "weights": 1e-3} for name in bench.IMPLEMENTATIONS}
    of_variants = {str(variant): found for variant in bench.PLOTTED}
    latency = {str(variant): 1e-6 for variant in bench.PLOTTED}
    rates = dataclasses.asdict(RATES)
    return {"device": "Some GPU", "rates": rates, "latency": latency, "errors": of_variants, "shapes": shapes}


def test_what_binds_the_floor():
    one_row = bench.floor(LINEAR, 1, 8192, RATES, 1e-6, backward=False)
    assert (one_row.bound, one_row.seconds) == ("serial latency", pytest.approx(512e-6))
    assert bench.floor(LINEAR, 1, 8192, RATES, 1e-6, backward=True).seconds == pytest.approx(3 * 512e-6)
    many_rows = bench.floor(LINEAR, 64, 8192, RATES, 1e-6, backward=False)
    per_token = 4 * 2 * 64 + 8 + 4 * (64 * 64 + 64) / 256  # q, k, v, out; step sizes; checkpoints
    assert many_rows.bound == "bytes"
    assert many_rows.seconds == pytest.approx(64 * 8192 * 32 * per_token / 3e12)
    slow = bench.Rates(3e12, 1e10)
    assert bench.floor(LINEAR, 1, 8192, slow, 1e-6, backward=False) == bench.Floor(8192 * 32 * 28672 / 1e10, "FLOPs")
    wide = bench.Variant("linear", 16, causal=True, head_dim=128)
    assert (wide.heads, str(wide)) == (16, "linear, C = 16, causal, D = 128")
    assert str(bench.VARIANTS[-1]) == "mlp, C = 16, causal, float32"
    flops = 2 * 3 * 128 * 128 + 2 * 16 * 2 * 128
    assert bench.floor(wide, 1, 8192, slow, 1e-6, backward=False) == bench.Floor(8192 * 16 * flops / 1e10, "FLOPs")
    flops = 2 * 7 * 64 * 256 + 2 * 16 * (2 * 64 + 2 * 256)
    assert bench.floor(MLP, 1, 8192, slow, 1e-6, backward=False) == bench.Floor(8192 * 32 * flops / 1e10, "FLOPs")


def test_the_table_and_the_files(result, tmp_path):
    lines = bench.table(result).splitlines()
    assert "| linear, C = 16, causal | 1 | 8192 | forward | 1.000 | 12.000 | 12.0 | 1.95 | serial latency |" in lines
    assert "| fla_chunk | | | | 3.000 | | 3.0 | | |" in lines
    assert "| mlp, C = 16, causal | pallas | 2.0e-03 | 1.0e-03 |" in lines
    bench.write(result, tmp_path / "measured")
    bench.draw(result, tmp_path / "measured")
    assert json.loads((tmp_path / "measured/Some_GPU.json").read_text()) == result
    assert (tmp_path / "measured/Some_GPU.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("variant", [LINEAR, bench.Variant("mlp", 64, causal=False), *bench.VARIANTS[-3:-1]], ids=str)
def test_the_measurements_run_wherever_the_scan_does(monkeypatch, variant):
    monkeypatch.setattr(bench, "HEADS", 2)
    monkeypatch.setattr(bench, "CALLS", 1)
    measured = bench.Shape(variant, 1, 32).compile(["scan"])()
    assert measured["rows"] == 1
    assert all(ms > 0 for ms in measured["ms"]["scan"].values())
    alone = bench.Alone(variant, num_tokens=64)
    error = alone.errors(alone.compile(["scan"]))["scan"]
    assert 0 < error["out"] < (4e-3 if variant.dtype == "bfloat16" else 1e-5)  # the rounding of the output
    assert 0 < error["weights"] < 1e-5


def test_without_a_gpu_it_says_that_nothing_was_measured(tmp_path):
    command = [sys.executable, "-m", "ttt_kernels.bench", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "nothing was measured: the kernels cannot take this call: the default device is no CUDA GPU" in done.stderr
    assert not (tmp_path / "out").exists()
