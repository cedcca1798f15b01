"""The report of a run: one HTML file that needs nothing beside it."""

import base64
import html
import io
import math
import pathlib
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

from ttt_jax.evaluation.nll_by_position import NLLByPosition
from ttt_jax.files import write_atomically

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .2rem .8rem; text-align: right; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } audio { width: 100%; }
"""


def stream_rows(result: NLLByPosition) -> list[list[str]]:
    """One row a stream: name, model, interval, tables, the model's lead, and whether it is enough."""
    rows = []
    for stream in result.streams:
        nll = stream.model.mean
        learned = "no tokens" if math.isnan(nll) else "yes" if nll < stream.bound else "no"
        interval = f"{stream.model.low:.3f} .. {stream.model.high:.3f}"
        numbers = (stream.unigram_entropy, stream.unigram, stream.bigram, stream.bound)
        rows.append([stream.name, f"{nll:.3f}", interval, *(f"{x:.3f}" for x in numbers), learned])
    return rows


STREAM_COLUMNS = [
    "stream",
    "model NLL",
    "95 % interval",
    "unigram entropy",
    "unigram table",
    "bigram table",
    "bound",
    "below",
]


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned for a terminal."""
    table = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def summary(result: NLLByPosition) -> list[str]:
    """Sentences that say what was found, whichever way it came out."""
    hours = result.num_frames / result.frame_rate_hz / 3600
    window = result.context_frames / result.frame_rate_hz
    lines = [
        f"{result.num_recordings} {result.split} recordings, {hours:.2f} hours, each scored whole and frame by frame "
        f"before the state learns it; attention sees {window:g} s."
    ]
    for memory, what in (("reset", "resetting it at every segment"), ("off", "switching TTT off in the same model")):
        for streams in ("audio", "text"):
            gains = [g for g in result.gains if (g.memory, g.streams, g.frames) == (memory, streams, "all")]
            gain = gains[0].beyond_context if gains else None
            if gain is not None and gain.num_tokens:
                lines.append(
                    f"Carrying the TTT state against {what}: {gain.mean:+.4f} nats per {streams} token "
                    f"({gain.low:+.4f} .. {gain.high:+.4f}) on frames beyond {window:g} s: {_verdict(gain)}."
                )
    return lines


def _verdict(gain) -> str:
    if math.isnan(gain.low):
        return "too few recordings for an interval"
    if gain.low > 0:
        return "it helps"
    return "it hurts" if gain.high < 0 else "no difference that these recordings can show"


def write_report(
    path: pathlib.Path,
    result: NLLByPosition,
    figures: dict[str, Figure],
    *,
    title: str,
    audio: pathlib.Path | None = None,
    audio_note: str = "",
) -> None:
    """Write the report to `path`; the wav is embedded.

    Args:
      path: of the HTML file.
      result: of the benchmark.
      figures: heading -> plot, in order.
      title: of the page.
      audio: a wav to listen to.
      audio_note: what is to be heard in it, plain text.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in summary(result))]
    for heading, figure in figures.items():
        name, url = html.escape(heading), _data_url("image/png", png(figure))
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="{url}">')
    if audio is not None:
        url = _data_url("audio/wav", audio.read_bytes())
        parts.append(f"<h2>Continuation</h2><p>{html.escape(audio_note)}</p>")
        parts.append(f'<audio controls src="{url}"></audio>')
    parts.append("<h2>Streams</h2>" + _html_table(STREAM_COLUMNS, stream_rows(result)))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    page = "\n".join([f'<!doctype html><html lang="en">{head}', *parts, "</html>\n"])
    write_atomically(path, page)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
