"""A block's time and memory by scenes: what is measured, that local attention grows linearly, where lines cross."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from ttt_jax.checkpoint import save_model
from ttt_jax.evaluation import block_speed as module
from ttt_jax.evaluation.block_speed import LOCAL, AttentionBlock, BlockRun, BlockSpeed, block_crossovers, video_speed
from ttt_jax.evaluation.report import as_text
from ttt_jax.evaluation.run import SceneSizes, run
from ttt_jax.evaluation.sections import block_sections
from ttt_jax.evaluation.speed import FULL
from ttt_jax.models.video_dit import VideoDiT, VideoDiTConfig

TTT = f"TTT-Linear and {LOCAL}"
CONFIG = VideoDiTConfig(
    model_dim=32, num_heads=2, num_layers=1, text_dim=4, time_embed_dim=8, in_channels=2, attn_length=2,
    ssm_layer="ttt_linear", mini_batch_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The whole program on a saved model."""
    model = tmp_path_factory.mktemp("model") / "video"
    inputs = (np.zeros((1, 3, 2, 2, 2), np.float32), np.zeros((1, 1, 2, 4), np.float32), np.zeros(1, np.int32))
    shapes = jax.eval_shape(VideoDiT(CONFIG).init, jax.random.key(0), *inputs)["params"]
    save_model(model, CONFIG, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    options = {"data": None, "split": "test", "output": None, "scenes": SceneSizes(2, (8, 8), 8)}
    with pytest.MonkeyPatch.context() as patch:  # each number of scenes compiles six programs
        patch.setattr(module, "_numbers", lambda most: [most])
        assert run(model, ["speed"], **options) == model / "report.html"
    return model


def runs(workdir):
    return [BlockRun(**fields) for fields in json.loads((workdir / "speed.json").read_text())["runs"]]


def test_every_block_is_measured(workdir):
    assert [(r.name, r.work, r.scenes) for r in runs(workdir)] == [
        (name, work, 2) for name in (TTT, LOCAL, FULL) for work in ("forward", "training")
    ]
    assert {r.tokens for r in runs(workdir)} == {336}  # twice 8 + 2 * 64, 64 at the end
    assert all(r.ms > 0 for r in runs(workdir))
    assert [module._numbers(most) for most in (1, 2, 7, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_full_attention_takes_the_memory_of_its_scores_beyond_that_of_local_attention(workdir):
    memory = {r.name: r.memory_bytes for r in runs(workdir) if (r.work, r.scenes) == ("forward", 2)}
    scores = 4 * CONFIG.num_heads * (336**2 - 2 * 200**2)  # two scenes of 8 + 3 * 64 tokens
    # Between the scores alone and scores, masked scores and probabilities.
    assert scores <= memory[FULL] - memory[LOCAL] <= 3 * scores


def test_full_attention_sees_all_and_local_attention_its_scene():
    inputs = module._video_inputs(CONFIG, 5, (2, 2), 2, 3)
    params = module._parameters(AttentionBlock(CONFIG), inputs)
    assert "ttt" not in params

    def reaches(config, texts):
        """Whether the last frame changes the first one's output."""
        parts, time = module._video_inputs(config, 5, (2, 2), *texts)
        other = parts | {"video": parts["video"].at[:, -1].multiply(-1)}
        apply = jax.jit(module._apply, static_argnums=0)
        outs = [apply(AttentionBlock(config), params, x, time)["video"] for x in (parts, other)]
        return bool(np.any(np.asarray(outs[0] != outs[1])[:, 0]))

    assert not reaches(CONFIG, (2, 3))
    assert reaches(dataclasses.replace(CONFIG, attn_length=5, prefix_temporal_length=0), (1, 6))


def test_the_report_shows_it(workdir):
    report = (workdir / "report.html").read_text()
    assert "TTT-Linear and local attention, training, memory against full attention: " in report
    assert "<h1>video</h1>" in report
    assert "scenes of 136 tokens (8 of them text)" in report
    assert (workdir / "block_speed.png").stat().st_size > 10_000


def test_full_attention_that_does_not_fit_is_compiled_but_not_run(monkeypatch, workdir):
    monkeypatch.setattr(module, "FULL_ATTENTION_BYTES", 1)
    inputs = module._video_inputs(CONFIG, 3, (2, 2), 1, 3)
    measured = list(module._measured({FULL: (AttentionBlock(CONFIG), inputs)}, 1, 15))
    assert all(math.isnan(r.ms) and r.memory_bytes > 0 for r in measured)
    measured += [dataclasses.replace(r, name=TTT, ms=1.0) for r in measured]
    assert {c.found for c in block_crossovers(measured, "scenes") if c.measure == "time"} == {"not measured"}
    fields = json.loads((workdir / "speed.json").read_text()) | {"runs": measured, "crossovers": []}
    assert "not run" in as_text(block_sections(BlockSpeed(**fields)))


def test_crossovers_of_time_and_memory():
    costs = {  # scenes: (ms, bytes); linear against quadratic
        TTT: {1: (4.0, 200), 2: (8.0, 400), 4: (16.0, 800), 8: (32.0, 1600)},
        FULL: {1: (1.0, 100), 2: (4.0, 400), 4: (16.0, 1600), 8: (math.nan, 6400)},
    }
    measured = [BlockRun(n, "forward", s, 9 * s, *cost) for n, line in costs.items() for s, cost in line.items()]
    found = {c.measure: (c.scenes, c.found) for c in block_crossovers(measured, "scenes")}
    assert found["time"] == (None, "not faster within 1 to 4 scenes")
    assert found["memory"] == (pytest.approx(2), "less from 2.0 scenes on")


def test_what_is_refused(workdir):
    with pytest.raises(ValueError, match=r"--benchmark: .*video holds a VideoDiT, which has speed, got recall"):
        run(workdir, ["speed", "recall"], data=None, split="test", output=None)
    for name, sizes in {"max_scenes": {"max_scenes": 0}, "patches": {"patches": (4, 0)}}.items():
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got 0"):
            video_speed(CONFIG, **sizes)
