r"""Does TTT remember what has to be heard? A small Moshi on a quiz (`ttt_jax.data.quiz`).

    python -m ttt_jax.data.quiz --output=data/quiz
    python train.py --config=configs/quiz.py --workdir=runs/quiz-ttt-0
    python train.py --config=configs/quiz.py:without-ttt --workdir=runs/quiz-plain-0
    python eval.py --workdir=runs/quiz-ttt-0 --benchmark=recall,nll_by_position --max_recordings=40

As `configs/pairs.py`, with three layers, TTT in two of them, and attention over 32 frames (2.6 s) in each. Facts are
asked for 2 to 25 s after they were told. Training takes 20 minutes on 2 cores, two runs at a time.
"""

from typing import Any

import ml_collections

from configs import pairs
from configs.conversations import remove_ttt

WITHOUT = pairs.WITHOUT


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The model with TTT, or `WITHOUT`; streams and vocabularies come from the dataset."""
    if variant not in ("", WITHOUT):
        raise ValueError(f"configs/quiz.py:{variant}: expected nothing behind the file's name, or :{WITHOUT}.")
    config: Any = pairs.get_config()
    config.data.update({"directory": "data/quiz", "num_frames": 512})
    config.model.update({"dim": 96, "num_layers": 3, "num_heads": 3, "context": 32})
    config.model.update({"depformer_dim": 32, "depformer_dim_feedforward": 132})
    config.model.ttt.update({"layers": (1, 2), "num_heads": 3})
    config.log.every_steps = 10
    config.validation.every_steps = 300
    if variant == WITHOUT:
        remove_ttt(config)
    return config
