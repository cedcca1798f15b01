"""Recall's numbers are those of a plain pass over the recording with each candidate written into it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest

from ttt_jax.data.text import RESERVED_IDS, text_stream
from ttt_jax.evaluation.recall import num_parameters, recall, standing
from ttt_jax.evaluation.scoring import without_ttt
from ttt_jax.models.moshi import Moshi, token_nll

SEGMENT = 7
CLOSE = {"rtol": 0, "atol": 3e-5}  # sums of a few NLLs, each from float32 logits of order 1
ANSWERS = [(25, 2, "aba", 1.6), (46, 3, "aba", 1.7), (52, 4, "ab ba", 1.7)]  # frame, index of the word, value, gap in s


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    planted.write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return planted.load_tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def result(config, params, tokenizer, tokenizer_path):
    other = jax.tree.map(lambda x: 0.9 * x, params)
    return recall(
        config, params, planted.dataset(tokenizer), tokenizer_path, split="test", segment_frames=SEGMENT,
        baseline=(config, other),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(config, params, codes):
    return Moshi(config).apply({"params": params}, codes)


def plain_text_nll(config, params, tokenizer, codes, answer, value):
    """Nats and number of the value's pieces: the transcript written anew, the other streams as `answers` says."""
    frame, first, recorded, _ = answer
    spoken, words = value.split(), list(planted.WORDS)
    for i in range(len(recorded.split())):
        words[first + i] = words[first + i]._replace(text=spoken[i] if i < len(spoken) else "")
    until = first + len(spoken)
    with_value = text_stream(words[:until], tokenizer, planted.FRAMES, planted.RATE_HZ)
    without = text_stream(words[:first], tokenizer, planted.FRAMES, planted.RATE_HZ)
    spliced = codes.copy()
    spliced[0] = with_value
    spliced[1:3, frame:] = -1
    spliced[3:, frame:] = codes[3:, frame - 1 : frame]
    nll = token_nll(teacher_forced(config, params, spliced[None]).text_logits, spliced[None, :1])[0, 0]
    pieces = (with_value >= RESERVED_IDS) & ~(without >= RESERVED_IDS)
    assert tokenizer.decode([int(piece) for piece in with_value[pieces]]) == value
    return float(nll[pieces].sum()), int(pieces.sum())


def curve_of(result, memory, modality, group="all", among="curves"):
    curves = getattr(result, among)
    return next(c for c in curves if (c.memory, c.modality, c.group) == (memory, modality, group))


def test_text_equals_a_plain_pass_with_the_candidate_written_into_the_recording(config, params, tokenizer, result):
    recordings = planted.dataset(tokenizer)
    for memory, its in (("carried", params), ("off", without_ttt(params))):
        standings, nats, tokens = [], 0.0, 0
        for recording in recordings:
            for answer in ANSWERS:
                fact = next(f for f in planted.FACTS if f["value"] == answer[2])
                scores = [
                    plain_text_nll(config, its, tokenizer, recording.codes, answer, value)
                    for value in (fact["value"], *fact["distractors"])
                ]
                standings.append(standing(*np.array(scores).T))
                nats, tokens = nats + scores[0][0], tokens + scores[0][1]
        accuracy, rank, margin, per_token = np.mean(standings, axis=0)
        found = curve_of(result, memory, "text").overall
        np.testing.assert_allclose(found.margin.mean, margin, **CLOSE)
        np.testing.assert_allclose(found.margin_per_token.mean, per_token, **CLOSE)
        np.testing.assert_allclose(found.nll.mean, nats / tokens, **CLOSE)
        assert (found.accuracy.mean, found.rank.mean) == (accuracy, rank)
        assert (found.nll.num_tokens, found.margin.num_tokens, found.margin.num_recordings) == (tokens, 6, 2)


def test_audio_of_the_recorded_answer_equals_a_plain_pass(config, params, tokenizer, result):
    nats, tokens = 0.0, 0
    for recording in planted.dataset(tokenizer):
        spoken = [e for e in recording.metadata["spoken"] if e["role"] == "answer" and e["fact"] < 2]
        for event in spoken:
            start, end = event["start_frame"], event["end_frame"]
            codes = np.pad(recording.codes, ((0, 0), (0, config.max_delay)))  # delayed streams end later
            codes[:, end:] = -1
            codes[0, start:] = -1
            codes[3:, start:end] = codes[3:, start - 1 : start]
            nll = token_nll(teacher_forced(config, params, codes[None]).logits, codes[None, 1:3])[0, :, start:end]
            nats, tokens = nats + float(nll.sum()), tokens + nll.size
    found = curve_of(result, "carried", "audio").overall
    np.testing.assert_allclose(found.nll.mean, nats / tokens, **CLOSE)
    assert found.nll.num_tokens == tokens
    assert np.isnan(found.accuracy.mean)  # without voices there are no audio candidates


