"""Models built from the layers, one package each."""

from ttt_jax.models import moshi

__all__ = ["moshi"]
