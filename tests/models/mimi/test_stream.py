import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.mimi import decode_step, encode_step, init_decoder_state, init_encoder_state

CALLS, FRAMES = 14, 2  # 56 steps, more than ten times the context


def shapes(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.fixture(scope="module", params=["encode", "decode"])
def direction(request, config, steps, random_wav, random_codes):
    """Step, maker of its state, its input for every call, and what it returns for inactive rows."""
    if request.param == "encode":
        wav = random_wav(0, 2, CALLS * FRAMES * config.frame_samples)
        return steps[0], init_encoder_state, np.split(wav, CALLS, axis=2), -1
    return steps[1], init_decoder_state, np.split(random_codes(0, 2, CALLS * FRAMES), CALLS, axis=2), 0


def test_rows_pause_and_restart_on_their_own(config, params, direction):
    """With random `active` and `reset`, each row says what it says alone; one compilation serves every call."""
    step, init, inputs, nothing = direction
    rng = np.random.default_rng(1)
    active, reset = rng.random((CALLS, 2)) < 0.7, rng.random((CALLS, 2)) < 0.2
    assert np.any(reset & ~active)
    everyone, nobody = np.ones(2, bool), np.zeros(2, bool)
    before = jax.tree.map(np.array, params)
    state, alone = init(config, params, 2), [init(config, params, 2) for _ in range(2)]
    constant, compiled = shapes(state), step._cache_size()
    for t in range(CALLS):
        x = inputs[t].copy()
        if x.dtype == np.float32:
            x[~active[t]] = np.nan
        out, state = step(config, params, state, x, active=active[t], reset=reset[t])
        for row in range(2):
            expected = np.full(out.shape[1:], nothing)
            if reset[t, row]:
                alone[row] = init(config, params, 2)
            if active[t, row]:
                both, alone[row] = step(config, params, alone[row], inputs[t], active=everyone, reset=nobody)
                expected = both[row]
            np.testing.assert_array_equal(out[row], expected, err_msg=f"row {row}, call {t}")
        assert shapes(state) == constant
    assert step._cache_size() == compiled + 1
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_an_inactive_row_keeps_its_state_bit_for_bit(config, params, direction):
    step, init, inputs, nothing = direction
    everyone, nobody = np.ones(2, bool), np.zeros(2, bool)
    state = init(config, params, 2)
    for x in inputs[:3]:
        _, state = step(config, params, state, x, active=everyone, reset=nobody)
    kept = jax.tree.map(np.array, state)
    out, after = step(config, params, state, inputs[3], active=np.array([True, False]), reset=nobody)
    np.testing.assert_array_equal(out[1], nothing)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), kept, after)
    assert any(np.any(a[0] != b[0]) for a, b in zip(*map(jax.tree.leaves, (kept, after)), strict=True))


def test_bad_input_names_the_argument(config, params, random_wav, random_codes):
    encoder, decoder = init_encoder_state(config, params, 2), init_decoder_state(config, params, 2)
    wav, codes = random_wav(0, 2, config.frame_samples), random_codes(0, 2, 1)
    with pytest.raises(ValueError, match="wav must hold whole frames of 16 samples, got 15 samples"):
        encode_step(config, params, encoder, wav[:, :, 1:])
    with pytest.raises(ValueError, match="wav must be floating"):
        encode_step(config, params, encoder, wav[:, 0])
    with pytest.raises(ValueError, match="state must be the EncoderState of init_encoder_state"):
        encode_step(config, params, decoder, wav)
    with pytest.raises(ValueError, match="state must have as many rows as the input, 1, got 2"):
        encode_step(config, params, encoder, wav[:1])
    with pytest.raises(ValueError, match=r"active must be bool of shape \(2,\), got int32\[2\]"):
        decode_step(config, params, decoder, codes, active=jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match=r"reset must be bool of shape \(2,\), got bool\[3\]"):
        decode_step(config, params, decoder, codes, reset=np.ones(3, bool))
    with pytest.raises(ValueError, match=r"codes\[0, 0, 0\] = 99 is outside \[-1, 16\)"):
        decode_step(config, params, decoder, np.full_like(codes, 99))
