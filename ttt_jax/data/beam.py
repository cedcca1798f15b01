"""Apache Beam: one function over many items, on a cluster or on this machine. Optional; see docs/beam.md."""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

# Beam's DirectRunner first tries to download another engine; this is what it falls back to without a network.
_LOCAL = "--runner=FnApiRunner"


def pipeline_options(flags: str) -> Any:
    """Beam's `PipelineOptions` from one string of its flags; without `--runner=`, Beam's own local runner.

    Args:
        flags: as on a command line, such as "--runner=FlinkRunner --flink_master=host:8081".

    Raises:
        ImportError: Apache Beam is not installed; names the extra.
        ValueError: flags that are none, or open quotes.
    """
    try:
        from apache_beam.options import pipeline_options as options
    except ImportError as error:
        raise ImportError("beam_options: Apache Beam is not installed: pip install 'ttt-jax[beam]'") from error
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"beam_options: {error} in {flags!r}") from error
    if any(not word.startswith("--") for word in words):
        raise ValueError(
            f"beam_options: expected flags with their values after =, such as '--direct_num_workers=2', got {flags!r}"
        )
    return options.PipelineOptions([_LOCAL, *words])


def run(function: Callable[[Any], None], items: Sequence[Any], flags: str) -> None:
    """Call a picklable function on every item, on the workers of the runner that `flags` name.

    Returns when all are done. Raises what the runner makes of a worker's error, mostly RuntimeError.
    """
    if not items:
        return
    options = pipeline_options(flags)
    import apache_beam

    with apache_beam.Pipeline(options=options) as pipeline:
        _ = pipeline | apache_beam.Create(items) | apache_beam.Reshuffle() | apache_beam.Map(function)
