"""The objective of `Infill`: what was in the masked spans of a recording."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.data.reader import TokenDataset, open_dataset, splits
from ttt_jax.data.spans import MaskedBatch, MaskedCrops, num_masked
from ttt_jax.models.infill import Infill, first_masked, masked_nll
from ttt_jax.training import sharding
from ttt_jax.training.config import ExperimentConfig, infill_with_vocabulary
from ttt_jax.training.held_out import VALIDATION, VALIDATION_SEED, is_validated

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class InfillSums(NamedTuple):
    """Over masked frames."""

    nll: jax.Array  # [num_codebooks], nats
    num_tokens: jax.Array  # [num_codebooks]


class InfillObjective:
    """Mean cross-entropy of the audio codes of masked frames, all codebooks alike; see `Objective`."""

    unit: str = "frames"
    not_in_the_shapes: Sequence[str] = ("num_heads", "segment", "overlap", "rope_theta")

    def __init__(self, config: ExperimentConfig):
        self._config = config

    @classmethod
    def with_dataset(cls, config: ExperimentConfig, section: Mapping[str, Any]) -> ExperimentConfig:
        """With the dataset's streams and vocabularies."""
        info = open_dataset(config.data.directory, "train").info
        return dataclasses.replace(config, model=infill_with_vocabulary(section, info))

    def batches(self) -> tuple[MaskedCrops, MaskedCrops | None]:
        """Crops of the training split; validation is on the same crops with the same spans each time."""
        config = self._config
        training = self._crops(open_dataset(config.data.directory, "train"), config.seed)
        if not is_validated(config, splits(config.data.directory)):
            return training, None
        return training, self._crops(open_dataset(config.data.directory, VALIDATION), VALIDATION_SEED)

    def _crops(self, dataset: TokenDataset, seed: int) -> MaskedCrops:
        data = self._config.data
        return MaskedCrops(
            dataset,
            seed=seed,
            batch_size=data.batch_size,
            num_frames=data.num_frames,
            share=data.masked_share,
            shortest=data.shortest_span,
            longest=data.longest_span,
            rows=sharding.local_rows(sharding.make_mesh(self._config.mesh), data.batch_size),
        )

    def batch_shapes(self) -> Any:
        """A batch of crops."""
        data, rows = self._config.data, self._config.data.batch_size
        codes = (rows, 1 + self._config.model.num_codebooks, data.num_frames)
        shapes = ((codes, np.int32), (codes[::2], bool), ((rows,), np.int32))
        return MaskedBatch(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))  # pyright: ignore

    def units(self, batch: MaskedBatch) -> int:
        """Frames that are read, masked ones too."""
        return int(batch.length.sum())

    def init_parameters(self, key: jax.Array) -> Any:
        """The model's."""
        codes = jnp.zeros((1, 1 + self._config.model.num_codebooks, 2), jnp.int32)
        return Infill(self._config.model).init(key, codes, jnp.zeros((1, 2), bool))["params"]

    def init_carry(self, params: Any) -> Any:
        """Crops carry nothing."""
        return ()

    def loss_weights(self, batch: MaskedBatch) -> jax.Array:
        """Masked tokens of a whole batch."""
        masked = jnp.asarray(batch.masked)[:, None]
        return jnp.maximum(jnp.sum(masked & (jnp.asarray(batch.codes)[:, 1:] >= 0)), 1).astype(jnp.float32)

    def read(self, variables: Any, batch: MaskedBatch, carry: Any) -> tuple[InfillSums, Any]:
        """Logits are made for masked frames alone, the same number in every full row."""
        view = sharding.gathering_view(self._config.model)
        if view is not None:
            variables = variables | {"params": view((), variables["params"])}
        data = self._config.data
        frames = first_masked(batch.masked, num_masked(data.num_frames, data.masked_share))
        model = Infill(self._config.model)
        logits: Any = model.apply(variables, batch.codes, batch.masked, batch.length, frames)
        nll, counted = masked_nll(logits, batch.codes, batch.masked, frames)
        return InfillSums(nll.sum(axis=(0, 2)), counted.sum(axis=(0, 2)).astype(jnp.float32)), ()

    def zero_sums(self) -> InfillSums:
        """Of no tokens."""
        return InfillSums(*[jnp.zeros(self._config.model.num_codebooks)] * 2)

    def loss(self, sums: InfillSums, weights: jax.Array) -> jax.Array:
        """Mean over masked tokens."""
        return jnp.sum(sums.nll) / weights

    def metrics(self, sums: InfillSums) -> dict[str, jax.Array]:
        """Nats per masked token, `{"loss": scalar, "audio": [num_codebooks]}`."""
        mean = jnp.sum(sums.nll) / jnp.maximum(jnp.sum(sums.num_tokens), 1)
        return {"loss": mean, "audio": sums.nll / jnp.maximum(sums.num_tokens, 1)}

    def diagnostics(self, variables: Any, batch: MaskedBatch, carry: Any) -> Any:
        """Of the TTT layers; empty without."""
        model = Infill(self._config.model)
        _, sown = model.apply(variables, batch.codes, batch.masked, batch.length, mutable=["diagnostics"])
        return sown.get("diagnostics", {})

    def figure(self, validation: Mapping[str, Any]) -> "Figure | None":
        """None: there is one number a codebook, which TensorBoard shows as lines."""
        return None
