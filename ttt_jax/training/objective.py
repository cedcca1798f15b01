"""What a run trains its model to do. All that the other rooms of training need to know of it is one `Objective`.

Another one is a class like this and a row in `OBJECTIVES`, and a row in `ttt_jax.training.config.SECTIONS`: the types
of its `model`, `data` and `loss` sections.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax

from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.diffusion import Diffusion
from ttt_jax.training.infill import InfillObjective
from ttt_jax.training.next_token import NextToken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Any
"""What one update reads: a pytree of arrays with leading axis B, whatever chance it needs drawn or seeded already."""


class Batches(Protocol):
    """Random access by update: `batches[i]` follows from the seed and i alone, rows of this process as NumPy arrays."""

    def __getitem__(self, step: int, /) -> Batch: ...


class Objective(Protocol):
    """Made of the experiment's config. All methods are pure; those of arrays work under jit.

    The loss of a batch is `loss(sums, weights)`: sums over rows, which may be read in groups and added up, divided by
    what all rows of the batch weigh together.

    Attributes:
        unit: Of the progress rate, a plural such as "frames".
        not_in_the_shapes: Fields of the model's config that parameters mean but whose shapes do not tell; two models
            that differ in one are different models.
    """

    unit: str
    not_in_the_shapes: Sequence[str]

    def __init__(self, config: ExperimentConfig) -> None: ...

    @classmethod
    def with_dataset(cls, config: ExperimentConfig, section: Mapping[str, Any]) -> ExperimentConfig:
        """The config with what the dataset determines of the model.

        Args:
            config: The experiment.
            section: The `model` section that it was made of: what is not in there, the dataset may say.

        Raises:
            FileNotFoundError: No dataset; names the command that makes one.
            ValueError: The config contradicts the dataset.
        """
        ...

    def batches(self) -> tuple[Batches, Batches | None]:
        """What updates read, and what validation scores; None: the dataset has no such split, or it is not wanted."""
        ...

    def batch_shapes(self) -> Batch:
        """A whole batch, all processes' rows, as `jax.ShapeDtypeStruct`s."""
        ...

    def units(self, batch: Batch) -> int:
        """How many units a batch of NumPy arrays holds."""
        ...

    def init_parameters(self, key: jax.Array) -> Any:
        """The model's fresh parameters."""
        ...

    def init_carry(self, params: Any) -> Any:
        """What rows carry from batch to batch before the first one, leaves [B, ...]; () for nothing."""
        ...

    def loss_weights(self, batch: Batch) -> Any:
        """What a batch weighs; it does not depend on the model."""
        ...

    def read(self, variables: Any, batch: Batch, carry: Any) -> tuple[Any, Any]:
        """Sums over the rows of a batch, or of some of its rows, and what they carry on. `variables` as Flax' `apply`.

        Reads with `sharding.gathering_view`, so that parameters may be split over devices.
        """
        ...

    def zero_sums(self) -> Any:
        """The sums over no rows."""
        ...

    def loss(self, sums: Any, weights: Any) -> jax.Array:
        """What is minimised, of sums and of what `loss_weights` returned; linear in the sums."""
        ...

    def metrics(self, sums: Any) -> dict[str, jax.Array]:
        """What metrics.jsonl tells of a batch: "loss", the one of its own weights, and whatever else."""
        ...

    def diagnostics(self, variables: Any, batch: Batch, carry: Any) -> Any:
        """The collection "diagnostics" that the model's layers sow while they read; {} for none."""
        ...

    def figure(self, validation: Mapping[str, Any]) -> "Figure | None":
        """A picture of a validation's metrics for TensorBoard."""
        ...


OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "infill": InfillObjective,
    "diffusion": Diffusion,
}


def objective_type(config: ExperimentConfig) -> type[Objective]:
    """The class of the experiment's objective."""
    return OBJECTIVES[config.objective]


def objective_of(config: ExperimentConfig) -> Objective:
    """The experiment's objective."""
    return objective_type(config)(config)
