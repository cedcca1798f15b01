"""A 10 M parameter Moshi with TTT in two of its six layers, on synthetic two-speaker conversations in Codec2 tokens.

    python -m ttt_jax.data.conversations --hours=4 --seed=0 --output=data/quickstart
    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

`make quickstart` does both, and the evaluation.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The quickstart; the model's streams and vocabularies come from the dataset."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = {"directory": "data/quickstart", "num_frames": 512, "batch_size": 2}
    config.model = {
        "dim": 256,
        "num_layers": 6,
        "num_heads": 4,
        "context": 125,  # frames: 10 s
        "delays": (0,) * 17,  # Codec2's fields belong to one frame: nothing to gain from hearing some of them later
        "depformer_dim": 128,
        "depformer_dim_feedforward": None,
        "depformer_num_layers": 1,
        "depformer_num_heads": 4,
        "ttt": {"layers": (2, 4), "kind": "linear", "mini_batch_size": 16},
    }
    config.optimizer = {"learning_rate": 2e-3, "steps": 420, "warmup_steps": 30, "weight_decay": 0.1}
    # Codec2's fields are equals: no codebook carries the meaning of the others. Plain likelihood is what is reported.
    config.loss = {"first_codebook_weight": 1.0, "text_padding_weight": 1.0}
    config.checkpoint = {"every_steps": 100, "every_seconds": 60.0, "keep": 2}
    config.log = {"every_steps": 5, "diagnostics_every_steps": 50}
    config.validation = {"every_steps": 100, "num_batches": 2}
    return config
