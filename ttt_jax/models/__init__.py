"""Models built from the layers, one package each."""

from ttt_jax.models import mimi, moshi

__all__ = ["mimi", "moshi"]
