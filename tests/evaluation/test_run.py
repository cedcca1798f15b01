"""eval.py as a user runs it: a real dataset and checkpoint in, JSON, plots, wav and report out."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile

from ttt_jax.checkpoint import load, save_model
from ttt_jax.data import conversations, prepare
from ttt_jax.data.reader import open_dataset
from ttt_jax.evaluation import plots
from ttt_jax.evaluation.nll_by_position import nll_by_position, silent_frames
from ttt_jax.evaluation.run import run
from ttt_jax.models.moshi import Moshi, MoshiConfig, TTTInsertion

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "conversations"
    conversations.make(output, hours=0.02, seed=3, min_minutes=0.15, max_minutes=0.3, keep_wav=0, workers=2)
    return output


def save_untrained(directory, info):
    """A tiny Moshi with TTT for a dataset's streams, as initialized."""
    config = MoshiConfig(
        dim=16, num_heads=2, num_layers=2, context=20, depformer_dim=8, depformer_dim_feedforward=16,
        depformer_num_heads=2, depformer_num_layers=1, text_card=info.text_card, card=info.card,
        ttt=TTTInsertion(layers=(1,)),
    )  # fmt: skip
    params = jax.jit(Moshi(config).init)(jax.random.key(0), np.zeros((1, 17, 2), np.int32))["params"]
    save_model(directory, config, params)
    return directory


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("model") / "tiny", open_dataset(dataset, "test").info)


