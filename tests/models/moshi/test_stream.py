import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.moshi import Moshi, init_stream, stream_step, stream_step_with_logits, token_nll

FRAMES = 20


@pytest.fixture(scope="module")
def step(config):
    """`(params, stream, user_codes, **options)` -> tokens, stream, logits; one compilation per set of options."""
    sampling = ("temperature", "top_k", "temperature_text", "top_k_text")
    return jax.jit(functools.partial(stream_step_with_logits, config), static_argnames=sampling)


@pytest.fixture(scope="module")
def user(config):
    return np.random.default_rng(3).integers(0, config.card, (2, config.n_q - config.dep_q, FRAMES)).astype(np.int32)


@pytest.fixture(scope="module")
def greedy(config, params, step, user):
    """A greedy conversation: tokens `[B, 1 + dep_q, T]` and the logits of every call."""
    return converse(step, params, init_stream(config, params, 2), user)


def converse(step, params, stream, user, **options):
    tokens, logits = [], []
    for t in range(user.shape[2]):
        frame = {name: value[..., t] for name, value in options.items()}
        out, stream, step_logits = step(params, stream, user[:, :, t], **frame)
        tokens.append(out)
        logits.append(step_logits)
    return np.stack(tokens, axis=2), jax.tree.map(lambda *x: np.stack(x, axis=2), *logits)


def heard(config, tokens, user):
    """The codes a conversation amounts to: own frames from max_delay on, the user's from the second call on."""
    frames = tokens.shape[2] - config.max_delay
    return np.concatenate([tokens[:, :, config.max_delay :], user[:, :, 1 : frames + 1]], axis=1)


def test_greedy_tokens_are_the_argmax_of_the_whole_pass_over_their_own_conversation(config, params, greedy, user):
    tokens, logits = greedy
    np.testing.assert_array_equal(tokens[:, :, : config.max_delay], -2)
    codes = heard(config, tokens, user)
    whole = jax.jit(Moshi(config).apply)({"params": params}, codes)
    frames = codes.shape[2]
    np.testing.assert_allclose(logits.text_logits[:, :, :frames], whole.text_logits, atol=5e-5)  # float32, TTT inside
    np.testing.assert_array_equal(np.argmax(whole.text_logits[:, 0], -1), codes[:, 0])
    for k, shift in enumerate(config.delays[1 : 1 + config.dep_q]):
        inside = slice(0, frames - shift)
        np.testing.assert_allclose(logits.logits[:, k, shift:frames], whole.logits[:, k, inside], atol=5e-5)
        np.testing.assert_array_equal(np.argmax(whole.logits[:, k, inside], -1), codes[:, k + 1, inside])


def test_forced_tokens_are_taken_and_returned(config, params, step, user, greedy):
    """Forcing a conversation's tokens, in the order they are drawn, gives that conversation and its logits."""
    rng = np.random.default_rng(0)
    forced = rng.integers(0, config.card, (2, 1 + config.dep_q, FRAMES)).astype(np.int32)
    tokens, logits = converse(step, params, init_stream(config, params, 2), user, forced=forced)
    for k, shift in enumerate(config.delays[: 1 + config.dep_q]):
        late = config.max_delay - shift
        np.testing.assert_array_equal(tokens[:, k, config.max_delay :], forced[:, k, shift : FRAMES - late])
    whole = jax.jit(Moshi(config).apply)({"params": params}, heard(config, tokens, user))
    frames = FRAMES - config.max_delay
    np.testing.assert_allclose(logits.text_logits[:, :, :frames], whole.text_logits, atol=5e-5)
    nothing, _ = converse(step, params, init_stream(config, params, 2), user, forced=np.full_like(forced, -2))
    np.testing.assert_array_equal(nothing, greedy[0])


def test_rows_pause_and_restart_on_their_own(config, params, step, user):
    """With random `active` and `reset`, each row says what it says alone, undisturbed."""
    rng = np.random.default_rng(1)
    active, reset = rng.random((2, FRAMES)) < 0.7, rng.random((2, FRAMES)) < 0.15
    tokens, _ = converse(step, params, init_stream(config, params, 2), user, active=active, reset=reset)
    assert np.any(reset & ~active)
    for row in range(2):
        alone = init_stream(config, params, 2)
        for t in range(FRAMES):
            if reset[row, t]:
                alone = init_stream(config, params, 2)
            expected = np.full(1 + config.dep_q, -2)
            if active[row, t]:
                out, alone, _ = step(params, alone, user[:, :, t])
                expected = out[row]
            np.testing.assert_array_equal(tokens[row, :, t], expected, err_msg=f"row {row}, call {t}")


def test_an_inactive_row_keeps_its_state_bit_for_bit(config, params, step, user):
    stream = init_stream(config, params, 2)
    for t in range(5):
        _, stream, _ = step(params, stream, user[:, :, t])
    out, after, _ = step(params, stream, user[:, :, 5], active=jnp.array([True, False]))
    np.testing.assert_array_equal(out[1], -2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), stream, after)
    assert after.position[0] == 6


