r"""Kyutai's Moshi 7B, fine-tuned with TTT layers inserted after the attention of four of its 32 layers.

    python -m ttt_jax.convert --source=moshi --input=kyutai/moshiko-pytorch-bf16 --output=models/moshiko
    python -m ttt_jax.convert --source=mimi --input=kyutai/moshiko-pytorch-bf16 --output=models/mimi
    python -m ttt_jax.data.prepare --dataset=calls.jsonl --tokenizer=models/moshiko/tokenizer.model --codec=mimi \
      --mimi=models/mimi --output=data/moshi
    python train.py --config=configs/moshi_7b_ttt.py:qkvo --workdir=runs/moshi-ttt

Written for 8 GPUs of 80 GB. What is trained, of 7.959 B parameters:

- qkvo: projections of the temporal attention, TTT layers and gates; 2.42 B
- ttt: TTT layers and gates alone; 0.27 B
- lora: low-rank factors beside all linear layers, TTT layers and gates; 0.66 B
- all: everything

Each row walks through whole recordings with its attention caches and TTT states carried. Attention sees the 3000 frames
(240 s) that it saw before, so that the model starts with the logits of the converted one, bit by bit, and only the TTT
states know what lies further back.

The sizes of rows and chunks come from the memory plan, docs/moshi_7b.md, which is read off the compiled step. The
learning rates are those of others: moshi-finetune's for low-rank factors, TTT-Video-DiT's for the rest. Nothing else is
measured: no run of it has been made, so neither its speed nor what it learns is known.
"""

from typing import Any

import ml_collections

from configs import quickstart

VARIANTS = ("ttt", "qkvo", "lora", "all")
LEARNING_RATE, TTT_LEARNING_RATE, LORA_LEARNING_RATE = 1e-5, 1e-4, 2e-6


def get_config(variant: str = "qkvo") -> ml_collections.ConfigDict:
    """What is trained is one of `VARIANTS`; the model's streams and vocabularies come from the dataset."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/moshi_7b_ttt.py:{variant}: expected one of {list(VARIANTS)}.")
    config: Any = quickstart.get_config()
    config.init_from = "models/moshiko"
    config.data.update({"directory": "data/moshi", "mode": "follow", "num_frames": 1500, "batch_size": 8})
    config.model.update(
        {
            "dim": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "context": 3000,  # frames: 240 s
            "delays": (0, 0, *(1,) * 7, 0, *(1,) * 7),
            "depformer_dim": 1024,
            "depformer_dim_feedforward": 4224,
            "depformer_num_layers": 6,
            "depformer_num_heads": 16,
            "remat": True,
        }
    )
    config.model.ttt.layers = (7, 15, 23, 31)
    config.optimizer.update({"train": variant, "learning_rate": LEARNING_RATE, "steps": 2000, "warmup_steps": 100})
    if variant == "lora":
        config.optimizer.groups.base.learning_rate_factor = LORA_LEARNING_RATE / LEARNING_RATE
    for group in ("ttt", "gates"):
        config.optimizer.groups[group].learning_rate_factor = TTT_LEARNING_RATE / LEARNING_RATE
    config.precision.update({"frozen": "bfloat16", "activations": "bfloat16"})
    config.loss.update({"first_codebook_weight": 100.0, "text_padding_weight": 0.5})
    config.checkpoint.update({"every_steps": 250, "every_seconds": 3600.0})  # tens of GB each
    config.log.update({"every_steps": 1, "diagnostics_every_steps": 50})
    config.validation.update({"every_steps": 250, "num_batches": 4})
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    return config
