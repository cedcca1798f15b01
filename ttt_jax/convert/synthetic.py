"""Write a checkpoint of random weights with Kyutai's names, shapes and dtypes, to try a machine with.

    python -m ttt_jax.convert.synthetic --source=moshi --output=synthetic/moshi   # 7.7 B parameters, 15.4 GB
    python -m ttt_jax.convert.synthetic --source=mimi --output=synthetic/mimi

A folder as Kyutai's: the weights under their usual name, and config.json. It says nothing worth hearing.
"""

import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import tqdm
from absl import flags

from ttt_jax import programs


def define_flags() -> flags.FlagValues:
    """The program's flags, defined only where it runs as one."""
    flags.DEFINE_enum("source", "moshi", ["moshi", "mimi"], "Which model.")
    flags.DEFINE_string("config", None, "Its config as JSON; by default the published sizes.")
    flags.DEFINE_string("output", None, "Folder to write, which must not exist yet.", required=True)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: bfloat16 for Moshi, float32 for Mimi.")
    flags.DEFINE_integer("seed", 0, "Another seed draws other weights.")
    return flags.FLAGS


def main(options: flags.FlagValues) -> None:
    """Run the program."""
    from ttt_jax.models.mimi import MimiConfig
    from ttt_jax.models.moshi import MoshiConfig

    model = MoshiConfig if options.source == "moshi" else MimiConfig
    dtype = options.dtype or ("bfloat16" if model is MoshiConfig else "float32")
    write(model.from_kyutai(options.config or {}), pathlib.Path(options.output), dtype=dtype, seed=options.seed)
    print(options.output)


def write(config, output: pathlib.Path, *, dtype: str, seed: int) -> None:
    """Writes the folder of a `MoshiConfig` or `MimiConfig`."""
    # Imported late so that `--help` answers at once.
    from ttt_jax.convert.sources import CONFIG_FILE, MIMI_FILE
    from ttt_jax.convert.writing import MODEL_FILE, constant_entries, entries_of, naming_of, write_file
    from ttt_jax.files import new_directory
    from ttt_jax.models.moshi import MoshiConfig

    table = naming_of(config, None).table
    entries = [entry for rule in table.rules for entry in entries_of(rule, np.dtype(dtype), fused=True)]
    values = itertools.chain(_random(list(entries), seed), table.constants.values())
    entries += constant_entries(table)
    size = sum(entry.nbytes for entry in entries)
    name = MODEL_FILE if isinstance(config, MoshiConfig) else MIMI_FILE
    bar = tqdm.tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
    with new_directory(output) as staging, bar:
        write_file(staging / name, entries, values, bar.update)
        (staging / CONFIG_FILE).write_text(json.dumps(config.to_kyutai(), indent=1) + "\n")


def _random(entries, seed: int) -> Iterator[np.ndarray]:
    """Matrices of N(0, 1/in), so that activations keep their size; vectors and scales of 1."""
    rng = np.random.default_rng(seed)
    for entry in entries:
        if sum(size > 1 for size in entry.shape) < 2:
            yield np.ones(entry.shape, entry.dtype)
        else:
            draws = rng.standard_normal(entry.shape, np.float32)
            yield (draws * np.float32(np.prod(entry.shape[1:]) ** -0.5)).astype(entry.dtype)


if __name__ == "__main__":
    programs.run(functools.partial(main, define_flags()))