def test_streaming_leaves_parameters_alone_and_its_shapes_constant(config, params, user):
    """Also: one compilation serves every position, with the stream donated."""
    before = jax.tree.map(np.array, params)
    step = jax.jit(functools.partial(stream_step, config), donate_argnums=1)
    stream = init_stream(config, params, 2)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), stream)
    for t in range(FRAMES):
        _, stream = step(params, stream, user[:, :, t])
        assert jax.tree.map(lambda x: (x.shape, x.dtype), stream) == shapes
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_sampling_follows_the_softmax_at_its_temperature(config, params):
    batch, temperature = 4000, 0.7
    stream = init_stream(config, params, batch)
    user = jnp.zeros((batch, config.n_q - config.dep_q), jnp.int32)
    step = jax.jit(functools.partial(stream_step_with_logits, config, temperature=temperature, temperature_text=0.0))
    _, after, logits = step(params, stream, user, rng=jax.random.key(0))
    drawn = np.asarray(after.tokens)[:, :, 1]  # position 1
    np.testing.assert_array_equal(drawn[:, 0], np.argmax(logits.text_logits[:, 0], -1))
    expected = jax.nn.softmax(logits.logits[0, 0] / temperature)
    observed = np.bincount(drawn[:, 1], minlength=config.card) / batch
    np.testing.assert_allclose(observed, expected, atol=0.04)  # 5 standard errors of 4000 draws


def test_top_k_of_one_is_greedy_for_text_and_audio_apart(config, params, step, user, greedy):
    stream, rng = init_stream(config, params, 2), jax.random.key(0)
    _, greedy_stream, _ = step(params, stream, user[:, :, 0])
    _, both, _ = step(params, stream, user[:, :, 0], rng=rng, temperature=5.0, top_k=1)
    np.testing.assert_array_equal(both.tokens, greedy_stream.tokens)
    seen = {
        tuple(
            np.asarray(
                step(params, stream, user[:, :, 0], rng=jax.random.key(i), temperature=9.0, top_k_text=1)[1].tokens
            )[0, :2, 1]
        )
        for i in range(8)
    }
    assert len({text for text, _ in seen}) == 1
    assert len({audio for _, audio in seen}) > 1


def test_bad_input_names_the_argument(config, params, user):
    stream = init_stream(config, params, 2)
    first = jnp.asarray(user[:, :, 0])
    with pytest.raises(ValueError, match=r"user_codes must be integer of shape \(2, 2\)"):
        stream_step(config, params, stream, first[:, :1])
    with pytest.raises(ValueError, match="rng is needed"):
        stream_step(config, params, stream, first, temperature=0.5)
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        stream_step(config, params, stream, first, temperature=-1.0)
    with pytest.raises(ValueError, match="active must be bool"):
        stream_step(config, params, stream, first, active=jnp.ones(2))
    with pytest.raises(ValueError, match=r"temperature_text must be >= 0 .0 is greedy., got nan"):
        stream_step(config, params, stream, first, temperature_text=float("nan"))
    with pytest.raises(ValueError, match=r"rng must be a jax.random.key of this step, got 0"):
        stream_step(config, params, stream, first, rng=0, temperature=1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"stream must be what init_stream .* returned, got NoneType"):
        stream_step(config, params, None, first)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r'params: expected Moshi.s parameter tree, .*; pass variables\["params"\]'):
        init_stream(config, {"params": params}, 2)
    with pytest.raises(ValueError, match="batch_size: expected an int >= 0, got -1"):
        init_stream(config, params, -1)


def test_tokens_outside_their_cardinality_are_refused(config, params, user):
    stream = init_stream(config, params, 2)
    first = np.array(user[:, :, 0])
    for value in (config.card, 1000, -2):
        bad = first.copy()
        bad[1, 0] = value
        message = rf"user_codes\[1, 0\] = {value} is outside \[-1, 20\) of stream 3"
        with pytest.raises(ValueError, match=message):
            stream_step(config, params, stream, bad)
        with pytest.raises(ValueError, match=message):
            stream_step(config, params, stream, bad.tolist())
    for k, value in ((0, config.text_card), (2, config.card), (1, -3)):
        forced = np.full((2, 1 + config.dep_q), -2, np.int32)
        forced[0, k] = value
        with pytest.raises(ValueError, match=rf"forced\[0, {k}\] = {value} is outside \[-2, 20\) of stream {k}"):
            stream_step(config, params, stream, first, forced=forced)


def test_under_jit_tokens_outside_their_cardinality_do_no_harm(config, params, step, user):
    """They count as no token (the user's) or as none forced, and the stream stays whole."""
    bad, silent = user[:, :, :6].copy(), user[:, :, :6].copy()
    bad[0, 0, 1], bad[0, 1, 2], bad[0, 1, 3] = config.card, 1000, -7
    silent[0, 0, 1] = silent[0, 1, 2] = silent[0, 1, 3] = -1
    free = np.full((2, 1 + config.dep_q, 6), -2, np.int32)
    wild = free.copy()
    wild[0, :, 2], wild[0, :, 4] = config.card, -9
    streams = [init_stream(config, params, 2)] * 2
    for t in range(6):
        got, streams[0], _ = step(params, streams[0], bad[:, :, t], forced=wild[:, :, t])
        expected, streams[1], _ = step(params, streams[1], silent[:, :, t], forced=free[:, :, t])
        np.testing.assert_array_equal(got, expected)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(streams[0]))
    jax.tree.map(np.testing.assert_array_equal, *streams)


def test_a_trained_models_own_samples_are_likely(trained, process, step):
    """Its greedy tokens score far below the unigram of what it says."""
    config, params = trained
    user = np.asarray(process(77))[:, 1 + config.dep_q :]
    tokens, _ = converse(step, params, init_stream(config, params, 8), user)
    codes = heard(config, tokens, user)
    out = jax.jit(Moshi(config).apply)({"params": params}, codes)
    own = codes[:, 1 : 1 + config.dep_q]
    nll = float(jnp.mean(token_nll(out.logits, own), where=out.mask))
    counts = np.bincount(own.ravel(), minlength=config.card) / own.size
    unigram = -np.sum(counts[counts > 0] * np.log(counts[counts > 0]))
    assert unigram > 2
    assert nll < unigram / 4
