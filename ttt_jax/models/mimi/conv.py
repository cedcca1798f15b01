"""Causal convolutions and their transposes over `[B, T, C]`, which can be cut anywhere in their stream."""

import jax
import jax.numpy as jnp


def causal_conv(
    x: jax.Array, kernel: jax.Array, past: jax.Array | None = None, *, stride: int = 1, dilation: int = 1
) -> tuple[jax.Array, jax.Array | None]:
    """`y[t] = sum_i kernel[i]^T x[t * stride + i * dilation - reach]`, `reach = (K - 1) * dilation + 1 - stride`.

    Args:
        x: `[B, T, C]`, T a multiple of `stride`.
        kernel: `[K, C, features]`, index K - 1 the current input.
        past: `[B, reach, C]`, the inputs before these; None is zeros.
        stride: inputs per output.
        dilation: inputs between the kernel's taps.

    Returns:
        `[B, T / stride, features]` and the past to go on with, None if `reach` is 0.
    """
    reach = (kernel.shape[0] - 1) * dilation + 1 - stride
    if reach:
        if past is None:
            past = jnp.zeros((x.shape[0], reach, x.shape[2]), x.dtype)
        x = jnp.concatenate([past, x], axis=1)
        past = x[:, x.shape[1] - reach :]
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride,), "VALID", rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y, past


def transposed_conv(x: jax.Array, kernel: jax.Array, tail: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`y[t * S + s] = kernel[..., s]^T x[t] + kernel[..., S + s]^T x[t - 1]`: causal, transposed, of stride S.

    Args:
        x: `[B, T, C]`.
        kernel: `[C, features, 2 * S]`.
        tail: `[B, 1, S, features]`, what the input before these adds to their first S outputs; None is zeros.

    Returns:
        `[B, T * S, features]` and the tail to go on with.
    """
    return _overlapped(jnp.einsum("btc,cfk->btfk", x, kernel).swapaxes(2, 3), tail)


def depthwise_transposed_conv(
    x: jax.Array, kernel: jax.Array, tail: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`transposed_conv` of every channel alone, with a kernel `[2 * S, 1, C]`."""
    return _overlapped(x[:, :, None] * kernel[None, None, :, 0], tail)


def _overlapped(spread, tail):
    """Adds the second half of each input's `spread [B, T, 2 * S, features]` to the first half of the next one's."""
    batch, frames, width, features = spread.shape
    now, later = jnp.split(spread, 2, axis=2)
    if tail is None:
        tail = jnp.zeros((batch, 1, width // 2, features), spread.dtype)
    later = jnp.concatenate([tail, later], axis=1)
    return (now + later[:, :frames]).reshape(batch, frames * width // 2, features), later[:, frames:]