def evaluate(*flags):
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def read_strictly(path):
    """JSON as other languages read it: no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_writes_everything_it_promises(checkpoint, dataset, tmp_path):
    done = evaluate(
        f"--checkpoint={checkpoint}", f"--data={dataset}", "--benchmark=nll_by_position", f"--output={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    result = read_strictly(tmp_path / "nll_by_position.json")
    test = open_dataset(dataset, "test")
    assert result["num_frames"] == test.num_frames.sum()
    assert [s["name"] for s in result["streams"]] == ["text", *(f"codebook {k}" for k in range(8))]
    assert {(c["memory"], c["frames"]) for c in result["curves"]} == {
        (memory, frames) for memory in ("carried", "reset", "off") for frames in ("all", "silent", "sounding")
    }
    # An untrained model spreads its bets: near ln(card), and TTT with wo = 0 changes nothing.
    assert abs(result["streams"][1]["model"]["mean"] - np.log(512)) < 1
    assert all(abs(b["mean"]) < 1e-4 for g in result["gains"] if g["frames"] == "all" for b in g["buckets"])
    tokens = {
        frames: sum(b["num_tokens"] for c in result["curves"] for b in c["buckets"] if c["frames"] == frames)
        for frames in ("all", "silent", "sounding")
    }
    assert tokens["all"] == tokens["silent"] + tokens["sounding"]
    assert min(tokens.values()) > 0
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png;base64") == 2
    assert "data:audio/wav;base64" in report
    wav, rate = soundfile.read(tmp_path / "continuation.wav")
    assert rate == 8000
    assert wav.shape[1] == 2
    assert (tmp_path / "nll_by_position.png").stat().st_size > 10_000
    assert "codebook 7" in done.stdout
    assert str(tmp_path / "report.html") in done.stdout


def test_recall_against_a_baseline(checkpoint, dataset, tmp_path):
    done = evaluate(
        f"--checkpoint={checkpoint}", f"--data={dataset}", "--benchmark=recall", f"--baseline={checkpoint}",
        f"--output={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = read_strictly(tmp_path / "recall.json")
    assert {c["memory"] for c in result["curves"]} == {"carried", "reset", "off", "baseline"}
    assert result["chance"] == pytest.approx(0.1)
    spoken = [e for r in open_dataset(dataset, "test") for e in r.metadata["spoken"]]
    assert result["num_answers"] == sum(e["role"] == "answer" for e in spoken) > 0
    for curve in (c for c in result["curves"] if c["group"] == "all"):
        assert curve["overall"]["accuracy"]["num_tokens"] == result["num_answers"]
        assert sum(b["accuracy"]["num_tokens"] for b in curve["by_gap"]) == result["num_answers"]
        # Untrained: near ln(card), which is that of the text tokens or of the codes.
        assert abs(curve["overall"]["nll"]["mean"] - np.log(512)) < 1.5
    report = (tmp_path / "report.html").read_text()
    assert "Recall of planted facts" in report
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert (
        "As audio, beyond one window" in done.stdout or result["curves"][0]["beyond_window"]["nll"]["num_tokens"] == 0
    )
    assert not (tmp_path / "continuation.wav").exists()


def test_untranscribed_audio_without_a_validation_split(tmp_path):
    """Two mono wavs: no text, no other speaker, two splits."""
    (tmp_path / "audio").mkdir()
    noise = np.random.default_rng(0).standard_normal(40_000) * 0.1
    for name in ("a", "b"):
        soundfile.write(tmp_path / "audio" / f"{name}.wav", noise, 8000)
    prepare.make(tmp_path / "audio", tmp_path / "tokens")
    save_untrained(tmp_path / "model", open_dataset(tmp_path / "tokens", "test").info)
    with pytest.raises(ValueError, match="expected recordings with questions about planted facts"):
        run(tmp_path / "model", ["recall"], data=tmp_path / "tokens", split="test", output=tmp_path / "results")
    assert not (tmp_path / "results").exists()
    run(tmp_path / "model", ["nll_by_position"], data=tmp_path / "tokens", split="test", output=tmp_path / "results")
    result = read_strictly(tmp_path / "results" / "nll_by_position.json")
    assert result["streams"][0]["model"]["mean"] is None
    assert result["streams"][1]["model"]["mean"] > 0
    assert "no tokens" in (tmp_path / "results" / "report.html").read_text()


def test_silent_frames_follow_the_audio(dataset):
    test = open_dataset(dataset, "test")
    codes = test[0].codes
    silent = silent_frames(codes, test)
    speaking = codes[0] > 3  # a word begins in this frame
    assert silent[speaking].mean() < 0.2
    assert 0.2 < silent.mean() < 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--checkpoint=CHECKPOINT", "--data=DATA", "--benchmark=recall,memory"],
            "expected names out of nll_by_position, recall, infill, speed, got memory",
        ),
        (["--checkpoint=CHECKPOINT"], "has no config.json that names its dataset; pass --data"),
        (["--checkpoint=MISSING", "--data=DATA"], "does not exist; expected a workdir of train.py or a checkpoint"),
        (["--checkpoint=CHECKPOINT", "--data=MISSING"], "no finished token dataset at"),
        (["--checkpoint=CHECKPOINT", "--data=DATA", "--split=dev"], "split: expected one of"),
        ([], "workdir"),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_written(flags, message, checkpoint, dataset, tmp_path):
    places = {"CHECKPOINT": checkpoint, "DATA": dataset, "MISSING": tmp_path / "missing"}
    for name, path in places.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    output = tmp_path / "output"
    done = evaluate(*flags, f"--output={output}")
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
    assert not output.exists()


def test_a_model_of_other_streams_is_refused(checkpoint, dataset, tmp_path):
    config, params = load(checkpoint)
    test = open_dataset(dataset, "test")
    with pytest.raises(ValueError, match="expected card 100 as the model has, got 512"):
        nll_by_position(dataclasses.replace(config, card=100), params, test, test, test, split="test")


@pytest.mark.parametrize(
    ("metrics", "labels"),
    [
        ({"text": [1.0], "audio": [2.0, 3.0]}, [("NLL [nats per token]", ["train text", "train audio"])]),
        ({"loss": 0.5, "denoised_error": 1.0}, [("loss", ["train loss"])]),
    ],
)
@pytest.mark.parametrize("diagnosed", [False, True])
def test_the_plot_of_training_has_no_empty_panel(tmp_path, metrics, labels, diagnosed):
    lines = [{"step": 1, "train": metrics}]
    if diagnosed:
        lines.append({"step": 1, "diagnostics": {"layers_0/ttt/gate_size": 0.1}})
        labels = [*labels, ("", ["gate size"])]
    path = tmp_path / "metrics.jsonl"
    torn = '{"step": 2, "tra'  # the run is going on
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    panels = plots.training_figure(path).axes
    assert [(axes.get_ylabel(), axes.get_legend_handles_labels()[1]) for axes in panels] == labels
