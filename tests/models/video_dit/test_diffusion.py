"""The schedule as published, and the loss as its definition has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.video_dit import diffusion

SCHEDULE = diffusion.zero_snr_schedule()


def test_the_schedule_is_the_published_one():
    """Betas linear in sqrt space; the first abar is 1 - 0.00085, and the signal at the last timestep exactly 0."""
    signal, noise = SCHEDULE
    assert signal.shape == noise.shape == (1000,)
    assert signal[-1] == 0
    assert noise[-1] == 1
    assert np.all(np.diff(signal) < 0)
    np.testing.assert_allclose(signal[0] ** 2, 1 - 0.00085, rtol=1e-12)
    np.testing.assert_allclose(noise[0] ** 2, 0.00085, rtol=1e-12)
    # Before it is rescaled, from the definition: a sum of logs, not a product.
    betas = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    root = np.exp(0.5 * np.cumsum(np.log1p(-np.array(betas))))
    np.testing.assert_allclose(root[-1] ** 2, 0.00466, rtol=1e-2)  # Stable Diffusion's last abar
    np.testing.assert_allclose(signal[500], (root[500] - root[-1]) / (root[0] - root[-1]) * root[0], rtol=1e-10)


@pytest.fixture
def drawn():
    """Clean video, noise, the network's output and timesteps, one where 1 - abar is tiny and one without signal."""
    rng = np.random.default_rng(0)
    video, noise, output = rng.standard_normal((3, 4, 2, 3, 5, 7))
    return video, noise, output, np.array([0, 1, 400, 999])


def test_the_loss_is_that_of_the_definition_at_every_timestep(drawn):
    video, noise, output, timestep = drawn
    abar = SCHEDULE.signal[timestep].reshape(-1, 1, 1, 1, 1) ** 2
    noisy = np.sqrt(abar) * video + np.sqrt(1 - abar) * noise
    clean = np.sqrt(abar) * noisy - np.sqrt(1 - abar) * output
    expected = np.mean((clean - video) ** 2 / (1 - abar), axis=(1, 2, 3, 4))
    got, error = diffusion.losses(SCHEDULE, *(jnp.asarray(x, jnp.float32) for x in (output, video, noise)), timestep)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(error, np.mean((clean - video) ** 2, axis=(1, 2, 3, 4)), rtol=1e-5)


def test_the_velocity_denoises(drawn):
    """Float32 and without a weight: at the first timestep too, where the noise is 0.03 of the signal."""
    video, noise, _, timestep = (jnp.asarray(x) for x in drawn)
    video, noise = video.astype(jnp.float32), noise.astype(jnp.float32)
    noisy = diffusion.add_noise(SCHEDULE, video, noise, timestep)
    v = diffusion.velocity(SCHEDULE, video, noise, timestep)
    np.testing.assert_allclose(diffusion.denoised(SCHEDULE, noisy, v, timestep), video, atol=1e-6)
    np.testing.assert_array_equal(noisy[3], noise[3])
    np.testing.assert_array_equal(v[3], -video[3])


def test_the_gradient_weighs_all_timesteps_alike():
    """The weight 1 / (1 - abar) makes it that of the velocity, of the same size at t = 0 as at t = 999."""

    def loss(output, timestep):
        zeros = jnp.zeros_like(output)
        return diffusion.losses(SCHEDULE, output, zeros, zeros, jnp.asarray([timestep]))[0].sum()

    output = jnp.ones((1, 2, 2))
    first, last = (jax.grad(loss)(output, timestep) for timestep in (0, 999))
    np.testing.assert_allclose(first, last, rtol=1e-6)
    assert np.all(first == 0.5)


def test_latents_are_drawn_from_the_moments():
    moments = np.concatenate([np.full((4, 2, 30, 40), 3.0), np.full((4, 2, 30, 40), np.log(0.25))], axis=1)
    latent = diffusion.sample_latent(moments.astype(np.float32), np.random.default_rng(0))
    assert latent.shape == (4, 2, 30, 40)
    assert latent.dtype == np.float32
    # 9600 numbers: the mean is within 0.5 / sqrt(9600) = 0.005 of it, four times out of five.
    np.testing.assert_allclose(latent.mean(), 3.0, atol=0.02)
    np.testing.assert_allclose(latent.std(), 0.5, atol=0.02)
    certain = np.concatenate([moments[:, :2], np.full((4, 2, 30, 40), -1e9)], axis=1)
    np.testing.assert_allclose(diffusion.sample_latent(certain, np.random.default_rng(0)), 3.0, atol=1e-5)


def test_what_makes_no_sense_is_named():
    with pytest.raises(ValueError, match=r"num_timesteps must be at least 2.*got 1"):
        diffusion.zero_snr_schedule(1)
    with pytest.raises(ValueError, match=r"0 < first_beta <= last_beta < 1, got 0\.1 and 0\.01"):
        diffusion.zero_snr_schedule(10, 0.1, 0.01)
    with pytest.raises(ValueError, match=r"mean and logvar on axis -3.*\(1, 3, 2, 2\)"):
        diffusion.sample_latent(np.zeros((1, 3, 2, 2)), np.random.default_rng(0))
