"""TTT-Video-DiT: config and model."""

from ttt_jax.models.video_dit.config import SIZES, VideoDiTConfig
from ttt_jax.models.video_dit.model import VideoDiT

__all__ = ["SIZES", "VideoDiT", "VideoDiTConfig"]
