"""Talking to Moshi: sound in, sound and text out, frame by frame. `python -m ttt_jax.generate` does it with files.

`generate` does it with arrays, and `conversation_step` is the step of a server.
"""

from ttt_jax.generate.conversation import (
    KYUTAIS_SAMPLING,
    Configs,
    Conversation,
    conversation_step,
    generate,
    init_conversation,
)
from ttt_jax.generate.saved import load_conversation, save_conversation
from ttt_jax.models.moshi.stream import Sampling

__all__ = [
    "KYUTAIS_SAMPLING",
    "Configs",
    "Conversation",
    "Sampling",
    "conversation_step",
    "generate",
    "init_conversation",
    "load_conversation",
    "save_conversation",
]
