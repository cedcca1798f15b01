"""Sampling: DPM-Solver++ 2M as an SDE (Lu et al. 2022), with dynamic guidance as CogVideoX has it."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from ttt_jax.models.video_dit.diffusion import Schedule

Denoise = Callable[[jax.Array, jax.Array, float], jax.Array]
"""(noisy `[B, ...]`, timestep int32 `[B]`, guidance) -> the clean video it expects, `[B, ...]`."""

NUM_STEPS, SCALE, POWER = 50, 6.0, 5.0


def guidance(step: int, num_steps: int = NUM_STEPS, scale: float = SCALE, power: float = POWER) -> float:
    """`1 + scale (1 - cos(pi (k / N)^power)) / 2` at step k of N, from 1 where the video is noise towards 1 + scale."""
    return 1 + scale * (1 - math.cos(math.pi * (step / num_steps) ** power)) / 2


def guided(conditional: jax.Array, unconditional: jax.Array, weight: float | jax.Array) -> jax.Array:
    """Classifier-free guidance (Ho and Salimans 2022): `unconditional + weight (conditional - unconditional)`."""
    return unconditional + weight * (conditional - unconditional)


def sampled_timesteps(num_steps: int, num_timesteps: int) -> np.ndarray:
    """The timesteps that sampling visits, int32 `[num_steps]`: evenly spaced from the last one down.

    Raises:
        ValueError: not `1 <= num_steps <= num_timesteps`.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must be from 1 to the schedule's {num_timesteps} timesteps, got {num_steps}")
    return np.linspace(num_timesteps - 1, 0, num_steps, endpoint=False).astype(np.int32)


def sample(
    denoise: Denoise,
    noise: jax.Array,
    key: jax.Array,
    *,
    schedule: Schedule,
    num_steps: int = NUM_STEPS,
    scale: float = SCALE,
    power: float = POWER,
    progress: bool = False,
) -> jax.Array:
    """A video made of noise.

    With `lambda = log(signal / noise)`, `h` the rise of lambda in this step and `r` that of the step before over h,

        D = denoised + (denoised - denoised of the step before) / (2 r)
        x <- noise' / noise exp(-h) x + signal' (1 - exp(-2 h)) D + noise' sqrt(1 - exp(-2 h)) e

    The first step, from no signal at all, and the second have no step before that r could be had from. The last step
    goes to the clean video and is its `denoised`.

    Args:
        denoise: the model, see `Denoise`; called once in each step, with the same shapes, so it may be jitted.
        noise: standard normal `[B, ...]`, where sampling starts.
        key: of the noise of each step.
        schedule: of the training's timesteps; its last signal is zero.
        num_steps: as published 50.
        scale: of `guidance`; 0 makes the guidance 1.
        power: of `guidance`.
        progress: show a progress bar.

    Returns:
        `[B, ...]` in the dtype of `noise`.

    Raises:
        ValueError: not as many timesteps, or a schedule that does not end without signal.
    """
    timesteps = sampled_timesteps(num_steps, len(schedule.signal))
    if schedule.signal[-1] != 0:
        raise ValueError(f"schedule must end at signal 0, see zero_snr_schedule, got {schedule.signal[-1]}")
    signals, noises = (np.asarray(values, np.float64)[timesteps] for values in schedule)
    with np.errstate(divide="ignore"):
        log_snr = np.log(signals) - np.log(noises)  # -inf at first
    x, before, clean = noise, noise, noise
    for k in tqdm.trange(num_steps, unit="step", desc="sampling", dynamic_ncols=True, disable=not progress):
        timestep = jnp.full(x.shape[:1], timesteps[k], jnp.int32)
        before, clean = clean, denoise(x, timestep, guidance(k, num_steps, scale, power)).astype(noise.dtype)
        if k + 1 < num_steps:
            target = clean
            if k > 1:
                ratio = (log_snr[k + 1] - log_snr[k]) / (log_snr[k] - log_snr[k - 1])
                target = clean + float(ratio / 2) * (clean - before)
            decay = math.exp(log_snr[k] - log_snr[k + 1])  # exp(-h), 0 at first
            keep, towards = noises[k + 1] / noises[k] * decay, signals[k + 1] * (1 - decay**2)
            fresh = jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)
            x = float(keep) * x + float(towards) * target + float(noises[k + 1] * math.sqrt(1 - decay**2)) * fresh
    return clean
