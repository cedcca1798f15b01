"""NLL of masked spans: of a model that is known, on the same spans each time, and compared over seeds."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ttt_jax.data.tokens import TokenInfo
from ttt_jax.evaluation import infill as module
from ttt_jax.evaluation.compare_infill import compare_infill, summary
from ttt_jax.evaluation.infill import Spans, infill_nll
from ttt_jax.evaluation.report import as_text
from ttt_jax.evaluation.results import write_result
from ttt_jax.evaluation.sections import infill_sections
from ttt_jax.models.infill import Infill, InfillConfig

CONFIG = InfillConfig(num_codebooks=2, card=6, text_card=5, dim=8, num_layers=1, num_heads=2, segment=4, ssm_layer=None)
SPANS = Spans(num_frames=20, masked_share=0.5, shortest_span=2, longest_span=8)


class Recordings:
    """As much of a TokenDataset as scoring needs; the last codebook is always 3."""

    info = TokenInfo("codec2", 12.5, 8000, num_codebooks=1, card=6, text_card=5)

    def __init__(self, *lengths):
        rng = np.random.default_rng(len(lengths))
        self.num_frames = np.array(lengths)
        self._codes = [rng.integers(0, 5, (3, n)).astype(np.int32) for n in lengths]
        for codes in self._codes:
            codes[2] = 3

    def __len__(self):
        return len(self._codes)

    def codes(self, index):
        return self._codes[index]


@pytest.fixture(scope="module")
def result():
    """Of a model whose heads are zero: every code is as likely as every other."""
    shapes = jax.eval_shape(
        Infill(CONFIG).init, jax.random.key(0), np.zeros((1, 3, 2), np.int32), np.zeros((1, 2), bool)
    )["params"]
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    return infill_nll(CONFIG, params, Recordings(50, 7, 23, 61), Recordings(300, 200), SPANS, split="test")


def test_a_model_that_knows_nothing_scores_the_logarithm_of_its_vocabulary(result):
    for estimate in (result.model, result.seen, result.unseen):
        np.testing.assert_allclose(estimate.mean, np.log(6), rtol=1e-6)
    # Half of each crop: 10 + 10 + 5 of 50 frames, 4 of 7, 10 + 2 of 23, 30 of 61 and one of its last crop's frame.
    assert result.model.num_tokens == 2 * (25 + 4 + 12 + 31)
    assert result.seen.num_tokens + result.unseen.num_tokens == result.model.num_tokens
    assert result.unseen.num_tokens > 0


def test_the_unigram_is_of_training(result):
    np.testing.assert_allclose(result.unigram_by_codebook[1], -np.log(501 / 506), rtol=1e-5)
    assert 1.55 < result.unigram_by_codebook[0] < 1.68  # five codes about alike


def test_frames_whose_segment_shows_nothing():
    masked = np.zeros((1, 10), bool)
    masked[0, 3:9] = True
    batch = module.MaskedBatch(np.zeros((1, 3, 10), np.int32), masked, np.array([9], np.int32))
    # Segments 0-3, 4-7, 8-9: the second is masked, and so is all that is real of the third.
    assert module._unseen(batch, CONFIG)[0].tolist() == [False] * 4 + [True] * 6
    assert not module._unseen(batch, dataclasses.replace(CONFIG, overlap=1)).any()


def test_spans_do_not_depend_on_the_model_or_the_other_recordings():
    few, more = (dict(zip("abc", module._batches(Recordings(*n), SPANS), strict=False)) for n in ((50,), (50, 23)))
    np.testing.assert_array_equal(few["a"][1].masked[:3], more["a"][1].masked[:3])


def test_a_dataset_of_another_codec_is_refused():
    with pytest.raises(ValueError, match=r"--data: expected the model's .* \(2, 7, 5\), the dataset has \(2, 6, 5\)"):
        infill_nll(dataclasses.replace(CONFIG, card=7), {}, Recordings(9), Recordings(9), SPANS, split="test")


def test_runs_are_compared_over_their_seeds(result, tmp_path):
    for name, mean in {"a0": 1.0, "a1": 1.2, "b0": 1.5, "b1": 1.5}.items():
        (tmp_path / name).mkdir()
        changed = dataclasses.replace(result, model=dataclasses.replace(result.model, mean=mean))
        write_result(tmp_path / name / "infill.json", changed)
    groups = {"with": [tmp_path / "a0", tmp_path / "a1"], "without": [tmp_path / "b0", tmp_path / "b1"]}
    compared = compare_infill(groups)
    assert compared.nll["with"]["model"].mean == pytest.approx(1.1)
    assert compared.nll["with"]["model"].deviation == pytest.approx(0.02**0.5)
    # sqrt(0.02 / 2) is the standard error.
    assert "with against without, all masked tokens: -0.4000 nats (standard error 0.1000)." in summary(compared)
    assert "1.28" not in as_text(infill_sections(result))
    same = json.loads((tmp_path / "b1" / "infill.json").read_text())
    for name in ("num_frames", "segment"):
        (tmp_path / "b1" / "infill.json").write_text(json.dumps(same | {name: 1}))
        with pytest.raises(ValueError, match=rf"a0 and .*b1 differ in {name}; evaluate all runs with the same"):
            compare_infill(groups)
    with pytest.raises(FileNotFoundError, match=r"run `python eval.py --workdir=.*c --benchmark=infill`"):
        compare_infill({"with": [tmp_path / "c"]})
