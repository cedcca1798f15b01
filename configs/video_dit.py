r"""TTT-Video-DiT: video diffusion over several scenes with a text each, from moving shapes to a minute of film.

    python -m ttt_jax.data.moving_shapes --output=data/moving_shapes
    python train.py --config=configs/video_dit.py:tiny --workdir=runs/video-tiny
    python -m ttt_jax.generate.video --checkpoint=runs/video-tiny --data=data/moving_shapes --output=runs/video-tiny.gif

- tiny: 0.6 M parameters, 13 frames in three scenes; 1200 updates take some 13 minutes on 2 cores.

The other variants are the five stages that CogVideoX-5B is trained in to films of one minute, each from the one before:

    python -m ttt_jax.convert --source=cogvideox --input=THUDM/CogVideoX-5b --output=models/cogvideox
    python -m ttt_jax.data.latents --rows=3s.jsonl --empty_text=empty.safetensors --output=data/video-3s
    python train.py --config=configs/video_dit.py:3s --workdir=runs/video-3s
    python train.py --config=configs/video_dit.py:9s --workdir=runs/video-9s

and so on with 18s, 30s and 63s. Sizes, learning rates, warm-ups and what is trained are those that Dalal et al. 2025
published. No run of these five has been made here, so neither their speed nor what they learn is known. They are set up
for 64 GPUs of 80 GB; on N, `--config.optimizer.accumulate` is `64 / N` times as much. docs/video_dit.md tells what
memory they take.
"""

from typing import Any, NamedTuple

import ml_collections
from ml_collections.config_dict import placeholder


class Stage(NamedTuple):
    """What differs between the published stages."""

    num_frames: int
    num_scenes: int
    text_length: int
    steps: int
    warmup_steps: int
    init_from: str
    tensor: int  # GPUs that share a row


STAGES = {
    "3s": Stage(13, 1, 498, 5000, 100, "models/cogvideox", 1),
    "9s": Stage(37, 3, 502, 5000, 100, "runs/video-3s", 2),
    "18s": Stage(73, 6, 471, 1000, 50, "runs/video-9s", 4),
    "30s": Stage(121, 10, 497, 1000, 50, "runs/video-18s", 4),
    "63s": Stage(253, 21, 458, 250, 25, "runs/video-30s", 8),
}
LEARNING_RATE, FIRST_TTT_LEARNING_RATE = 1e-5, 1e-4


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
    """The variant "tiny", or one of `STAGES`. A placeholder is None until set."""
    if variant != "tiny" and variant not in STAGES:
        raise ValueError(f"configs/video_dit.py:{variant}: expected one of {['tiny', *STAGES]}.")
    config: Any = ml_collections.ConfigDict()
    config.objective = "diffusion"
    config.seed = 0
    config.init_from = ""
    config.data = {
        "directory": "data/moving_shapes",
        "batch_size": 16,
        "num_frames": 13,
        "num_scenes": 3,
        "text_length": 4,
        "height": 16,
        "width": 16,
    }
    config.model = {
        "model_dim": 96,
        "num_heads": 6,
        "num_layers": 2,
        "text_dim": 16,
        "time_embed_dim": 96,
        "patch_size": 4,
        "in_channels": 3,
        "attn_length": 4,
        "prefix_temporal_length": 1,
        "theta": 10000.0,
        "ssm_layer": "ttt_linear",
        "mini_batch_size": placeholder(int),
        "ttt_base_lr": placeholder(float),
        "rope_theta": 10000.0,
        "gating_alpha_init": 0.1,
        "remat": False,
        "remat_group": 1,
        "remat_layers": False,
    }
    config.optimizer = {
        "learning_rate": 2e-3,
        "steps": 1200,
        "warmup_steps": 40,
        "schedule": "cosine",
        "final_learning_rate_fraction": 0.05,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
        "accumulate": 1,
        "train": "all",
        "groups": {name: _group() for name in ("base", "ttt", "gates")},
    }
    config.lora = {"rank": 128, "scaling": 2.0}
    config.precision = {"parameters": "float32", "frozen": "float32", "activations": "float32"}
    config.loss = {"text_dropout": 0.1}
    config.checkpoint = {"every_steps": 200, "every_seconds": 60.0, "keep": 2, "keep_every_steps": 0}
    config.log = {"every_steps": 5, "diagnostics_every_steps": 50, "tensorboard": True, "audio_every_steps": 0}
    config.validation = {"every_steps": 200, "num_batches": 8}
    config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    if variant != "tiny":
        _published(config, variant)
    return config


def _published(config: Any, variant: str) -> None:
    """What the five stages have in common, and what is a stage's own."""
    stage, is_first = STAGES[variant], variant == "3s"
    config.init_from = stage.init_from
    config.data.update({"directory": f"data/video-{variant}", "batch_size": 64, "height": 60, "width": 90})
    config.data.update({name: getattr(stage, name) for name in ("num_frames", "num_scenes", "text_length")})
    config.model.update({"model_dim": 3072, "num_heads": 48, "num_layers": 42, "text_dim": 4096, "patch_size": 2})
    config.model.update({"in_channels": 16, "time_embed_dim": 512, "attn_length": 12, "ssm_layer": "ttt_mlp"})
    config.model.remat = config.model.remat_layers = True
    config.optimizer.update(
        {
            "learning_rate": LEARNING_RATE,
            "steps": stage.steps,
            "warmup_steps": stage.warmup_steps,
            "schedule": "linear",
            "final_learning_rate_fraction": 1.0,
            "clip_norm": 0.1,
            "train": "all" if is_first else "qkvo",  # "sft" and "qkvo", as they are published
            "accumulate": stage.tensor,  # on 64 GPUs a row at a time
        }
    )
    factor = FIRST_TTT_LEARNING_RATE / LEARNING_RATE if is_first else 1.0
    for group in ("ttt", "gates"):
        config.optimizer.groups[group].update(
            {"learning_rate_factor": factor, "schedule": "cosine", "final_learning_rate_fraction": 1 / factor}
        )
    config.precision.update({"activations": "bfloat16", "frozen": "float32" if is_first else "bfloat16"})
    config.checkpoint.update({"every_steps": 250, "every_seconds": 3600.0})
    config.log.update({"every_steps": 1, "diagnostics_every_steps": 50})
    config.validation.update({"every_steps": 250, "num_batches": 1})
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": stage.tensor})


def _group() -> dict:
    """A group of parameters that is trained as `config.optimizer` says."""
    return {
        "learning_rate_factor": 1.0,
        "schedule": placeholder(str),
        "warmup_steps": placeholder(int),
        "final_learning_rate_fraction": placeholder(float),
        "weight_decay": placeholder(float),
    }
