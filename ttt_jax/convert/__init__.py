"""Published checkpoints to this library's parameter trees."""

from ttt_jax.convert.mimi import mimi_params
from ttt_jax.convert.moshi import moshi_params
from ttt_jax.convert.ttt_lm import ttt_lm_params
from ttt_jax.convert.video_dit import video_dit_params

__all__ = ["mimi_params", "moshi_params", "ttt_lm_params", "video_dit_params"]
