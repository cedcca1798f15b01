"""The invariants of what Kyutai's other models add: low-rank tables, conditions, extra heads, no depth transformer, and
codes given for streams that the depth transformer predicts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.models.moshi import (
    UNGENERATED_TOKEN,
    Conditioner,
    Moshi,
    MoshiConfig,
    condition_vector,
    init_stream,
    losses,
    stream_step,
    stream_step_with_logits,
)

SIZES = {
    **{"dim": 16, "text_card": 12, "card": 12, "num_heads": 2, "num_layers": 1, "context": 4, "depformer_dim": 8},
    **{"depformer_dim_feedforward": 16, "depformer_num_heads": 2, "depformer_num_layers": 1},
}
QUALITY = Conditioner("quality", n_bins=3, dim=4, possible_values=("bad", "good"))
HIBIKI = MoshiConfig(
    **SIZES,
    **{"n_q": 4, "dep_q": 2, "delays": (0, 0, 1, 0, 1), "model_type": "hibiki", "depformer_low_rank_embeddings": 3},
    conditioners=(QUALITY, Conditioner("genre", n_bins=5, dim=2)),
)
SPEECH_TO_TEXT = MoshiConfig(
    **SIZES,
    **{
        "n_q": 2,
        "dep_q": 0,
        "delays": (0, 0, 0),
        "model_type": "stt",
        "extra_heads_num_heads": 2,
        "extra_heads_dim": 3,
    },
)
# The user's two streams are the last; one is delayed by more than a step.
PERSONAPLEX = MoshiConfig(**SIZES, n_q=4, dep_q=4, delays=(0, 0, 1, 0, 2), model_type="personaplex")
FRAMES = 16


def codes_of(config, batch, frames, seed=0):
    return np.random.default_rng(seed).integers(0, config.card, (batch, config.num_streams, frames)).astype(np.int32)


def test_every_parameter_gets_a_gradient_with_some_conditions_absent(random_params):
    params, codes = random_params(HIBIKI), codes_of(HIBIKI, 4, 4)

    def loss(params):
        conditions = {"quality": ["bad", None, "good", None], "genre": jnp.array([-1, 0, 4, 4], jnp.int32)}
        vector = condition_vector(HIBIKI, params, conditions)
        return losses(Moshi(HIBIKI).apply({"params": params}, codes, vector), codes).total

    grad = jax.jit(jax.grad(loss))(params)
    without = [jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(grad) if not np.any(g)]
    assert not without
    used = np.any(grad["conditioners_quality"]["embed"], axis=1)
    np.testing.assert_array_equal(used, [True, True, False, False])
    assert params["depformer"]["depformer_low_rank"].shape == (2, 3, 8)
    assert params["depformer"]["depformer_text_emb"].shape == (13, 3)


def test_conditions_are_the_sum_of_their_vectors(random_params):
    params = random_params(HIBIKI)
    tables = {name: params[f"conditioners_{name}"] for name in ("quality", "genre")}

    def vector(name, row):
        table = tables[name]
        return table["learnt_padding"] if row is None else table["embed"][row] @ table["output_proj"]

    both = condition_vector(HIBIKI, params, {"quality": ["good", None], "genre": "talk"})
    genre = vector("genre", HIBIKI.conditioners[1].row("talk"))
    np.testing.assert_allclose(both, [vector("quality", 1) + genre, vector("quality", None) + genre], atol=1e-6)
    nothing = condition_vector(HIBIKI, params, None)
    np.testing.assert_allclose(nothing[0], vector("quality", None) + vector("genre", None), atol=1e-6)


def test_a_condition_reaches_its_row_alone_and_none_is_no_value(random_params):
    params, codes = random_params(HIBIKI), codes_of(HIBIKI, 2, 6)
    apply = jax.jit(lambda condition: Moshi(HIBIKI).apply({"params": params}, codes, condition))
    plain = apply(None)
    good = apply(condition_vector(HIBIKI, params, {"quality": [None, "good"]}))
    np.testing.assert_allclose(good.logits[0], plain.logits[0], atol=2e-5)
    assert np.all(np.any(good.logits[1] != plain.logits[1], axis=-1)[plain.mask[1]])


def test_conditions_are_checked_at_the_door(random_params):
    params = random_params(HIBIKI)
    for conditions, message in (
        ({"qualty": "good"}, r"among \['quality', 'genre'\].* got \['qualty'\]"),
        ({"quality": "best"}, r"'quality' must be one of \('bad', 'good'\) or None, got 'best'"),
        ({"quality": ["good", 3]}, "'quality' must be a word or None, got 3"),
        ({"quality": np.array([0, 3])}, r"\['quality'\] must lie in \[-1, 3\), got \[0, 3\]"),
        ({"quality": np.array([0.5])}, "must be words or integers"),
        ({"quality": ["good"] * 2, "genre": ["x"] * 3}, "the same rows, got {'quality': 2, 'genre': 3}"),
    ):
        with pytest.raises(ValueError, match=message):
            condition_vector(HIBIKI, params, conditions)
    with pytest.raises(ValueError, match=r"conditions must be among \[\]"):
        condition_vector(SPEECH_TO_TEXT, {}, {"quality": "good"})
    for config, rows, message in (
        (HIBIKI, 3, r"condition must be \[\[1, 2\], dim = 16\]"),
        (SPEECH_TO_TEXT, 2, "this model has no conditioners"),
    ):
        codes, vector = codes_of(config, 2, 3), jnp.zeros((rows, 16))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(Moshi(config).init, jax.random.key(0), codes, vector)


def test_without_a_depth_transformer_text_alone_is_trained(random_params):
    params, codes = random_params(SPEECH_TO_TEXT), codes_of(SPEECH_TO_TEXT, 2, 8)
    assert set(params) == {"text_emb", "emb", "layers_0", "out_norm", "text_linear", "extra_heads"}

    def loss(params):
        result = losses(Moshi(SPEECH_TO_TEXT).apply({"params": params}, codes), codes)
        return result.total, result

    grad, result = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert result.total == result.text > 0
    assert result.audio == 0
    assert result.audio_nll.shape == result.num_audio_tokens.shape == (0,)
    without = {jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(grad) if not np.any(g)}
    assert without == {"['extra_heads']"}  # what they say is not in the codes
    depth = functools.partial(Moshi(SPEECH_TO_TEXT).apply, method="depth")
    logits = jax.eval_shape(depth, {"params": params}, jnp.zeros((2, 8, 16)), codes[:, :1])
    assert logits.shape == (2, 0, 8, 12)


def test_extra_heads_are_those_of_the_temporal_output(random_params):
    params, z = random_params(SPEECH_TO_TEXT), np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
    logits = jax.jit(functools.partial(Moshi(SPEECH_TO_TEXT).apply, method="extra_heads"))({"params": params}, z)
    assert logits.shape == (2, 2, 8, 3)
    for head in range(2):
        np.testing.assert_allclose(logits[:, head], z @ params["extra_heads"][head], atol=1e-5)
    plain = dataclasses.replace(SPEECH_TO_TEXT, extra_heads_num_heads=0)
    with pytest.raises(ValueError, match="this Moshi has no extra heads"):
        jax.eval_shape(functools.partial(Moshi(plain).apply, method="extra_heads"), {"params": params}, z)


@pytest.fixture(scope="module")
def converse(random_params):
    """Function of user codes `[B, k, T]` to the tokens `[B, 5, T]` and logits of PersonaPlex's greedy stream."""
    params = random_params(PERSONAPLEX)
    step = jax.jit(functools.partial(stream_step_with_logits, PERSONAPLEX, params))

    def run(user, stream=None, **options):
        stream = init_stream(PERSONAPLEX, params, user.shape[0]) if stream is None else stream
        steps = []
        for t in range(user.shape[2]):
            tokens, stream, logits = step(stream, user[:, :, t], **options)
            steps.append((tokens, logits))
        return *jax.tree.map(lambda *x: np.stack(x, axis=2), *steps), stream

    return run


