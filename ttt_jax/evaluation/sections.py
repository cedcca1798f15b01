"""What the benchmarks found, in sentences, tables and plots, whichever way it came out."""

import dataclasses
import math
from collections.abc import Callable

from ttt_jax.evaluation import plots
from ttt_jax.evaluation.block_speed import BlockRun, BlockSpeed
from ttt_jax.evaluation.infill import InfillNLL
from ttt_jax.evaluation.nll_by_position import NLLByPosition
from ttt_jax.evaluation.recall import Recall, Recalled
from ttt_jax.evaluation.report import Section, Table
from ttt_jax.evaluation.speed import Speed, StreamSpeed
from ttt_jax.evaluation.statistics import Estimate

CONTRASTS = {
    "reset": "resetting it at every segment",
    "off": "switching TTT off in the same model",
    "baseline": "the baseline",
}


def nll_sections(result: NLLByPosition) -> list[Section]:
    """Sections of nll_by_position."""
    return [
        Section("NLL by position", _nll_lines(result), {"nll_by_position": plots.nll_figure(result)}),
        Section("Streams", (), {"streams": plots.streams_figure(result)}, [_streams_table(result)]),
    ]


def _streams_table(result: NLLByPosition) -> Table:
    """One row a stream: name, model, interval, tables, the model's lead, and whether it is enough."""
    rows = []
    for stream in result.streams:
        nll = stream.model.mean
        learned = "no tokens" if math.isnan(nll) else "yes" if nll < stream.bound else "no"
        numbers = (stream.unigram_entropy, stream.unigram, stream.bigram, stream.bound)
        interval = f"{stream.model.low:.3f} .. {stream.model.high:.3f}"
        rows.append([stream.name, f"{nll:.3f}", interval, *(f"{x:.3f}" for x in numbers), learned])
    columns = ["stream", "model NLL", "95 % interval", "unigram entropy", "unigram table", "bigram table"]
    return Table([*columns, "bound", "below"], rows)


def _nll_lines(result: NLLByPosition) -> list[str]:
    hours = result.num_frames / result.frame_rate_hz / 3600
    window = result.context_frames / result.frame_rate_hz
    lines = [
        f"{result.num_recordings} {result.split} recordings, {hours:.2f} hours, each scored whole and frame by frame "
        f"before the state learns it; attention sees {window:g} s."
    ]
    for memory in ("reset", "off"):
        for streams in ("audio", "text"):
            gains = [g for g in result.gains if (g.memory, g.streams, g.frames) == (memory, streams, "all")]
            gain = gains[0].beyond_context if gains else None
            if gain is not None and gain.num_tokens:
                lines.append(
                    f"Carrying the TTT state against {CONTRASTS[memory]}: {gain.mean:+.4f} nats per {streams} token "
                    f"({gain.low:+.4f} .. {gain.high:+.4f}) on frames beyond {window:g} s: {_verdict(gain)}."
                )
    return lines


def _verdict(gain: Estimate) -> str:
    if math.isnan(gain.low):
        return "too few recordings for an interval"
    if gain.low > 0:
        return "it helps"
    return "it hurts" if gain.high < 0 else "no difference that these recordings can show"


def recall_sections(result: Recall) -> list[Section]:
    """Sections of recall."""
    figures = {"recall": plots.recall_figure(result)}
    tables = [_recall_table(result), _buckets_table(result, "gap"), _buckets_table(result, "mentions")]
    return [Section("Recall of planted facts", [*_recall_lines(result), *result.notes], figures, tables)]


def _recall_lines(result: Recall) -> list[str]:
    window = result.window_frames / result.frame_rate_hz
    lines = [
        f"{result.num_answers} answers in {result.num_recordings} {result.split} recordings, each scored against "
        f"distractors from the state just before it; attention sees {window:g} s, a window, in each layer, and through "
        f"all layers {result.reach_windows:.3g} windows."
    ]
    for curve in result.curves:
        accuracy, margin = curve.beyond_window.accuracy, curve.beyond_window.margin
        if (curve.memory, curve.group) == ("carried", "all") and accuracy.num_tokens:
            lines.append(
                f"As {curve.modality}, beyond one window: the right answer comes first in {_percent(accuracy)} of "
                f"{accuracy.num_tokens} answers, {_against_chance(accuracy, result.chance)}; "
                f"it leads the distractors by {_number(margin, '+.3f')} nats."
            )
    for gain in result.gains:
        margin, accuracy = gain.beyond_window.margin, gain.beyond_window.accuracy
        if gain.group == "all" and margin.num_tokens:
            lines.append(
                f"Carrying the TTT state against {CONTRASTS[gain.memory]}, beyond one window, as {gain.modality}: "
                f"{_number(margin, '+.4f')} nats of margin, {_verdict(margin)}; accuracy {_percent(accuracy, '+.1f')}, "
                f"{_verdict(accuracy)}."
            )
    return lines


