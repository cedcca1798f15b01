"""Event files for TensorBoard, written without TensorFlow: `tensorboard --logdir=WORKDIR`."""

import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENTS = "tensorboard"


class TensorBoard:
    """Scalars, images and audio by step, on the disk when a method returns; a context manager.

    Opening it for a run that goes on after update `step` makes TensorBoard forget what a killed run wrote beyond it,
    since those updates are done again.

    Args:
        workdir: The run's directory; event files go to `workdir/tensorboard`, a new one each time.
        step: The updates done so far.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        folder = workdir / EVENTS
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files by name. The writer's own are equal within a second, and it empties a file it finds.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception) -> None:
        self._events.close()

    def scalars(self, step: int, tree: Mapping[str, Any]) -> None:
        """Writes nested mappings of numbers and arrays; names are joined by `/`, and so are an array's indices."""
        values = [value for path, number in _numbers(tree) for value in summary.scalar(path, number).value]
        self._write(step, summary=summary.Summary(value=values))

    def image(self, step: int, name: str, figure: "Figure") -> None:
        """Writes a Matplotlib figure as a PNG of its own size."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: a run's start need not wait for it

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())
        self._write(step, summary=summary.image(name, pixels, dataformats="HWC"))

    def audio(self, step: int, name: str, wav: np.ndarray, sample_rate_hz: int) -> None:
        """Writes float [samples] or [samples, channels], 1 or 2 channels, as 16-bit WAV; clipped to [-1, 1]."""
        wav = np.asarray(wav)
        if wav.ndim not in (1, 2) or wav.size == 0 or wav.shape[1:] not in ((), (1,), (2,)):
            raise ValueError(f"wav: expected [samples] or [samples, 1 or 2 channels], not empty, got {wav.shape}")
        if not np.issubdtype(wav.dtype, np.floating) or not np.isfinite(wav).all():
            raise ValueError(f"wav: expected finite floats in [-1, 1], got {wav.dtype} with other values")
        self._write(step, summary=summary.audio(name, np.clip(wav, -1, 1), sample_rate_hz))

    def _write(self, step: int, **what: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))
        self._events.flush()


def _numbers(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}/")
        else:
            for index, number in np.ndenumerate(np.asarray(value)):
                yield "/".join([f"{path}{name}", *map(str, index)]), float(number)


def losses_figure(validation: Mapping[str, Any]) -> "Figure":
    """The validation's NLL of text and of every codebook as bars, from the keys `text` and `audio` [dep_q]."""
    from matplotlib.figure import Figure

    text, audio = float(validation["text"]), np.asarray(validation["audio"], np.float64)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    names = ["text", *(f"{k}" for k in range(len(audio)))]
    axes.bar(names, [text, *audio], color=["tab:green", *["tab:blue"] * len(audio)])
    axes.set_xlabel("codebook")
    axes.set_ylabel("NLL [nats per token]")
    return figure
