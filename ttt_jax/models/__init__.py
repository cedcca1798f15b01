"""Models built from the layers, one package each."""

from ttt_jax.models import mimi, moshi, video_dit

__all__ = ["mimi", "moshi", "video_dit"]
