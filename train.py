"""Trains a model: `python train.py --config=configs/NAME.py --workdir=DIR [--config.optimizer.learning_rate=...]`.

Running the same command again resumes from the newest checkpoint in DIR. SIGTERM and SIGINT save and stop.

On several hosts every process runs this command, with `--distributed` where Slurm, Open MPI or a TPU slice tells the
processes of each other, else with `--coordinator=HOST:PORT --num_processes=N --process_id=I`; see docs/launch.md.
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from ttt_jax import programs

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, such as configs/quickstart.py.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, when there are several processes.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in all.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes, as Slurm, Open MPI or a TPU slice tells.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: config, metrics, checkpoints.", required=True)


def main() -> None:
    """Runs the experiment that the flags name."""
    # Imported late so that `--help` and wrong flags answer at once.
    from ttt_jax.training import distributed

    process = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if DISTRIBUTED.value or any(value is not None for value in process):
        distributed.join(*process)
    from ttt_jax.evaluation.continuation import speak
    from ttt_jax.training.experiment import run

    workdir = pathlib.Path(WORKDIR.value)
    done, total = run(CONFIG.value.to_dict(), workdir, speak)
    state = "finished" if done == total else "stopped; run the same command to resume"
    if distributed.is_first():
        print(f"{state} after step {done} of {total}: {workdir}", file=sys.stderr)


def spelled_out(argument: str) -> str:
    """A flag as the config has it: `--config.optim.lr` is short for `--config.optimizer.learning_rate`."""
    name, equals, value = argument.partition("=")
    if name.startswith("--config.optim."):
        field = name.removeprefix("--config.optim.")
        name = f"--config.optimizer.{'learning_rate' if field == 'lr' else field}"
    return name + equals + value


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    sys.argv = [spelled_out(argument) for argument in sys.argv]  # which ml_collections reads, too
    programs.run(main)