def test_memories_differ_and_gains_are_differences_on_the_same_answers(result):
    carried = curve_of(result, "carried", "text").overall
    for memory in ("reset", "off", "baseline"):
        other, gain = curve_of(result, memory, "text").overall, curve_of(result, memory, "text", among="gains").overall
        assert abs(gain.margin.mean) > 1e-3
        np.testing.assert_allclose(gain.margin.mean, carried.margin.mean - other.margin.mean, **CLOSE)
        np.testing.assert_allclose(gain.nll.mean, other.nll.mean - carried.nll.mean, **CLOSE)
        np.testing.assert_allclose(gain.rank.mean, other.rank.mean - carried.rank.mean, **CLOSE)


def test_answers_fall_into_their_buckets(config, result):
    assert result.window_frames == config.context == 4
    assert (result.num_answers, result.num_without_text, result.num_recordings) == (6, 0, 2)
    np.testing.assert_allclose(result.chance, 1 / 3)
    curve = curve_of(result, "carried", "text")
    # Gaps of 16, 17 and 17 frames are 4 to 8 windows; numbers of mentions are 1, 2 and 2, in two recordings.
    assert [b.accuracy.num_tokens for b in curve.by_gap] == [0, 0, 0, 0, 6, 0, 0]
    assert [b.accuracy.num_tokens for b in curve.by_mentions] == [2, 4, 0, 0]
    assert curve.beyond_window == curve.overall
    numbers = {
        c.group: c.overall.accuracy.num_tokens for c in result.curves if (c.memory, c.modality) == ("off", "text")
    }
    assert numbers == {"all": 6, "held-out values": 2, "common values": 4, "said facts": 4, "heard facts": 2}


def test_a_candidate_like_the_right_one_has_no_margin(config, params, tokenizer, tokenizer_path):
    facts = [{**fact, "distractors": [fact["value"]] * 3} for fact in planted.FACTS]
    alike = recall(config, params, planted.dataset(tokenizer, seeds=(0,), facts=facts), tokenizer_path, split="test")
    for memory in ("carried", "reset", "off"):
        found = curve_of(alike, memory, "text").overall
        np.testing.assert_allclose(found.margin.mean, 0, **CLOSE)
        assert (found.accuracy.mean, found.rank.mean) == (0.25, 2.5)


def test_nothing_from_the_answer_on_is_seen(config, params, tokenizer, tokenizer_path):
    """Other sounds in the answer's frames and after change no candidate's score."""

    def margins(change):
        dataset = planted.dataset(tokenizer, seeds=(0,), facts=planted.FACTS)
        codes = dataset._source[0]["codes"]
        change(codes)
        meta = {**planted.metadata(), "spoken": planted.metadata()["spoken"][:4]}  # the first answer alone
        dataset._source[0]["metadata"] = planted.json.dumps(meta).encode()
        result = recall(config, params, dataset, tokenizer_path, split="test")
        return curve_of(result, "carried", "text").overall.margin.mean

    def sound(first):
        def change(codes):
            codes[first:, 1:] = (codes[first:, 1:] + 7) % 20

        return change

    assert margins(sound(60)) == margins(sound(25))
    assert abs(margins(sound(60)) - margins(sound(24))) > 1e-3


@pytest.mark.parametrize(
    ("nats", "expected"),
    [
        ([1.0, 2.0, 4.0], (1.0, 1.0, 2.0)),
        ([2.0, 1.0, 4.0], (0.0, 2.0, 0.5)),
        ([1.0, 1.0, 4.0], (0.5, 1.5, 1.5)),
        ([3.0, 1.0, 3.0], (0.0, 2.5, -1.0)),
    ],
)
def test_standing(nats, expected):
    accuracy, rank, margin, per_token = standing(np.array(nats), np.array([1, 2, 4]))
    assert (accuracy, rank, margin) == expected
    assert per_token == pytest.approx(np.mean([nats[1] / 2, nats[2] / 4]) - nats[0])


def test_a_baseline_of_another_size_is_noted(config, params, tokenizer, tokenizer_path, result):
    assert result.baseline_parameters == result.num_parameters == num_parameters(params)
    assert not any("baseline" in note for note in result.notes)
    bare = dataclasses.replace(config, ttt=None)
    small = jax.jit(Moshi(bare).init)(jax.random.key(0), jnp.zeros((1, 5, 2), jnp.int32))["params"]
    one = planted.dataset(tokenizer, seeds=(0,))
    compared = recall(config, params, one, tokenizer_path, split="test", baseline=(bare, small))
    assert any("so the comparison is not at equal size" in note for note in compared.notes)
    alone = recall(bare, small, one, tokenizer_path, split="test")
    assert {c.memory for c in alone.curves} == {"carried"}
    assert alone.gains == []


def test_bad_datasets_are_named(config, params, tokenizer, tokenizer_path):
    one = planted.dataset(tokenizer, seeds=(0,))
    with pytest.raises(ValueError, match="expected card 100 as the model has, got 20"):
        recall(dataclasses.replace(config, card=100), params, one, tokenizer_path, split="test")
    one._source[0]["metadata"] = b"{}"
    with pytest.raises(ValueError, match="expected recordings with questions about planted facts"):
        recall(config, params, one, tokenizer_path, split="test")
