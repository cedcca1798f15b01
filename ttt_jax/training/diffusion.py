"""The objective of Video-DiT: the velocity of a noisy video."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.data.videos import VideoBatch, VideoBatches, open_videos, splits
from ttt_jax.models.video_dit import VideoDiT, diffusion
from ttt_jax.training import sharding
from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.held_out import VALIDATION, VALIDATION_SEED, is_validated

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DiffusionSums(NamedTuple):
    """Sums over rows, float32 scalars."""

    loss: jax.Array
    error: jax.Array
    rows: jax.Array


class Diffusion:
    """Mean of `losses`, each row at a timestep of its own, uniformly drawn; see `Objective`.

    A row's timestep and noise follow from its key, so they are the same on any mesh. Validation draws the same ones
    every time and drops no text.
    """

    unit: str = "frames"
    not_in_the_shapes: Sequence[str] = (
        "num_heads",
        "patch_size",
        "attn_length",
        "prefix_temporal_length",
        "theta",
    )

    def __init__(self, config: ExperimentConfig):
        self._config = config
        self._schedule = diffusion.zero_snr_schedule()

    @classmethod
    def with_dataset(cls, config: ExperimentConfig, section: Mapping[str, Any]) -> ExperimentConfig:
        """The config as it is, if the dataset has its sizes."""
        info, data, model = open_videos(config.data.directory, "train").info, config.data, config.model
        sizes = {f"data.{name}": getattr(data, name) for name in ("num_frames", "num_scenes", "text_length")}
        sizes |= {"data.height": data.height, "data.width": data.width}
        sizes |= {"model.in_channels": model.in_channels, "model.text_dim": model.text_dim}
        names = {"model.in_channels": "channels"}
        for name, value in sizes.items():
            stored = getattr(info, names.get(name, name.split(".")[1]))
            if stored != value:
                raise ValueError(
                    f"config.{name}: the videos in {data.directory} have {stored}, the config says {value}. "
                    "Change it, or config.data.directory."
                )
        return config

    def batches(self) -> tuple[VideoBatches, VideoBatches | None]:
        """Videos in a random order; for validation of the split of that name, without dropping texts."""
        config = self._config
        directory, dropout = config.data.directory, config.loss.text_dropout
        training = self._batches("train", seed=config.seed, text_dropout=dropout)
        if not is_validated(config, splits(directory)):
            return training, None
        return training, self._batches(VALIDATION, seed=VALIDATION_SEED, text_dropout=0.0)

    def _batches(self, split: str, **options: Any) -> VideoBatches:
        data = self._config.data
        rows = sharding.local_rows(sharding.make_mesh(self._config.mesh), data.batch_size)
        return VideoBatches(open_videos(data.directory, split), batch_size=data.batch_size, rows=rows, **options)

    def batch_shapes(self) -> Any:
        """A batch of the data section's sizes."""
        data, model = self._config.data, self._config.model
        video = (data.batch_size, data.num_frames, model.in_channels, data.height, data.width)
        text = (data.batch_size, data.num_scenes, data.text_length, model.text_dim)
        shapes = ((video, np.float32), (text, np.float32), ((data.batch_size, 2), np.uint32))
        return VideoBatch(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))  # pyright: ignore

    def units(self, batch: VideoBatch) -> int:
        """Latent frames."""
        return batch.video.shape[0] * batch.video.shape[1]

    def init_parameters(self, key: jax.Array) -> Any:
        """Video-DiT's; they do not depend on the sizes of the video."""
        c = self._config.model
        video = jnp.zeros((1, 1, c.in_channels, c.patch_size, c.patch_size))
        text = jnp.zeros((1, 1, 1, c.text_dim))
        return VideoDiT(c).init(key, video, text, jnp.zeros(1, jnp.int32))["params"]

    def init_carry(self, params: Any) -> Any:
        """Nothing: every video is a fresh start."""
        return ()

    def loss_weights(self, batch: VideoBatch) -> jax.Array:
        """Its rows."""
        return jnp.float32(batch.video.shape[0])

    def read(self, variables: Any, batch: VideoBatch, carry: Any) -> tuple[DiffusionSums, Any]:
        """Predicts the velocity of every row at its timestep."""
        noisy, noise, timestep = self._noisy(batch)
        output: Any = self._model().apply(variables, noisy, batch.text, timestep)
        loss, error = diffusion.losses(self._schedule, output, jnp.asarray(batch.video), noise, timestep)
        return DiffusionSums(loss.sum(), error.sum(), jnp.float32(len(loss))), carry

    def zero_sums(self) -> DiffusionSums:
        """Of no rows."""
        return DiffusionSums(*[jnp.zeros(())] * 3)

    def loss(self, sums: DiffusionSums, weights: jax.Array) -> jax.Array:
        """Mean over rows."""
        return sums.loss / weights

    def metrics(self, sums: DiffusionSums) -> dict[str, jax.Array]:
        """The loss, and the mean squared error of the denoised video."""
        return {"loss": sums.loss / sums.rows, "denoised_error": sums.error / sums.rows}

    def diagnostics(self, variables: Any, batch: VideoBatch, carry: Any) -> Any:
        """Of the TTT layers, forward and backward pass together."""
        noisy, _, timestep = self._noisy(batch)
        _, sown = self._model().apply(variables, noisy, batch.text, timestep, mutable=["diagnostics"])
        return sown.get("diagnostics", {})

    def figure(self, validation: Mapping[str, Any]) -> "Figure | None":
        """None: two numbers need no picture."""
        return None

    def _model(self) -> VideoDiT:
        model = self._config.model
        return VideoDiT(model, sharding.gathering_view(model), sharding.splitting_width(model.model_dim))

    def _noisy(self, batch: VideoBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Noisy video, its noise, and the timestep `[B]` int32."""
        keys = jax.random.wrap_key_data(jnp.asarray(batch.key), impl="threefry2x32")
        draw = jax.vmap(functools.partial(_draw, batch.video.shape[1:], len(self._schedule.signal)))
        timestep, noise = draw(keys)
        return diffusion.add_noise(self._schedule, jnp.asarray(batch.video), noise, timestep), noise, timestep


def _draw(shape: tuple[int, ...], num_timesteps: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    for_timestep, for_noise = jax.random.split(key)
    return jax.random.randint(for_timestep, (), 0, num_timesteps), jax.random.normal(for_noise, shape)
