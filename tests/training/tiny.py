"""A model and a run small enough to be killed and started again many times."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 3
    config.data = {"directory": "", "num_frames": 24, "batch_size": 2, "mode": "crops", "gradient_chunks": 1}
    config.model = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "context": 8,
        "depformer_dim": 16,
        "depformer_num_layers": 1,
        "depformer_num_heads": 2,
        "depformer_dim_feedforward": None,
        "ttt": {"layers": (1,), "kind": "linear", "mini_batch_size": 4},
    }
    config.optimizer = {"learning_rate": 1e-2, "steps": 60, "warmup_steps": 5}
    config.loss = {"first_codebook_weight": 1.0}
    config.checkpoint = {"every_steps": 7, "every_seconds": 0.0, "keep": 3}
    config.log = {"every_steps": 1, "diagnostics_every_steps": 10, "tensorboard": True, "audio_every_steps": 0}
    config.validation = {"every_steps": 25, "num_batches": 2}
    config.mesh = {"data": 1, "fsdp": 1}
    return config
