import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers.rope import RotaryEmbedding, rotate, rotate_3d


def test_turns_each_interleaved_pair_as_a_complex_number():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 5, 3, -1, -2]])
    turn = np.exp(1j * positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4))
    expected = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    out = np.asarray(rotate(RotaryEmbedding(100.0), jnp.asarray(x, jnp.float32), jnp.asarray(positions)))
    np.testing.assert_allclose(out[..., ::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(out[..., 1::2], expected.imag, atol=1e-5)


def test_scores_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 16))
    rope, at = RotaryEmbedding(), jnp.arange(4)

    def scores(shift):
        return jnp.einsum("bthd,bshd->bts", rotate(rope, q, at + shift), rotate(rope, k, at + shift))

    np.testing.assert_allclose(scores(0), scores(50), atol=1e-4)


def test_three_axes_turn_a_quarter_and_three_eighths_each():
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 32)).astype(np.float32)
    positions = np.array([[0, 0, 0], [5, 0, 0], [0, 7, 2], [3, 1, 4]])
    rope = RotaryEmbedding(100.0)
    out = np.asarray(rotate_3d(rope, jnp.asarray(x), jnp.asarray(positions)))
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    for axis, part in enumerate((slice(0, 8), slice(8, 20), slice(20, 32))):
        expected = rotate(rope, jnp.asarray(x[..., part]), jnp.asarray(positions[:, axis]))
        np.testing.assert_array_equal(out[..., part], expected)
    np.testing.assert_array_equal(rotate_3d(rope, jnp.asarray(x), jnp.asarray(positions)[None]), out)


def test_bad_input():
    with pytest.raises(ValueError, match="a head dim that 16 divides"):
        rotate_3d(RotaryEmbedding(), jnp.zeros((1, 2, 1, 8)), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="even head dim"):
        rotate(RotaryEmbedding(), jnp.zeros((1, 2, 1, 3)), jnp.arange(2))
    with pytest.raises(ValueError, match="theta"):
        RotaryEmbedding(0.0)
