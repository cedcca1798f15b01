"""Recall of planted facts: whether the model prefers the right answer to distractors, long after the mention.

Each answer is scored from the very state that the model has just before it, and nine distractors from copies of that
state, once as text and once as audio (see `answers`). Beside the model stand the same with its TTT state reset, with
TTT off, and a baseline trained without TTT.
"""

import dataclasses
import importlib.util
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ttt_jax.data.reader import TokenDataset
from ttt_jax.data.text import load_tokenizer
from ttt_jax.evaluation.answers import Answer, Candidates, find_answers
from ttt_jax.evaluation.forks import Fork, score_forks
from ttt_jax.evaluation.scoring import MEMORIES, check_streams
from ttt_jax.evaluation.statistics import Estimate, mean_over_recordings
from ttt_jax.models.moshi import MoshiConfig

GAP_EDGES_WINDOWS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
NUM_MENTIONS = (1, 2, 3, 4)
GROUPS: dict[str, Callable[[Answer], bool]] = {
    "all": lambda answer: True,
    "held-out values": lambda answer: answer.held_out,
    "common values": lambda answer: not answer.held_out,
    "said facts": lambda answer: not answer.heard,
    "heard facts": lambda answer: answer.heard,
}
"""Answers by whether training ever met the value as a fact, and whether the speaker ever said it or only heard it."""

BASELINE = "baseline"
PARAMETER_TOLERANCE = 0.02
TIE_NATS = 1e-4
"""Candidates closer than this are tied: it is less than what rounding does to the NLL of an answer."""


@dataclasses.dataclass(frozen=True)
class Recalled:
    """Means over some answers, with intervals over recordings. Better is higher but for `rank` and `nll`."""

    accuracy: Estimate  # share of answers in which the right candidate is the likeliest; ties count by share
    rank: Estimate  # of the right candidate, from 1; half for each tie
    margin: Estimate  # mean over distractors of their NLL less that of the right candidate, in nats per answer
    margin_per_token: Estimate  # the same of the NLLs per token
    nll: Estimate  # of the recorded answer, in nats per token


@dataclasses.dataclass(frozen=True)
class Curve:
    """How one model recalls one group of answers, as text or as audio."""

    memory: str  # one of scoring.MEMORIES, or "baseline"
    modality: str  # "text" or "audio"
    group: str  # one of GROUPS
    overall: Recalled
    beyond_window: Recalled  # gaps of an attention window or more
    by_gap: list[Recalled]
    by_mentions: list[Recalled]


@dataclasses.dataclass(frozen=True)
class Recall:
    """The benchmark's result.

    Attributes:
      split: of the dataset.
      num_recordings: that hold answers.
      num_answers: scored.
      num_without_text: answers whose value the text stream does not spell, scored as audio alone.
      frame_rate_hz: frames per second.
      window_frames: the longest attention context of the model's layers; gaps count in these.
      reach_windows: how far back a token can reach through the windows of all layers one behind the other.
      segment_frames: what "reset" means: the TTT state forgets every so many frames.
      gap_edges_windows: gap buckets begin at these; each ends at the next, the last has no end.
      mention_edges: the same for numbers of mentions, each bucket one number, the last has no end.
      chance: accuracy of a guess.
      num_parameters: of the model.
      baseline_parameters: of the baseline, None without one.
      curves: every memory, modality and group.
      gains: carried against every other memory on the same answers. All are positive where carrying the state helps:
        `rank` and `nll` are the other's less the carried one's.
      notes: what to know before reading the numbers.
    """

    split: str
    num_recordings: int
    num_answers: int
    num_without_text: int
    frame_rate_hz: float
    window_frames: int
    reach_windows: float
    segment_frames: int
    gap_edges_windows: list[float]
    mention_edges: list[int]
    chance: float
    num_parameters: int
    baseline_parameters: int | None
    curves: list[Curve]
    gains: list[Curve]
    notes: list[str]


