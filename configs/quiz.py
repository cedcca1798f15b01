r"""Does TTT remember what has to be heard? A small Moshi on a quiz (`ttt_jax.data.quiz`).

    python -m ttt_jax.data.quiz --recordings=3000 --output=data/quiz
    python train.py --config=configs/quiz.py --workdir=runs/quiz-ttt-0
    python train.py --config=configs/quiz.py:without-ttt --workdir=runs/quiz-plain-0
    python eval.py --workdir=runs/quiz-ttt-0 --benchmark=recall,nll_by_position

Attention sees 32 frames (2.6 s) in each of three layers, facts are asked for 1 to 25 s after they were told, and each
recording starts afresh. `without-ttt` has as many parameters.
"""

from typing import Any

import ml_collections

from configs import quickstart
from configs.conversations import remove_ttt

WITHOUT = "without-ttt"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The model with TTT, or `WITHOUT`; streams and vocabularies come from the dataset."""
    if variant not in ("", WITHOUT):
        raise ValueError(f"configs/quiz.py:{variant}: expected nothing behind the file's name, or :{WITHOUT}.")
    config: Any = quickstart.get_config()
    config.data.update({"directory": "data/quiz", "mode": "follow", "num_frames": 512, "batch_size": 16})
    config.model.update({"dim": 96, "num_layers": 3, "num_heads": 3, "context": 32})
    config.model.update({"depformer_dim": 32, "depformer_num_heads": 1})
    config.model.ttt.update({"layers": (1, 2), "num_heads": 3})
    config.optimizer.update({"learning_rate": 3e-3, "steps": 900, "warmup_steps": 100})
    config.loss.text_padding_weight = 0.0  # answers alone: see the README for what 0.01 does to pairs
    config.checkpoint.update({"every_steps": 1000, "every_seconds": 600.0})
    config.log.update({"every_steps": 10, "diagnostics_every_steps": 200})
    config.validation.update({"every_steps": 300, "num_batches": 4})
    if variant == WITHOUT:
        remove_ttt(config)
    return config
