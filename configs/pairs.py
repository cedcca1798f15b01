r"""Can TTT layers learn to remember at all? A small Moshi on facts of one frame (`ttt_jax.data.pairs`).

    python -m ttt_jax.data.pairs --output=data/pairs
    python train.py --config=configs/pairs.py --workdir=runs/pairs-ttt-0
    python train.py --config=configs/pairs.py:without-ttt --workdir=runs/pairs-plain-0
    python eval.py --workdir=runs/pairs-ttt-0 --benchmark=recall,nll_by_position --max_recordings=40

Attention sees 8 frames in each of two layers, facts are asked for 4 to 64 frames later, and each recording starts
afresh. `without-ttt` has as many parameters. Training takes 3 to 5 minutes on one core.
"""

from typing import Any

import ml_collections

from configs import quickstart
from configs.conversations import remove_ttt

WITHOUT = "without-ttt"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The model with TTT, or `WITHOUT`; streams and vocabularies come from the dataset."""
    if variant not in ("", WITHOUT):
        raise ValueError(f"configs/pairs.py:{variant}: expected nothing behind the file's name, or :{WITHOUT}.")
    config: Any = quickstart.get_config()
    config.data.update({"directory": "data/pairs", "mode": "follow", "num_frames": 128, "batch_size": 16})
    config.model.update({"dim": 64, "num_layers": 2, "num_heads": 2, "context": 8})
    # Of no use here, where no audio is predicted.
    config.model.update({"depformer_dim": 16, "depformer_dim_feedforward": 64, "depformer_num_heads": 1})
    config.model.ttt.update({"layers": (1,), "num_heads": 2})
    config.optimizer.update({"learning_rate": 3e-3, "steps": 600, "warmup_steps": 100})
    config.loss.text_padding_weight = 0.0  # answers alone: see the README for what 0.01 does
    config.checkpoint.update({"every_steps": 1000, "every_seconds": 600.0})
    config.log.update({"every_steps": 20, "diagnostics_every_steps": 200})
    config.validation.update({"every_steps": 500, "num_batches": 4})
    if variant == WITHOUT:
        remove_ttt(config)
    return config