def _against_chance(accuracy: Estimate, chance: float) -> str:
    if math.isnan(accuracy.low):
        return f"chance is {chance:.0%}, too few recordings for an interval"
    if accuracy.low > chance:
        return f"above chance ({chance:.0%})"
    return f"below chance ({chance:.0%})" if accuracy.high < chance else f"not told apart from chance ({chance:.0%})"


def _recall_table(result: Recall) -> Table:
    """Every memory, modality and group, over all gaps."""
    rows = []
    for curve in result.curves:
        means = curve.overall
        cells = [_percent(means.accuracy), _number(means.margin, "+.3f"), _number(means.margin_per_token, "+.3f")]
        cells += [_number(means.rank, ".2f"), _number(means.nll, ".3f")]
        if means.nll.num_tokens and (curve.group == "all" or curve.memory in ("carried", "baseline")):
            answers = str(means.accuracy.num_tokens)
            rows.append([plots.label(curve.memory, result.curves), curve.modality, curve.group, answers, *cells])
    columns = ["model", "as", "answers that are", "number", "accuracy", "margin [nats]", "margin per token", "rank"]
    return Table([*columns, "NLL of the answer"], rows)


def _buckets_table(result: Recall, by: str) -> Table:
    """Accuracy and margin of all answers by gap or by mentions, memories side by side."""
    edges = result.gap_edges_windows if by == "gap" else result.mention_edges
    unit = "windows" if by == "gap" else "mentions"
    memories = list(dict.fromkeys(curve.memory for curve in result.curves))
    rows = []
    for modality in ("text", "audio"):
        curves = {c.memory: c for c in result.curves if (c.modality, c.group) == (modality, "all")}
        for i in range(len(edges)):
            buckets: dict[str, Recalled] = {m: getattr(curves[m], f"by_{by}")[i] for m in memories}
            number = buckets["carried"].accuracy.num_tokens
            if number:
                name = _bucket_name(edges, i, by)
                cells = [f"{_percent(b.accuracy)}; {_number(b.margin, '+.2f')}" for b in buckets.values()]
                rows.append([f"{modality}, {name} {unit}", str(number), *cells])
    columns = [f"{plots.label(memory, result.curves)}: accuracy; margin" for memory in memories]
    return Table(["by gap" if by == "gap" else "by mentions", "answers", *columns], rows)


def _bucket_name(edges, i: int, by: str) -> str:
    last = i + 1 == len(edges)
    if by == "mentions":
        return f"{edges[i]}{' or more' if last else ''}"
    return f"{edges[i]:g} or more" if last else f"{edges[i]:g} to {edges[i + 1]:g}"


def _percent(share: Estimate, form: str = ".1f") -> str:
    scaled = dataclasses.replace(share, mean=100 * share.mean, low=100 * share.low, high=100 * share.high)
    return _number(scaled, form) + " %"


def _number(estimate: Estimate, form: str) -> str:
    """Mean and interval."""
    if math.isnan(estimate.mean):
        return "none"
    interval = "" if math.isnan(estimate.low) else f" ({estimate.low:{form}} .. {estimate.high:{form}})"
    return f"{estimate.mean:{form}}{interval}"


def speed_sections(result: Speed) -> list[Section]:
    """Sections of speed."""
    tables = [_stream_table(result), _throughput_table(result)]
    return [Section("Speed and memory", _speed_lines(result), {"speed": plots.speed_figure(result)}, tables)]


def _speed_lines(result: Speed) -> list[str]:
    first, last = result.stream[0], result.stream[-1]
    lines = [
        f"On {result.device}, {result.num_cores} cores, {result.dtype}: a frame of {1000 / result.frame_rate_hz:g} ms "
        f"takes {first.ms_per_frame:.2f} ms from frame {first.start_frame} on and {last.ms_per_frame:.2f} ms up to "
        f"frame {last.end_frame}, "
        f"{last.ms_per_frame / first.ms_per_frame:.3f} times as long; the state takes {_mib(first.state_bytes)} and "
        f"{_mib(last.state_bytes)}, all arrays {_mib(first.live_bytes)} and {_mib(last.live_bytes)}, the process "
        f"{_mib(first.process_bytes)} and {_mib(last.process_bytes)}."
    ]
    for crossover in result.crossovers:
        lines.append(f"{crossover.name}, {crossover.work}, against full attention: {crossover.found}.")
    return lines


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f} MiB"


