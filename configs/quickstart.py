"""An 11.0 M parameter Moshi with TTT in two of its six layers, on synthetic two-speaker conversations in Codec2 tokens.

    python -m ttt_jax.data.conversations --hours=6 --min_minutes=5 --max_minutes=12 --seed=0 --output=data/quickstart
    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

`make quickstart` does both, and the evaluation. Training takes 5 to 8 minutes on 2 cores.

Every field is listed, so that each is a flag: `--config.optimizer.clip_norm=0.5`, `--config.model.ttt.kind=mlp`.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    """The quickstart; the model's streams and vocabularies come from the dataset. A placeholder is None until set."""
    config = ml_collections.ConfigDict()
    config.objective = "next_token"
    config.seed = 0
    config.init_from = ""
    config.data = {
        "directory": "data/quickstart",
        "num_frames": 512,
        "batch_size": 1,
        "mode": "crops",
        "gradient_chunks": 1,
        "recording_frames": placeholder(int),
        "stages": (),
    }
    config.model = {
        "dim": 256,
        "num_layers": 6,
        "num_heads": 4,
        "hidden_scale": 4.125,
        "attention": "window",
        "context": 125,  # frames: 10 s
        "sinks": 0,
        "max_period": 10000.0,
        "delays": (0,) * 17,  # Codec2's fields belong to one frame: nothing to gain from hearing some of them later
        "depformer_dim": 128,
        "depformer_dim_feedforward": placeholder(int),
        "depformer_num_layers": 1,
        "depformer_num_heads": 4,
        "depformer_weights_per_step_schedule": placeholder(tuple),
        "remat": False,
        "ttt": {
            "layers": (2, 4),
            "design": "after_attention",
            "kind": "linear",
            "num_heads": placeholder(int),
            "mini_batch_size": 16,
            "base_lr": placeholder(float),
            "backbone": "mamba",
            "attention": "window",
            "context": placeholder(int),
            "sinks": placeholder(int),
            "gate_init": 0.1,
            "init": "associative",
        },
    }
    config.optimizer = {
        "learning_rate": 2e-3,
        "steps": 760,
        "warmup_steps": 40,
        "schedule": "cosine",
        "final_learning_rate_fraction": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "accumulate": 1,
        "train": "all",
        "groups": {name: _group() for name in ("base", "ttt", "gates")},
    }
    config.lora = {"rank": 128, "scaling": 2.0}
    config.precision = {"parameters": "float32", "frozen": "float32", "activations": "float32"}
    # Codec2's fields are equals: no codebook carries the meaning of the others.
    config.loss = {"first_codebook_weight": 1.0, "text_padding_weight": 0.5}
    config.checkpoint = {"every_steps": 100, "every_seconds": 60.0, "keep": 2, "keep_every_steps": 0}
    config.log = {"every_steps": 5, "diagnostics_every_steps": 50, "tensorboard": True, "audio_every_steps": 0}
    config.validation = {"every_steps": 200, "num_batches": 2}
    # One device, since a batch has one row. More rows go on more devices: data=-1 takes all of them.
    config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    return config


def _group() -> dict:
    """A group of parameters that is trained as `config.optimizer` says."""
    return {
        "learning_rate_factor": 1.0,
        "schedule": placeholder(str),
        "warmup_steps": placeholder(int),
        "final_learning_rate_fraction": placeholder(float),
        "weight_decay": placeholder(float),
    }
