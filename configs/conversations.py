r"""Does TTT give a streaming speech model a memory beyond its attention window? Conversations full of planted facts.

    python -m ttt_jax.data.conversations --hours=20 --min_minutes=4 --max_minutes=12 --facts_per_minute=2.5 \
      --questions_per_fact=4 --vocab_size=2000 --seed=0 --output=data/conversations
    python train.py --config=configs/conversations.py:small --workdir=runs/small-ttt-0
    python train.py --config=configs/conversations.py:small-without-ttt --workdir=runs/small-plain-0
    python eval.py --workdir=runs/small-ttt-0 --baseline=runs/small-plain-0 --benchmark=recall,nll_by_position

Every row walks through whole recordings with its state carried. Attention sees 64 frames (5 s), and facts are asked for
seconds to minutes after they were told, so what lies further back can only come from the TTT state. The sizes:

- small: 2.7 M parameters; 15 minutes on 2 cores, two runs at a time. Learns to speak, not to recall: see the README.
- medium: 82 M, attention over 20 s; meant for one GPU and hundreds of hours of conversation. Not run yet.
- large: 1.2 B, attention over 20 s; meant for 8 GPUs. Not run yet.

`--config.model.ttt.design` puts TTT before attention or lets it learn what leaves the window. Look at the diagnostic
`last_token_scale`: at 0 a layer keeps nothing beyond a mini-batch.

Each also comes `-without-ttt`: the same number of parameters, those of the TTT layers put into the feed-forward layers.
"""

from typing import Any

import ml_collections

from configs import quickstart

SIZES: dict[str, Any] = {
    "small": {
        "data": {"num_frames": 512, "batch_size": 1},
        "model": {"dim": 128, "num_layers": 4, "num_heads": 2, "context": 64, "depformer_dim": 32},
        "ttt": {"layers": (1, 2), "num_heads": 2},
        "optimizer": {"learning_rate": 3e-3, "steps": 3000, "warmup_steps": 100},
        "mesh": {"data": 1},
    },
    "medium": {
        "data": {"num_frames": 1024, "batch_size": 16, "gradient_chunks": 2},
        "model": {"dim": 640, "num_layers": 12, "num_heads": 10, "context": 250, "depformer_dim": 256},
        "ttt": {"layers": (3, 6, 9), "num_heads": 10},
        "optimizer": {"learning_rate": 1e-3, "steps": 20_000, "warmup_steps": 1000},
        "mesh": {"data": -1},
    },
    "large": {
        "data": {"num_frames": 1024, "batch_size": 64, "gradient_chunks": 4},
        "model": {"dim": 2048, "num_layers": 20, "num_heads": 16, "context": 250, "depformer_dim": 512},
        "ttt": {"layers": (4, 9, 14, 19), "num_heads": 16},
        "optimizer": {"learning_rate": 3e-4, "steps": 50_000, "warmup_steps": 2000},
        "mesh": {"data": 1, "fsdp": -1},
    },
}
WITHOUT = "-without-ttt"


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """One of `SIZES`, or that `-without-ttt`."""
    name = size.removesuffix(WITHOUT)
    if name not in SIZES:
        raise ValueError(
            f"configs/conversations.py:{size}: expected one of {list(SIZES)}, or one of them + {WITHOUT!r}."
        )
    config: Any = quickstart.get_config()
    config.data.update({"directory": "data/conversations", "mode": "follow", **SIZES[name]["data"]})
    config.model.update(SIZES[name]["model"])
    config.model.ttt.update(SIZES[name]["ttt"])
    config.optimizer.update(SIZES[name]["optimizer"])
    config.mesh.update(SIZES[name]["mesh"])
    config.loss.text_padding_weight = 0.2
    config.checkpoint.update({"every_steps": 1000, "every_seconds": 600.0})
    config.log.update({"every_steps": 20, "diagnostics_every_steps": 200})
    config.validation.update({"every_steps": 500, "num_batches": 4})
    if size.endswith(WITHOUT):
        remove_ttt(config)
    return config


def remove_ttt(config: Any) -> None:
    """Leaves a Moshi's TTT layers out and widens its feed-forward layers by as many parameters."""
    config.model.hidden_scale += _ttt_share(config.model)
    with config.ignore_type():
        config.model.ttt = None


def _ttt_share(model: Any) -> float:
    """What to add to `hidden_scale` so that the feed-forward layers take up the TTT layers' parameters."""
    head_dim = model.dim // model.ttt.num_heads
    ttt_parameters = (
        len(model.ttt.layers) * model.dim * (4 * model.dim + head_dim + 19)
    )  # projections, inner model, rest
    hidden = ttt_parameters / (model.num_layers * 3 * model.dim)
    return 1.5 * hidden / model.dim  # hidden is 2/3 of hidden_scale * dim