def recall(
    config: MoshiConfig,
    params: Any,
    dataset: TokenDataset,
    tokenizer: pathlib.Path,
    *,
    split: str,
    baseline: tuple[MoshiConfig, Any] | None = None,
    segment_frames: int | None = None,
    gap_edges_windows: Sequence[float] = GAP_EDGES_WINDOWS,
) -> Recall:
    """Score every answer of `dataset` to a question about a planted fact.

    Args:
      config: of the model.
      params: Moshi's parameter tree.
      dataset: held-out recordings of `ttt_jax.data.conversations`.
      tokenizer: the dataset's sentencepiece model; without the file, text is left out.
      split: name of `dataset`'s split, for the result.
      baseline: config and parameters of another model for the same streams, such as one trained without TTT.
      segment_frames: frames between resets of the TTT state; None takes the model's attention context.
      gap_edges_windows: where buckets of gaps begin, ascending.

    Raises:
      ValueError: the dataset's streams are not the models', or it holds no answers.
    """
    check_streams(config, dataset.info, "dataset")
    if baseline is not None:
        check_streams(baseline[0], dataset.info, "dataset (for the baseline)")
    window = config.longest_context
    segment = window if segment_frames is None else segment_frames
    answers, notes = _answers(dataset, tokenizer)
    models = {memory: (config, params, memory) for memory in (MEMORIES if config.ttt_layers else MEMORIES[:1])}
    if baseline is not None:
        models[BASELINE] = (*baseline, "carried")
        notes += _unequal_sizes(params, baseline[1])
    frames = sum(max((answer.frame for answer in found), default=0) for found in answers)
    with tqdm(total=frames * len(models), unit="frame", desc="recall") as bar:
        outcomes = {
            name: _outcomes(*model, dataset, answers, reset_frames=segment, progress=bar.update)
            for name, model in models.items()
        }
    edges = list(gap_edges_windows)
    cut = _Cut(answers, dataset.info.frame_rate_hz / window, edges)
    curves = [cut.curves(name, modality, its[modality]) for name, its in outcomes.items() for modality in its]
    gains = [
        cut.curves(name, modality, outcomes["carried"][modality].gain_over(its[modality]))
        for name, its in outcomes.items()
        if name != "carried"
        for modality in its
    ]
    everyone = [answer for found in answers for answer in found]
    return Recall(
        split=split,
        num_recordings=sum(bool(found) for found in answers),
        num_answers=len(everyone),
        num_without_text=sum(answer.text is None for answer in everyone),
        frame_rate_hz=dataset.info.frame_rate_hz,
        window_frames=window,
        reach_windows=sum(config.layer_attention(i)[1] - 1 for i in range(config.num_layers)) / window,
        segment_frames=segment,
        gap_edges_windows=edges,
        mention_edges=list(NUM_MENTIONS),
        chance=_chance(everyone),
        num_parameters=num_parameters(params),
        baseline_parameters=None if baseline is None else num_parameters(baseline[1]),
        curves=list(itertools.chain(*curves)),
        gains=list(itertools.chain(*gains)),
        notes=notes,
    )


def num_parameters(params: Any) -> int:
    """Numbers in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _unequal_sizes(params, baseline) -> list[str]:
    own, other = num_parameters(params), num_parameters(baseline)
    if abs(own - other) <= PARAMETER_TOLERANCE * own:
        return []
    return [
        f"The baseline has {other:,} parameters and the model {own:,}: they differ by {abs(other / own - 1):.1%}, more "
        f"than {PARAMETER_TOLERANCE:.0%}, so the comparison is not at equal size."
    ]


def _answers(dataset: TokenDataset, tokenizer: pathlib.Path) -> tuple[list[list[Answer]], list[str]]:
    """Every recording's answers, and what could not be scored."""
    notes = []
    synthesize = importlib.util.find_spec("espeakng_loader") is not None
    if not synthesize:
        notes.append("No audio candidates: synthesis needs espeakng-loader, pip install 'ttt-jax[demo]'.")
    pieces = load_tokenizer(tokenizer) if tokenizer.is_file() else None
    if pieces is None:
        notes.append(f"No text candidates: the dataset has no {tokenizer.name}.")
    found = [
        find_answers(dataset[i], dataset.info, pieces, synthesize=synthesize)
        for i in tqdm(range(len(dataset)), desc="candidates", unit="recording")
    ]
    if not any(found):
        raise ValueError(
            "dataset: expected recordings with questions about planted facts in their metadata, got none; make some "
            "with `python -m ttt_jax.data.conversations --hours=8 --output=DIR`."
        )
    if any(answer.held_out for answers in found for answer in answers):
        notes.append(
            "Held-out values compete with distractors of which training has met most, so a model that remembers "
            "nothing falls below chance on them; differences between memories on the same answers are free of that."
        )
    return found, notes


def _chance(answers: Sequence[Answer]) -> float:
    """Accuracy of a guess: one in as many as there are candidates."""
    return float(np.mean([1 / len(c.codes) for a in answers for c in (a.text, a.audio) if c is not None] or [np.nan]))


@dataclasses.dataclass(frozen=True)
class _Outcomes:
    """Of all answers, in order, [answers] each; NaN where there are no candidates, weight 0 where there is no token."""

    accuracy: np.ndarray
    rank: np.ndarray
    margin: np.ndarray
    margin_per_token: np.ndarray
    nll: np.ndarray
    num_tokens: np.ndarray

    def gain_over(self, other: "_Outcomes") -> "_Outcomes":
        return _Outcomes(
            accuracy=self.accuracy - other.accuracy,
            rank=other.rank - self.rank,
            margin=self.margin - other.margin,
            margin_per_token=self.margin_per_token - other.margin_per_token,
            nll=other.nll - self.nll,
            num_tokens=self.num_tokens,
        )


