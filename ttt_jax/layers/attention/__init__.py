"""Local attention: a rolling window or hard segments, in one piece or streamed through a ring of recent keys."""

from ttt_jax.layers.attention.api import segment_attention, window_attention
from ttt_jax.layers.attention.cache import AttentionCache, Sinks, evicted, init_attention_cache

__all__ = ["AttentionCache", "Sinks", "evicted", "init_attention_cache", "segment_attention", "window_attention"]
