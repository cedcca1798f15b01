"""Mimi (Defossez et al. 2024, arXiv 2410.00037): a neural codec of speech at 12.5 frames per second.

Encoder: SEANet, transformer, downsampling, quantizer; decoder: the same backwards. Whole waveforms and streams take the
same way: `encode_chunk` and `decode_chunk`, whose state None is a fresh start.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ttt_jax.models.mimi.config import MimiConfig
from ttt_jax.models.mimi.quantizer import MISSING_CODE, SplitQuantizer, missing_frames
from ttt_jax.models.mimi.seanet import Downsample, DownsampleState, SEANetDecoder, SEANetEncoder, Upsample
from ttt_jax.models.mimi.transformer import Caches, Transformer


class EncoderState(NamedTuple):
    """What an encoder carries from call to call; every leaf has leading axis B and a constant shape, fresh is zero."""

    seanet: tuple[Any, ...]
    transformer: tuple[Caches, ...]
    downsample: DownsampleState


class DecoderState(NamedTuple):
    """What a decoder carries from call to call; every leaf has leading axis B and a constant shape, fresh is zero."""

    upsample: jax.Array
    transformer: tuple[Caches, ...]
    seanet: tuple[Any, ...]


class Mimi(nn.Module):
    """`encode` and `decode` for whole waveforms; `ttt_jax.models.mimi.encode_step` and `decode_step` for streams."""

    config: MimiConfig

    def setup(self):
        """Parts of both directions."""
        c = self.config
        self.encoder = SEANetEncoder(c)
        self.encoder_transformer = Transformer(c)
        self.downsample = Downsample(c)
        self.quantizer = SplitQuantizer(c)
        self.upsample = Upsample(c)
        self.decoder_transformer = Transformer(c)
        self.decoder = SEANetDecoder(c)

    def __call__(self, wav: jax.Array) -> jax.Array:
        """`wav [B, 1, S]` through codes and back: `[B, 1, S]`."""
        return self.decode(self.encode(wav))[:, :, : wav.shape[2]]

    def encode(self, wav: jax.Array) -> jax.Array:
        """Codes of a whole waveform.

        Args:
            wav: `[B, 1, S]` floating in [-1, 1] at `sample_rate`; a last frame that S does not fill ends in zeros.

        Returns:
            `[B, num_codebooks, T]` int32 in [0, bins), T = ceil(S / frame_samples).

        Raises:
            ValueError: wrong shape or dtype.
        """
        return self.quantize(self.encode_to_latent(wav))

    def encode_to_latent(self, wav: jax.Array) -> jax.Array:
        """What `encode` quantizes: `wav [B, 1, S]` to `[B, dimension, T]`."""
        check_wav(wav)
        missing = -wav.shape[2] % self.config.frame_samples
        latent, _ = self._latent(jnp.pad(wav, ((0, 0), (0, 0), (0, missing))), None, None, None)
        return latent.swapaxes(1, 2)

    def quantize(self, latent: jax.Array) -> jax.Array:
        """Codes `[B, num_codebooks, T]` int32 of `latent [B, dimension, T]`."""
        return self.quantizer.encode(latent.swapaxes(1, 2))

    def dequantize(self, codes: jax.Array) -> jax.Array:
        """The latent `[B, dimension, T]` that codes `[B, num_codebooks, T]` stand for."""
        check_codes(self.config, codes)
        return self.quantizer.decode(codes).swapaxes(1, 2)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Waveform of a whole sequence of codes.

        Args:
            codes: `[B, num_codebooks, T]` integers in [-1, bins); -1 is no code. A frame that lacks one is decoded from
                a latent of zero and its own samples are silent. Under jit, where values cannot be refused, one outside
                the range is taken as -1.

        Returns:
            `[B, 1, T * frame_samples]`, float32 or the parameters' wider dtype.

        Raises:
            ValueError: wrong shape or dtype, or (outside jit) values out of range.
        """
        check_codes(self.config, codes)
        return self.decode_chunk(codes, None)[0]

    def decode_latent(self, latent: jax.Array) -> jax.Array:
        """The waveform `[B, 1, T * frame_samples]` of `latent [B, dimension, T]`."""
        return self._wav(latent.swapaxes(1, 2), None, None, None)[0]

    def encode_chunk(self, wav, state: EncoderState | None, active=None, reset=None):
        """`encode_step` without its checks; the state None is a fresh start."""
        latent, state = self._latent(wav, state, active, reset)
        codes = self.quantizer.encode(latent)
        return _where_active(active, codes, jnp.int32(MISSING_CODE)), state

    def decode_chunk(self, codes, state: DecoderState | None, active=None, reset=None):
        """`decode_step` without its checks; the state None is a fresh start."""
        wav, state = self._wav(self.quantizer.decode(codes), state, active, reset)
        silent = jnp.repeat(missing_frames(self.config, codes), self.config.frame_samples, axis=1)
        wav = jnp.where(silent[:, None], jnp.zeros((), wav.dtype), wav)
        return _where_active(active, wav, jnp.zeros((), wav.dtype)), state

    def _latent(self, wav, state: EncoderState | None, active, reset):
        """`wav [B, 1, S]` of whole frames to `[B, T, dimension]`, and the state."""
        before = _restarted(state, reset)
        seanet, caches, edge = (None, None, None) if before is None else before
        x, seanet = self.encoder(wav.swapaxes(1, 2).astype(self.quantizer.dtype), seanet)
        x, caches = self.encoder_transformer(x, caches, _length(active, x.shape[1]), reset)
        x, edge = self.downsample(x, edge)
        return x, _kept(active, before, EncoderState(seanet, caches, edge))

    def _wav(self, latent, state: DecoderState | None, active, reset):
        """`latent [B, T, dimension]` to `[B, 1, S]`, and the state."""
        before = _restarted(state, reset)
        tail, caches, seanet = (None, None, None) if before is None else before
        x, tail = self.upsample(latent, tail)
        x, caches = self.decoder_transformer(x, caches, _length(active, x.shape[1]), reset)
        x, seanet = self.decoder(x, seanet)
        return x.swapaxes(1, 2), _kept(active, before, DecoderState(tail, caches, seanet))