def _outcomes(config, params, memory, dataset, answers, **options) -> dict[str, _Outcomes]:
    """Modality -> what one model makes of all answers, in one walk through each recording that has some."""
    totals = []
    for index, found in enumerate(answers):
        parts = [part for answer in found for part in (answer.text, answer.audio, answer.recorded)]
        forks = [Fork(a.frame, c.codes) for a in found for c in (a.text, a.audio, a.recorded) if c is not None]
        codes = dataset[index].codes if found else np.zeros((config.num_streams, 0), np.int32)
        nll = iter(score_forks(config, params, codes, forks, memory=memory, **options))
        totals += [None if part is None else _totals(part, next(nll)) for part in parts]
    texts, audios, recorded = totals[0::3], totals[1::3], totals[2::3]
    return {"text": _compare(texts, texts), "audio": _compare(audios, recorded)}


def _totals(candidates: Candidates, nll: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of each candidate, [N] each."""
    return np.where(candidates.scored, nll, 0).sum((1, 2), dtype=np.float64), candidates.scored.sum((1, 2))


def _compare(candidates, recorded) -> _Outcomes:
    """Outcomes from the candidates' totals, or None, and those of which the first is what was recorded."""
    standings = [(np.nan,) * 4 if totals is None else standing(*totals) for totals in candidates]
    own = [(np.nan, 0) if totals is None else (totals[0][0], totals[1][0]) for totals in recorded]
    return _Outcomes(*np.array(standings).T, *np.array(own, np.float64).T)


def standing(nats: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float, float]:
    """Accuracy, rank, margin and margin per token of the first of N candidates with `nats [N]` in `tokens [N]`."""
    margins, per_token = (x[1:] - x[0] for x in (nats, nats / np.maximum(tokens, 1)))
    ties = int((np.abs(margins) < TIE_NATS).sum())
    better = int((margins <= -TIE_NATS).sum())
    accuracy = 0.0 if better else 1 / (1 + ties)
    return accuracy, 1 + better + ties / 2, float(margins.mean()), float(per_token.mean())


class _Cut:
    """Sorts answers into groups and buckets."""

    def __init__(self, answers: Sequence[Sequence[Answer]], windows_per_s: float, edges: list[float]):
        everyone = [answer for found in answers for answer in found]
        self.recording = np.repeat(np.arange(len(answers)), [len(found) for found in answers])
        self.num_recordings = len(answers)
        self.groups = {name: np.array([belongs(a) for a in everyone]) for name, belongs in GROUPS.items()}
        gap = np.array([answer.gap_s for answer in everyone]) * windows_per_s
        mentions = np.array([answer.num_mentions for answer in everyone])
        self.gaps = [(low <= gap) & (gap < high) for low, high in itertools.pairwise([*edges, np.inf])]
        self.mentions = [
            (low <= mentions) & (mentions < high) for low, high in itertools.pairwise([*NUM_MENTIONS, np.inf])
        ]
        self.beyond = gap >= 1

    def curves(self, memory: str, modality: str, outcomes: _Outcomes) -> list[Curve]:
        """One of each group."""
        return [
            Curve(
                memory=memory,
                modality=modality,
                group=group,
                overall=self._mean(outcomes, mask),
                beyond_window=self._mean(outcomes, mask & self.beyond),
                by_gap=[self._mean(outcomes, mask & bucket) for bucket in self.gaps],
                by_mentions=[self._mean(outcomes, mask & bucket) for bucket in self.mentions],
            )
            for group, mask in self.groups.items()
        ]

    def _mean(self, outcomes: _Outcomes, mask: np.ndarray) -> Recalled:
        names = ("accuracy", "rank", "margin", "margin_per_token")
        there = (mask & ~np.isnan(outcomes.accuracy)).astype(np.float64)
        means = {name: self._estimate(getattr(outcomes, name), there) for name in names}
        return Recalled(**means, nll=self._estimate(outcomes.nll, outcomes.num_tokens * mask))

    def _estimate(self, values: np.ndarray, weights: np.ndarray) -> Estimate:
        """Of `values [answers]`, each a sum over `weights [answers]` things; without weight a value does not count."""
        sums, counts = (
            np.bincount(self.recording, weights=x, minlength=self.num_recordings)
            for x in (np.where(weights > 0, values, 0), weights)
        )
        return mean_over_recordings(sums, counts)
