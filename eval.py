"""Evaluates a model: `python eval.py --workdir=DIR | --checkpoint=DIR --benchmark=NAME[,NAME]`.

Writes JSON, plots, a wav and report.html into the directory (or --output).
"""

import pathlib

from absl import app, flags

from ttt_jax import programs

WORKDIR = flags.DEFINE_string("workdir", None, "A run of train.py; its newest checkpoint is evaluated.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "One checkpoint, or a converted model; needs --data.")
BENCHMARK = flags.DEFINE_list("benchmark", ["nll_by_position"], "Benchmarks: nll_by_position, recall, speed, infill.")
DATA = flags.DEFINE_string("data", None, "Token dataset; by default the one that the workdir was trained on.")
SPLIT = flags.DEFINE_string("split", "test", "Split of the dataset.")
BASELINE = flags.DEFINE_string("baseline", None, "A model without TTT on the same data, beside which recall is shown.")
MAX_FRAMES = flags.DEFINE_integer("max_frames", 100_000, "Frames of the stream that speed measures.", lower_bound=200)
MAX_RECORDINGS = flags.DEFINE_integer("max_recordings", None, "Score only the first ones of the split.", lower_bound=1)
MAX_SCENES = flags.DEFINE_integer("max_scenes", 32, "Most scenes that a Video-DiT's speed measures.", lower_bound=1)
PATCHES = flags.DEFINE_list(
    "patches", ["8", "8"], "Rows and columns of patches in a frame of theirs (published: 30,45)."
)
TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 16, "Of each of these scenes' texts.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Directory for the results; by default the workdir or checkpoint.")


def main() -> None:
    """Runs the benchmarks that the flags name."""
    # Imported late so that `--help` and wrong flags answer at once.
    from ttt_jax.evaluation.run import SceneSizes, run

    if len(PATCHES.value) != 2 or not all(size.isdecimal() and int(size) for size in PATCHES.value):
        raise app.UsageError(f"--patches: expected two positive numbers, ROWS,COLUMNS, got {','.join(PATCHES.value)}")
    rows, columns = map(int, PATCHES.value)
    data, output, baseline = (
        None if flag.value is None else pathlib.Path(flag.value) for flag in (DATA, OUTPUT, BASELINE)
    )
    model = pathlib.Path(WORKDIR.value or CHECKPOINT.value or "")
    options = {
        "data": data,
        "split": SPLIT.value,
        "output": output,
        "baseline": baseline,
        "max_frames": MAX_FRAMES.value,
        "max_recordings": MAX_RECORDINGS.value,
        "scenes": SceneSizes(MAX_SCENES.value, (rows, columns), TEXT_TOKENS.value),
    }
    print(run(model, BENCHMARK.value, **options))


if __name__ == "__main__":
    flags.mark_flags_as_mutual_exclusive(["workdir", "checkpoint"], required=True)
    programs.run(main)
