"""A model that fills masked spans of long recordings: config and model."""

from ttt_jax.models.infill.config import InfillConfig
from ttt_jax.models.infill.model import Infill

__all__ = ["Infill", "InfillConfig"]
