r"""Fills masked spans of long recordings: local attention, and TTT over the whole recording in both directions.

    python -m ttt_jax.data.conversations --hours=6 --min_minutes=5 --max_minutes=12 --seed=0 --output=data/quickstart
    python train.py --config=configs/audio_infill.py --workdir=runs/infill-ttt-0
    python train.py --config=configs/audio_infill.py:small-without-ttt --workdir=runs/infill-plain-0
    python eval.py --workdir=runs/infill-ttt-0 --benchmark=infill

Attention sees segments of 16 frames (1.28 s), spans of 16 to 64 frames are masked: inside most of them attention sees
nothing, so that what is known of the voices has to come from further away. The sizes:

- small: 1.3 M parameters, crops of 256 frames (20 s); a few minutes on 2 cores. For what it learns see the README.
- medium: 60 M, crops of 4096 frames (5.5 min); meant for one GPU. Not run yet.

Each also comes `-without-ttt`: the same number of parameters, those of the TTT layers put into the MLPs.
"""

from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from configs import quickstart

SIZES: dict[str, Any] = {
    "small": {
        "data": {"num_frames": 256, "batch_size": 4, "shortest_span": 16, "longest_span": 64},
        "model": {"dim": 64, "num_layers": 2, "num_heads": 2, "segment": 16},
        "optimizer": {"learning_rate": 4e-3, "steps": 400, "warmup_steps": 25},
        "mesh": {"data": 1},
    },
    "medium": {
        "data": {"num_frames": 4096, "batch_size": 16, "shortest_span": 64, "longest_span": 512},
        "model": {"dim": 512, "num_layers": 12, "num_heads": 8, "segment": 128},
        "optimizer": {"learning_rate": 1e-3, "steps": 20_000, "warmup_steps": 1000},
        "mesh": {"data": -1},
    },
}
WITHOUT = "-without-ttt"


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """One of `SIZES`, or that `-without-ttt`; streams and vocabularies come from the dataset."""
    name = size.removesuffix(WITHOUT)
    if name not in SIZES:
        raise ValueError(
            f"configs/audio_infill.py:{size}: expected one of {list(SIZES)}, or one of them + {WITHOUT!r}."
        )
    config: Any = quickstart.get_config()
    config.objective = "infill"
    config.data = {"directory": "data/quickstart", "masked_share": 0.4, **SIZES[name]["data"]}
    fields: dict[str, Any] = {
        **SIZES[name]["model"],
        "hidden_scale": 4.0,
        "overlap": 0,
        "ssm_layer": "ttt_linear",
        "mini_batch_size": placeholder(int),
        "ttt_base_lr": placeholder(float),
        "rope_theta": 10000.0,
        "gating_alpha_init": 0.1,
    }
    model: Any = ml_collections.ConfigDict(fields)
    if size.endswith(WITHOUT):
        model.hidden_scale += _ttt_share(model)
        with model.ignore_type():
            model.ssm_layer = None
    config.model = model
    config.loss = {}
    config.optimizer.update(SIZES[name]["optimizer"])
    config.mesh.update(SIZES[name]["mesh"])
    config.checkpoint.update({"every_steps": 1000, "every_seconds": 600.0})
    config.log.update({"every_steps": 20, "diagnostics_every_steps": 0})
    config.validation.update({"every_steps": 400, "num_batches": 8})
    return config


def _ttt_share(model: Any) -> float:
    """What to add to `hidden_scale` so that the MLPs take up the TTT layers' parameters."""
    width, head_dim = model.dim, model.dim // model.num_heads
    projections = 4 * (width**2 + width) + model.num_heads * (width + 1)
    inner = model.num_heads * (head_dim**2 + 3 * head_dim)  # weights, biases, LayerNorm
    norm_and_gates = 2 * width + 2 * width
    return (projections + inner + norm_and_gates) / (2 * width + 1) / width
