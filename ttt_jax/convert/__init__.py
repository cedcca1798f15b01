"""Published checkpoints to this library's parameter trees."""

from ttt_jax.convert.moshi import moshi_params

__all__ = ["moshi_params"]