def whole(params, codes):
    return jax.jit(Moshi(PERSONAPLEX).apply)({"params": params}, codes)


def assert_teacher_forced(tokens, logits, out, streams):
    """The logits of `streams` are those of the whole pass over the conversation that the tokens are."""
    frames = tokens.shape[2] - PERSONAPLEX.max_delay
    np.testing.assert_allclose(logits.text_logits[:, :, :frames], out.text_logits, atol=5e-5)
    for k in streams:
        shift = PERSONAPLEX.delays[k + 1]
        inside = slice(0, frames - shift)
        np.testing.assert_allclose(logits.logits[:, k, shift:frames], out.logits[:, k, inside], atol=5e-5)


@pytest.mark.parametrize("streams", [2, 4])
def test_given_codes_are_heard_and_returned_as_the_users(random_params, converse, streams):
    """The first in the frame that they are given for, the others from the frame on that their delay puts them in."""
    user = codes_of(PERSONAPLEX, 2, FRAMES, seed=1)[:, 1 : 1 + streams]
    tokens, logits, _ = converse(user)
    codes = tokens[:, :, PERSONAPLEX.max_delay :]
    np.testing.assert_array_equal(codes[:, 5 - streams :], user[:, :, 1 : 1 + codes.shape[2]])
    # Of a frame whose first code is yet to come, what was drawn stood there when the codes after it were predicted.
    before_any = {2: (0, 1, 2), 4: (0,)}[streams]
    assert_teacher_forced(tokens, logits, whole(random_params(PERSONAPLEX), codes), before_any)


