"""The sampler where the right answer is known: data whose best denoiser can be written down."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.video_dit import diffusion, sampler

SCHEDULE = diffusion.zero_snr_schedule()
MEAN, STD = 1.5, 0.4
NUMBER = 20_000


def normal_denoiser(x, timestep, weight):
    """`E[x_0 | x_t]` where `x_0 ~ N(MEAN, STD^2)`."""
    signal, noise = diffusion.at(SCHEDULE.signal, timestep, x), diffusion.at(SCHEDULE.noise, timestep, x)
    variance = jnp.float32(STD**2)
    return MEAN + signal * variance / (signal**2 * variance + noise**2) * (x - signal * MEAN)


def draw(denoise, **options):
    start, steps = jax.random.split(jax.random.key(0))
    noise = jax.random.normal(start, (8, NUMBER // 8))
    return np.asarray(sampler.sample(denoise, noise, steps, schedule=SCHEDULE, **options))


DENOISE = jax.jit(normal_denoiser, static_argnums=2)


def test_samples_have_the_mean_and_the_variance_of_the_data():
    """Of 20000 samples, mean and standard deviation have standard errors of 0.003 and 0.002."""
    samples = draw(DENOISE, scale=0.0, num_steps=200)
    np.testing.assert_allclose(samples.mean(), MEAN, atol=0.01)
    np.testing.assert_allclose(samples.std(), STD, atol=0.01)


def test_in_the_published_50_steps_they_lack_only_what_the_last_one_leaves_out():
    """The last step, from t = 19, gives the expected video, whose variance is known. First order is 0.028 off."""
    samples = draw(DENOISE, scale=0.0)
    left = STD**2 * SCHEDULE.signal[19] ** 2 / (STD**2 * SCHEDULE.signal[19] ** 2 + SCHEDULE.noise[19] ** 2)
    np.testing.assert_allclose(samples.mean(), MEAN, atol=0.01)
    np.testing.assert_allclose(samples.std(), STD * np.sqrt(left), atol=0.01)


def test_two_clusters_come_out_as_often_as_they_are_in_the_data():
    """Points at -1 and 2, a quarter and three quarters, where the denoiser is far from linear."""

    def denoise(x, timestep, weight):
        signal, noise = diffusion.at(SCHEDULE.signal, timestep, x), diffusion.at(SCHEDULE.noise, timestep, x)
        logits = jnp.log(3.0) + ((x + signal) ** 2 - (x - 2 * signal) ** 2) / (2 * noise**2)
        return -1 + 3 * jax.nn.sigmoid(logits)

    samples = draw(jax.jit(denoise, static_argnums=2), scale=0.0)
    assert np.all(np.minimum(abs(samples + 1), abs(samples - 2)) < 0.05)
    np.testing.assert_allclose(np.mean(samples > 0.5), 0.75, atol=0.02)


def test_the_steps_start_without_signal_and_are_evenly_spaced():
    seen = []

    def denoise(x, timestep, weight):
        seen.append((int(timestep[0]), weight))
        return jnp.zeros_like(x)

    out = sampler.sample(denoise, jnp.ones((2, 3)), jax.random.key(0), schedule=SCHEDULE)
    assert np.all(out == 0)
    timesteps, weights = zip(*seen, strict=True)
    assert timesteps[:3] == (999, 979, 959)
    assert len(timesteps) == 50
    assert timesteps[-1] == 19
    assert weights[0] == 1
    np.testing.assert_allclose(weights[25], 1 + 3 * (1 - np.cos(np.pi / 32)), rtol=1e-12)
    assert 6 < weights[-1] < 7
    assert sampler.guidance(50) == 7


def test_guidance_goes_beyond_the_condition():
    assert sampler.guided(jnp.float32(2), jnp.float32(1), 3.0) == 4
    assert sampler.guided(jnp.float32(2), jnp.float32(1), 1.0) == 2


def test_the_samples_follow_from_the_key():
    make = functools.partial(sampler.sample, normal_denoiser, jnp.ones((2, 3)), schedule=SCHEDULE, num_steps=4)
    np.testing.assert_array_equal(make(jax.random.key(1)), make(jax.random.key(1)))
    assert np.all(make(jax.random.key(1)) != make(jax.random.key(2)))


def test_a_progress_bar(capsys):
    sampler.sample(normal_denoiser, jnp.ones((1, 2)), jax.random.key(0), schedule=SCHEDULE, num_steps=3, progress=True)
    assert "sampling: 100%" in capsys.readouterr().err


def test_what_makes_no_sense_is_named():
    with pytest.raises(ValueError, match=r"num_steps must be from 1 to the schedule's 1000 timesteps, got 0"):
        sampler.sampled_timesteps(0, 1000)
    short = diffusion.Schedule(SCHEDULE.signal[:900], SCHEDULE.noise[:900])
    with pytest.raises(ValueError, match="schedule must end at signal 0"):
        sampler.sample(normal_denoiser, jnp.ones((1, 2)), jax.random.key(0), schedule=short)
