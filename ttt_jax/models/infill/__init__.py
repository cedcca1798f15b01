"""A model that fills masked spans of long recordings: config, model and likelihoods."""

from ttt_jax.models.infill.config import InfillConfig
from ttt_jax.models.infill.losses import first_masked, masked_nll
from ttt_jax.models.infill.model import Infill

__all__ = ["Infill", "InfillConfig", "first_masked", "masked_nll"]
