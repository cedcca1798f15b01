"""Speed and memory of one block by the number of scenes: local attention and TTT, beside attention over everything.

Each shape is compiled once: its memory is the compiled program's, its time a median of calls that have ended on the
device. Parameters and inputs are random; neither changes what a call costs.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ttt_jax.evaluation.speed import FULL, FULL_ATTENTION_BYTES, crossing, device_name, median_seconds
from ttt_jax.layers.two_way import Parts
from ttt_jax.models.video_dit import VideoDiTConfig
from ttt_jax.models.video_dit.model import Block
from ttt_jax.training.memory_plan import compiled_memory

LOCAL = "local attention"


@dataclasses.dataclass(frozen=True)
class BlockRun:
    """One block on one sequence.

    Attributes:
      name: what lets tokens see each other.
      work: "forward", or "training": gradients of all parameters and inputs.
      scenes: that it reads.
      tokens: in all of them.
      ms: median; NaN where it was compiled but would take too much memory to be run.
      memory_bytes: of the compiled program, its arguments and results.
    """

    name: str
    work: str
    scenes: int
    tokens: int
    ms: float
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class BlockCrossover:
    """From which number of scenes on something takes less time or memory than full attention.

    Attributes:
      measure: "time" or "memory".
      name: what is compared with full attention.
      work: "forward" or "training".
      scenes: interpolated; None when one of the two takes less at all numbers that both were measured at.
      found: the same in words.
    """

    measure: Literal["time", "memory"]
    name: str
    work: str
    scenes: float | None
    found: str


@dataclasses.dataclass(frozen=True)
class BlockSpeed:
    """The benchmark's result.

    Attributes:
      device: name of the device.
      num_cores: cores of the machine.
      dtype: of activations.
      width: of the block.
      num_heads: of attention and TTT.
      mini_batch_size: of TTT.
      unit: what a scene is called, "scenes".
      tokens_per_scene: of each scene but for a shared frame at the end.
      text_tokens: those of them that are text.
      runs: by what it is, work and number of scenes; one sequence at a time.
      crossovers: of time and memory.
    """

    device: str
    num_cores: int
    dtype: str
    width: int
    num_heads: int
    mini_batch_size: int
    unit: str
    tokens_per_scene: int
    text_tokens: int
    runs: list[BlockRun]
    crossovers: list[BlockCrossover]


class AttentionBlock(Block):
    """The block without TTT."""

    def mixed(self, parts: Parts) -> Parts:
        """Attention inside scenes alone."""
        return self.attended(parts)


def video_speed(
    config: VideoDiTConfig, *, max_scenes: int = 32, patches: tuple[int, int] = (8, 8), text_tokens: int = 16
) -> BlockSpeed:
    """Measure a Video-DiT's block on the default device, on one video of 1, 2, 4, ... scenes.

    Args:
      config: of the model.
      max_scenes: the most scenes.
      patches: rows and columns of a latent frame, in patches; (30, 45) as published.
      text_tokens: of each scene's text.

    Raises:
      ValueError: a size below 1.
    """
    rows, columns = patches
    for name, size in {"max_scenes": max_scenes, "patches": min(patches), "text_tokens": text_tokens}.items():
        if size < 1:
            raise ValueError(f"{name}: expected a positive number, got {size}.")
    per_scene = config.attn_length * rows * columns + text_tokens
    ttt = f"TTT-{'MLP' if config.ssm_layer == 'ttt_mlp' else 'Linear'} and {LOCAL}"
    runs = []
    for scenes in _numbers(max_scenes):
        frames = scenes * config.attn_length + config.prefix_temporal_length
        tokens = frames * rows * columns + scenes * text_tokens
        whole = dataclasses.replace(config, attn_length=frames, prefix_temporal_length=0)
        inputs = functools.partial(_video_inputs, config, frames, patches)
        blocks: dict[str, tuple[nn.Module, tuple]] = {
            ttt: (Block(config), inputs(scenes, text_tokens)),
            LOCAL: (AttentionBlock(config), inputs(scenes, text_tokens)),
            # All texts and frames as one scene.
            FULL: (AttentionBlock(whole), inputs(1, scenes * text_tokens)),
        }
        runs += _measured(blocks, scenes, tokens)
    return BlockSpeed(
        device=device_name(),
        num_cores=os.cpu_count() or 1,
        dtype=config.dtype,
        width=config.model_dim,
        num_heads=config.num_heads,
        mini_batch_size=config.ttt_config.mini_batch_size,
        unit="scenes",
        tokens_per_scene=per_scene,
        text_tokens=text_tokens,
        runs=runs,
        crossovers=block_crossovers(runs, "scenes"),
    )


def _numbers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length())]


def _video_inputs(config: VideoDiTConfig, frames: int, patches: tuple[int, int], scenes: int, text_tokens: int):
    """A block's parts and the timestep's embedding."""
    keys, dtype = jax.random.split(jax.random.key(0), 3), jnp.dtype(config.dtype)
    text = jax.random.normal(keys[0], (1, scenes, text_tokens, config.model_dim), dtype)
    video = jax.random.normal(keys[1], (1, frames, *patches, config.model_dim), dtype)
    return {"text": text, "video": video}, jax.random.normal(keys[2], (1, config.time_embed_dim), dtype)


def _measured(blocks: dict[str, tuple[nn.Module, tuple]], scenes: int, tokens: int) -> Iterator[BlockRun]:
    """Every block, forward and training."""
    with tqdm(total=2 * len(blocks), desc=f"{scenes}, {tokens} tokens", unit="program") as bar:
        for name, (block, inputs) in blocks.items():
            params = _parameters(block, inputs)
            for work, function in (("forward", _apply), ("training", _gradients)):
                call: Any = jax.jit(function, static_argnums=0).lower(block, params, *inputs).compile()
                memory = compiled_memory(call)["total"]
                fits = memory <= FULL_ATTENTION_BYTES or name != FULL
                ms = 1000 * median_seconds(functools.partial(call, params, *inputs)) if fits else math.nan
                yield BlockRun(name, work, scenes, tokens, ms, memory)
                bar.update()


def _parameters(block: nn.Module, inputs: tuple) -> Any:
    """Of the block's shapes, without a program that makes what it would start from."""
    shapes = jax.eval_shape(block.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype), shapes)


def _apply(block: nn.Module, params: Any, *inputs: Any) -> Any:
    return block.apply({"params": params}, *inputs)


def _gradients(block: nn.Module, *arguments: Any) -> Any:
    def total(arguments):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(_apply(block, *arguments)))

    return jax.grad(total)(arguments)


def block_crossovers(runs: list[BlockRun], unit: str) -> list[BlockCrossover]:
    """Where what has TTT takes less time, and less memory, than full attention, from the numbers that both have."""
    found = []
    measures: dict[Literal["time", "memory"], tuple[str, Callable[[BlockRun], float]]] = {
        "time": ("faster", lambda run: run.ms),
        "memory": ("less", lambda run: run.memory_bytes),
    }
    for name, work in dict.fromkeys((run.name, run.work) for run in runs if run.name.startswith("TTT")):
        for measure, (better, cost) in measures.items():
            full = {run.scenes: cost(run) for run in runs if (run.name, run.work) == (FULL, work)}
            ratios = {
                run.scenes: math.log(cost(run) / full[run.scenes])
                for run in runs
                if (run.name, run.work) == (name, work) and run.scenes in full and not math.isnan(full[run.scenes])
            }
            scenes, words = crossing(sorted(ratios.items()), better, unit, decimals=1)
            found.append(BlockCrossover(measure, name, work, scenes, words))
    return found
