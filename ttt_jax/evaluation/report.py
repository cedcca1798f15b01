"""The report of a run: sections with sentences, plots and tables, as one HTML file that needs nothing beside it."""

import base64
import dataclasses
import html
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from ttt_jax.files import write_atomically

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .2rem .8rem; text-align: right; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } audio { width: 100%; }
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are shown; every row has as many as there are columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the report; empty parts are left out.

    Attributes:
      heading: of the section.
      lines: sentences, plain text.
      figures: name of the PNG file, without suffix -> plot.
      tables: in order, below the plots.
      audio: a wav to listen to, embedded.
    """

    heading: str
    lines: Sequence[str] = ()
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    tables: Sequence[Table] = ()
    audio: pathlib.Path | None = None


def as_text(sections: Iterable[Section]) -> str:
    """The tables and sentences for a terminal."""
    parts = []
    for section in sections:
        parts += [text_table(table.columns, table.rows) for table in section.tables]
        parts += ["\n".join(section.lines)] if section.lines else []
    return "\n\n".join(parts)


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned for a terminal."""
    table = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def write_report(directory: pathlib.Path, title: str, sections: Sequence[Section]) -> pathlib.Path:
    """Write `report.html` and every section's plots as PNG files into `directory`; returns the report's path."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        parts += [f"<p>{html.escape(line)}</p>" for line in section.lines]
        for name, figure in section.figures.items():
            image = save_figure(directory / f"{name}.png", figure)
            parts.append(f'<img alt="{html.escape(name)}" src="{_data_url("image/png", image)}">')
        if section.audio is not None:
            parts.append(f'<audio controls src="{_data_url("audio/wav", section.audio.read_bytes())}"></audio>')
        parts += [_html_table(table) for table in section.tables]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    path = directory / "report.html"
    write_atomically(path, "\n".join([f'<!doctype html><html lang="en">{head}', *parts, "</html>\n"]))
    return path


def save_figure(path: pathlib.Path, figure: Figure) -> bytes:
    """Write the figure as a PNG file; returns the file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
    return buffer.getvalue()


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
    return f"<table><tr>{head}</tr>{body}</table>"
