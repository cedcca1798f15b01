"""Models built from the layers, one package each."""

from ttt_jax.models import infill, mimi, moshi, video_dit

__all__ = ["infill", "mimi", "moshi", "video_dit"]