def test_streams_that_are_not_given_are_the_models(random_params, converse):
    nothing = np.full((2, 4, FRAMES), UNGENERATED_TOKEN, np.int32)
    tokens, logits, _ = converse(nothing[:, :0])
    out = whole(random_params(PERSONAPLEX), tokens[:, :, PERSONAPLEX.max_delay :])
    assert_teacher_forced(tokens, logits, out, range(4))
    for streams in (2, 4):
        again, _, _ = converse(nothing[:, :streams])
        np.testing.assert_array_equal(again, tokens)
    some = nothing.copy()
    some[:, 2] = codes_of(PERSONAPLEX, 2, FRAMES, seed=2)[:, 1]  # the user's first stream alone
    tokens, logits, _ = converse(some[:, 2:])
    np.testing.assert_array_equal(tokens[:, 3, PERSONAPLEX.max_delay :], some[:, 2, 1 : 1 + FRAMES - 2])
    assert_teacher_forced(tokens, logits, whole(random_params(PERSONAPLEX), tokens[:, :, 2:]), (0, 1, 2))


def test_a_delayed_code_is_what_the_depth_transformer_reads(random_params, converse):
    """With the second voice stream given, what follows it in the frame is predicted from it."""
    given = np.full((2, 4, FRAMES), UNGENERATED_TOKEN, np.int32)
    given[:, 1] = codes_of(PERSONAPLEX, 2, FRAMES, seed=3)[:, 1]
    tokens, logits, _ = converse(given)
    np.testing.assert_array_equal(tokens[:, 2, 2:], given[:, 1, 1 : 1 + FRAMES - 2])
    assert_teacher_forced(tokens, logits, whole(random_params(PERSONAPLEX), tokens[:, :, 2:]), range(4))


def test_nothing_given_before_outlives_a_reset(random_params, converse):
    user = codes_of(PERSONAPLEX, 2, FRAMES, seed=4)[:, 3:]
    nothing = np.full_like(user, UNGENERATED_TOKEN)
    fresh, _, _ = converse(nothing)
    _, _, stream = converse(user)
    stream = stream._replace(position=jnp.zeros_like(stream.position))
    stream = stream._replace(layers=init_stream(PERSONAPLEX, random_params(PERSONAPLEX), 2).layers)
    again, _, _ = converse(nothing, stream)
    np.testing.assert_array_equal(again, fresh)


def test_user_codes_may_have_as_many_streams_as_the_model_leaves_and_as_it_reads(random_params):
    params = random_params(HIBIKI)
    stream = init_stream(HIBIKI, params, 1)
    plain = dataclasses.replace(HIBIKI, model_type="moshi")  # Hibiki's user may end what is to be translated
    with pytest.raises(ValueError, match=r"user_codes\[0, 0\] = 12 is outside \[-1, 12\) of stream 3"):
        stream_step(plain, params, stream, np.full((1, 2), HIBIKI.card, np.int32))
    for streams in (1, 5):
        with pytest.raises(ValueError, match=r"user_codes must be integer of shape \(1, 2\).*, got int32\[1, "):
            stream_step(HIBIKI, params, stream, np.zeros((1, streams), np.int32))
    with pytest.raises(ValueError, match=r"user_codes\[0, 0\] = -3 is outside \[-2, 12\) of stream 2"):
        stream_step(HIBIKI, params, stream, np.array([[-3, 0, 0]], np.int32))
    with pytest.raises(ValueError, match=r"user_codes\[0, 1\] = -2 is outside \[-1, 13\) of stream 3"):
        stream_step(HIBIKI, params, stream, np.array([[0, -2, 0]], np.int32))