def _stream_table(result: Speed) -> Table:
    def row(at: StreamSpeed) -> list[str]:
        sizes = (at.state_bytes, at.live_bytes, at.process_bytes, at.device_bytes)
        times = [f"{at.ms_per_frame:.3f}", f"{at.low_ms:.3f} .. {at.high_ms:.3f}"]
        return [f"{at.start_frame} to {at.end_frame}", *times, *map(_mib, sizes)]

    columns = ["frames", "ms per frame", "quartiles", "state", "all arrays", "process", "device"]
    return Table(columns, [row(at) for at in result.stream])


def _throughput_table(result: Speed) -> Table:
    measured = [("operation", m) for m in result.ops] + [("model", m) for m in result.steps]
    lengths = sorted({m.length for _, m in measured})
    rows = []
    for kind, name, work in dict.fromkeys((kind, m.name, m.work) for kind, m in measured):
        rates = {m.length: m.tokens_per_s for k, m in measured if (k, m.name, m.work) == (kind, name, work)}
        rows.append([f"{kind}: {name}, {work}", *(f"{rates[n]:,.0f}" if n in rates else "" for n in lengths)])
    return Table(["tokens/s at a length of", *map(str, lengths)], rows)


def block_sections(result: BlockSpeed) -> list[Section]:
    """Sections of a block's speed."""
    tables = [_runs_table(result, "time", _milliseconds), _runs_table(result, "memory", lambda r: _mib(r.memory_bytes))]
    figures = {"block_speed": plots.block_figure(result)}
    return [Section(f"Speed and memory by {result.unit}", _block_lines(result), figures, tables)]


def _block_lines(result: BlockSpeed) -> list[str]:
    lines = [
        f"On {result.device}, {result.num_cores} cores, {result.dtype}: one block of width {result.width} with "
        f"{result.num_heads} heads, {result.unit} of {result.tokens_per_scene} tokens ({result.text_tokens} of them "
        f"text), mini-batches of {result.mini_batch_size}; full attention sees all {result.unit} at once."
    ]
    for c in result.crossovers:
        lines.append(f"{c.name}, {c.work}, {c.measure} against full attention: {c.found}.")
    return lines


def _milliseconds(run: BlockRun) -> str:
    return "not run" if math.isnan(run.ms) else f"{run.ms:.1f} ms"


def _runs_table(result: BlockSpeed, measure: str, cell: Callable[[BlockRun], str]) -> Table:
    runs = {(run.name, run.work, run.scenes): cell(run) for run in result.runs}
    numbers = sorted({run.scenes for run in result.runs})
    rows = [
        [f"{name}, {work}", *(runs[name, work, number] for number in numbers)]
        for name, work in dict.fromkeys((run.name, run.work) for run in result.runs)
    ]
    return Table([f"{measure} by {result.unit}", *map(str, numbers)], rows)


def infill_sections(result: InfillNLL) -> list[Section]:
    """Sections of infill."""
    rows = [
        [where, str(model.num_tokens), _number(model, ".3f"), _number(unigram, ".3f")]
        for where, model, unigram in (
            ("all", result.model, result.unigram),
            ("their segment has visible frames", result.seen, result.seen_unigram),
            ("their segment is masked as a whole", result.unseen, result.unseen_unigram),
        )
    ]
    table = Table(["masked tokens", "number", "model NLL", "unigram NLL"], rows)
    codebooks = enumerate(zip(result.by_codebook, result.unigram_by_codebook, strict=True))
    each = [[str(k), f"{model:.3f}", f"{unigram:.3f}"] for k, (model, unigram) in codebooks]
    tables = [table, Table(["codebook", "model NLL", "unigram NLL"], each)]
    return [Section("Masked spans", _infill_lines(result), tables=tables)]


def _infill_lines(result: InfillNLL) -> list[str]:
    spans, seconds = result.spans, result.segment / result.frame_rate_hz
    return [
        f"{result.num_recordings} {result.split} recordings, {result.num_frames} frames, in crops of "
        f"{spans.num_frames}, {spans.masked_share:.0%} of them masked in spans of {spans.shortest_span} to "
        f"{spans.longest_span} frames, the same ones for every model; attention sees segments of {seconds:g} s, "
        f"{'without TTT' if result.ssm_layer is None else 'TTT the whole crop'}.",
        f"Nats per masked token: {_number(result.model, '.4f')}, by training's unigram table "
        f"{_number(result.unigram, '.4f')}.",
    ]
