import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.moshi import delay, delay_mask, undelay

DELAYS, INITIAL = (0, 2, 1), (50, 8, 8)


@pytest.mark.parametrize("frames", [0, 1, 2, 5])
def test_delayed_position_holds_the_frame_of_its_delay(frames):
    codes = np.arange(2 * 3 * frames).reshape(2, 3, frames).astype(np.int32)
    delayed = np.asarray(delay(jnp.asarray(codes), DELAYS, INITIAL))
    assert delayed.shape == (2, 3, frames + 1)
    for k, shift in enumerate(DELAYS):
        for p in range(frames + 1):
            frame = p - 1 - shift
            np.testing.assert_array_equal(delayed[:, k, p], codes[:, k, frame] if frame >= 0 else INITIAL[k])


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_undelay_inverts_delay_where_the_mask_holds(frames):
    codes = np.random.default_rng(0).integers(0, 8, (2, 3, frames)).astype(np.int32)
    delayed = delay(jnp.asarray(codes), DELAYS, INITIAL)[:, :, 1:]
    restored = jnp.moveaxis(undelay(jnp.moveaxis(delayed, 1, 0), DELAYS, axis=2), 0, 1)
    mask = np.asarray(delay_mask(frames, DELAYS))
    np.testing.assert_array_equal(restored, np.where(mask[None], codes, 0))
    np.testing.assert_array_equal(mask, np.arange(frames)[None] + np.asarray(DELAYS)[:, None] < frames)
