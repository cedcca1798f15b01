"""Diffusion with velocity prediction and zero terminal SNR, as CogVideoX and TTT-Video-DiT are trained.

A noisy video at timestep t is `x_t = signal[t] x_0 + noise[t] e` with `e ~ N(0, 1)`, `signal = sqrt(abar)` and
`noise = sqrt(1 - abar)`; the network predicts the velocity `v = signal[t] e - noise[t] x_0` (Salimans and Ho 2022).
At the last timestep the signal is zero (Lin et al. 2024), so that sampling starts from what training has seen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_TIMESTEPS = 1000
FIRST_BETA, LAST_BETA = 0.00085, 0.012


class Schedule(NamedTuple):
    """How much is left of a video at each timestep; `signal**2 + noise**2 = 1`. NumPy float64 `[timesteps]`."""

    signal: np.ndarray  # sqrt(abar), falling to exactly 0
    noise: np.ndarray  # sqrt(1 - abar), rising to exactly 1


def zero_snr_schedule(
    num_timesteps: int = NUM_TIMESTEPS, first_beta: float = FIRST_BETA, last_beta: float = LAST_BETA
) -> Schedule:
    """Betas linear in their square roots, then `sqrt(abar)` shifted and scaled so that it ends at 0 (Lin et al. 2024).

    Args:
        num_timesteps: at least 2.
        first_beta: of the first timestep, whose abar is `1 - first_beta` before and after.
        last_beta: of the last timestep, before.

    Raises:
        ValueError: fewer than 2 timesteps, or betas that are not `0 < first_beta <= last_beta < 1`.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, a first and a last one, got {num_timesteps}")
    if not 0 < first_beta <= last_beta < 1:
        raise ValueError(f"betas must be 0 < first_beta <= last_beta < 1, got {first_beta} and {last_beta}")
    betas = np.linspace(first_beta**0.5, last_beta**0.5, num_timesteps, dtype=np.float64) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    signal = (root - root[-1]) * root[0] / (root[0] - root[-1])
    # (1 - signal)(1 + signal) rather than 1 - signal**2: at the first timestep that would lose three digits.
    return Schedule(signal, np.sqrt((1 - signal) * (1 + signal)))


def at(values: np.ndarray, timestep: jax.Array, like: jax.Array) -> jax.Array:
    """A schedule's values at `timestep [B]`, in the dtype of `like [B, ...]` and with as many axes."""
    return jnp.asarray(values, like.dtype)[timestep].reshape(-1, *(1,) * (like.ndim - 1))


def add_noise(schedule: Schedule, video: jax.Array, noise: jax.Array, timestep: jax.Array) -> jax.Array:
    """`x_t` of clean video `[B, ...]`, noise of the same shape and timesteps int `[B]`."""
    return at(schedule.signal, timestep, video) * video + at(schedule.noise, timestep, video) * noise


def velocity(schedule: Schedule, video: jax.Array, noise: jax.Array, timestep: jax.Array) -> jax.Array:
    """What the network is to predict, `signal e - noise x_0`; arguments as `add_noise`'s."""
    return at(schedule.signal, timestep, video) * noise - at(schedule.noise, timestep, video) * video


def denoised(schedule: Schedule, noisy: jax.Array, output: jax.Array, timestep: jax.Array) -> jax.Array:
    """The clean video that the network's output means, `signal x_t - noise output`; all `[B, ...]`."""
    return at(schedule.signal, timestep, noisy) * noisy - at(schedule.noise, timestep, noisy) * output


def losses(
    schedule: Schedule, output: jax.Array, video: jax.Array, noise: jax.Array, timestep: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses of each row: `mean((x0_hat - x_0)^2 / (1 - abar))`, which is trained, and without its weight.

    Since `x0_hat - x_0 = noise[t] (v - output)`, the first is `mean((output - v)^2)` at every timestep, and is
    computed so: where `1 - abar` is tiny, the quotient would be one of two differences that cancel.

    Args:
        schedule: of the timesteps.
        output: the network's, float `[B, ...]`.
        video: x_0, of that shape.
        noise: e, of that shape.
        timestep: int `[B]`.

    Returns:
        Both `[B]`: the weighted loss, and the mean squared error of x0_hat.
    """
    squared = jnp.square(output - velocity(schedule, video, noise, timestep))
    weighted = jnp.mean(squared, axis=range(1, squared.ndim))
    return weighted, at(np.square(schedule.noise), timestep, weighted) * weighted


def sample_latent(moments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A latent drawn from what a VAE's encoder returned: `mean + exp(logvar / 2) e`.

    Args:
        moments: float `[..., 2 C, h, w]`, mean and logvar side by side; logvar is clipped to [-30, 20] as published.
        rng: of e.

    Returns:
        float32 `[..., C, h, w]`.

    Raises:
        ValueError: an odd number of channels.
    """
    if moments.shape[-3] % 2:
        raise ValueError(
            f"moments must have mean and logvar on axis -3, an even number of channels, got shape {moments.shape}"
        )
    mean, logvar = np.split(moments.astype(np.float32), 2, axis=-3)
    return mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * rng.standard_normal(mean.shape, np.float32)