def check_wav(wav) -> None:
    """Checks that a waveform is floating of shape `[B, 1, S]`; ValueError otherwise."""
    if getattr(wav, "ndim", None) != 3 or wav.shape[1] != 1 or not jnp.issubdtype(wav.dtype, jnp.floating):
        got = f"{wav.dtype}{list(wav.shape)}" if hasattr(wav, "shape") else type(wav).__name__
        raise ValueError(f"wav must be floating in [-1, 1] of shape [B, 1, S] (one channel), got {got}")


def check_codes(config: MimiConfig, codes) -> None:
    """Checks that codes are integers of shape `[B, num_codebooks, T]` and, outside jit, in [-1, bins).

    Raises:
        ValueError: wrong shape or dtype, or a value out of range, naming row, codebook, frame, value and range.
    """
    good = getattr(codes, "ndim", None) == 3 and codes.shape[1] == config.num_codebooks
    if not good or not jnp.issubdtype(codes.dtype, jnp.integer):
        got = f"{codes.dtype}{list(codes.shape)}" if hasattr(codes, "shape") else type(codes).__name__
        raise ValueError(
            f"codes must be integers of shape [B, num_codebooks = {config.num_codebooks}, T], got {got}; "
            "num_codebooks is a field of the config"
        )
    if isinstance(codes, Tracer):
        return
    values = np.asarray(codes)
    bad = np.argwhere((values < MISSING_CODE) | (values >= config.bins))
    if len(bad):
        row, k, frame = (int(i) for i in bad[0])
        raise ValueError(
            f"codes[{row}, {k}, {frame}] = {values[row, k, frame]} is outside [{MISSING_CODE}, {config.bins}) of "
            f"codebook {k}; {len(bad)} such values in all. Were they made by another codec?"
        )


def _restarted(state, reset):
    """The state with zeros in the rows that start anew. Attention forgets its rings by itself."""
    if state is None or reset is None:
        return state
    return _map_convolutions(lambda x: _rows(~reset, x, jnp.zeros((), x.dtype)), state)


def _kept(active, before, after):
    """The state after the call, in rows that did not move the one before. Attention keeps its rings by itself."""
    if before is None or active is None:
        return after
    return _map_convolutions(lambda new, old: _rows(active, new, old), after, before)


def _map_convolutions(function, state, *others):
    """`function` of the leaves that are not attention's rings, which stay."""
    names = [name for name in state._fields if name != "transformer"]
    return state._replace(**{n: jax.tree.map(function, *(getattr(s, n) for s in (state, *others))) for n in names})


def _rows(which, x, other):
    return jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), x, other)


def _where_active(active, x, other):
    return x if active is None else _rows(active, x, other)


def _length(active, steps: int):
    return None if active is None else active.astype(jnp.int32) * steps
