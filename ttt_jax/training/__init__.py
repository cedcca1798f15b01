"""Training: typed configuration, one update, checkpoints, metrics, and the loop that joins them."""

from ttt_jax.training.checkpoints import NonFiniteError
from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.experiment import run
from ttt_jax.training.loop import train

__all__ = ["ExperimentConfig", "NonFiniteError", "run", "train"]
