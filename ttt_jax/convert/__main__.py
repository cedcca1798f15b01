"""Convert published weights, and back.

    python -m ttt_jax.convert --source=moshi --input=kyutai/moshiko-pytorch-bf16 --output=models/moshiko
    python -m ttt_jax.convert --source=mimi --input=kyutai/moshiko-pytorch-bf16 --output=models/mimi
    python -m ttt_jax.convert --source=cogvideox --input=THUDM/CogVideoX-5b --output=models/video
    python -m ttt_jax.convert --reverse --input=models/moshiko --output=moshiko-kyutai

`--input` is a .safetensors file, its index, a folder, or (extra `hub`) a repository of the Hugging Face hub. PyTorch is
not needed. Memory stays near the largest parameter; a run that is stopped leaves nothing that loads.
"""

import pathlib
import sys

from absl import app, flags

from ttt_jax import programs

SOURCES = ("moshi", "mimi", "ttt_lm", "video_dit", "cogvideox")
SOURCE = flags.DEFINE_enum("source", None, SOURCES, "What the weights are.")
INPUT = flags.DEFINE_string("input", None, "Weights; with --reverse a checkpoint of this library.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Directory to write, which must not exist yet.")
CONFIG = flags.DEFINE_string("config", None, "The model's config as JSON; by default config.json beside the weights.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the parameters; default as stored.")
TTT = flags.DEFINE_string("ttt", None, "TTT layers to insert into a Moshi: JSON, a JSON file, or configs/NAME.py.")
LORA = flags.DEFINE_string("lora", None, "LoRA weights to merge: a file, or a folder with its config.json.")
LORA_SCALING = flags.DEFINE_float("lora_scaling", None, "Their scaling; default as their config says, else 2.")
CODEBOOKS = flags.DEFINE_integer("num_codebooks", 8, "Codebooks of Mimi to use.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of TTT layers that the weights lack.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan, and the memory it will need, and write nothing.")
REVERSE = flags.DEFINE_bool("reverse", False, "Write safetensors and config for the code of others.")
NAMING = ["fused", "current", "ttt_video_dit", "diffusers"]
NAMES = flags.DEFINE_enum("names", None, NAMING, "Of --reverse; default as the input of the conversion.")

BELONGS_TO = {
    "config": SOURCES,
    "num_codebooks": ("mimi",),
    "names": ("reverse",),
    **{name: ("moshi",) for name in ("ttt", "lora", "lora_scaling")},
    "seed": ("moshi", "cogvideox"),
}
"""What flags are for, where they are not for everything."""


def main() -> None:
    """Run the program."""
    if OUTPUT.value is None and not DRY_RUN.value:
        raise app.UsageError("--output is needed, the directory to write")
    if SOURCE.value is None and not REVERSE.value:
        raise app.UsageError(f"--source is needed: {', '.join(SOURCES)}")
    _check_flags("reverse" if REVERSE.value else SOURCE.value or "")
    (_reverse if REVERSE.value else _convert)()


def _check_flags(mode: str) -> None:
    for name, modes in BELONGS_TO.items():
        if flags.FLAGS[name].present and mode not in modes:
            raise app.UsageError(f"--{name} belongs to {' or '.join(modes)}, not to {mode}")


def _convert() -> None:
    # Imported late so that `--help` and wrong flags answer at once.
    from ttt_jax.convert import program

    config, lora = (None if flag.value is None else pathlib.Path(flag.value) for flag in (CONFIG, LORA))
    options = program.Options(config, lora, LORA_SCALING.value, CODEBOOKS.value)
    ttt = None if TTT.value is None else program.read_insertion(TTT.value)
    if OUTPUT.value and pathlib.Path(OUTPUT.value).exists():
        raise ValueError(f"--output: {OUTPUT.value} exists; choose another directory or remove it first")
    plan = program.plan(SOURCE.value or "", INPUT.value, options, dtype=DTYPE.value, ttt=ttt)
    *lines, summary = program.describe(plan)
    if DRY_RUN.value:
        print("\n".join(lines))
    print(summary, file=sys.stdout if DRY_RUN.value else sys.stderr)
    if not DRY_RUN.value:
        program.convert(plan, pathlib.Path(OUTPUT.value or ""), seed=SEED.value)
        print(OUTPUT.value)


def _reverse() -> None:
    from ttt_jax.convert import reverse

    directory = pathlib.Path(OUTPUT.value or "")
    if DRY_RUN.value:
        print("\n".join(reverse.describe(INPUT.value, dtype=DTYPE.value, names=NAMES.value)))
        return
    reverse.reverse(INPUT.value, directory, dtype=DTYPE.value, names=NAMES.value)
    print(OUTPUT.value)


if __name__ == "__main__":
    programs.run(main)
