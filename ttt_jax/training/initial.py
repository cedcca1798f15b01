"""What a run starts from: fresh parameters, or an existing model's with fresh ones where TTT is inserted into it."""

import functools
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from ttt_jax.checkpoint import load, load_shapes
from ttt_jax.convert.checks import check_tensors
from ttt_jax.models.moshi import lora
from ttt_jax.training import distributed, sharding
from ttt_jax.training.config import ExperimentConfig
from ttt_jax.training.objective import objective_of
from ttt_jax.training.parameters import group_of, is_trained

INNER_LOOP = ("mini_batch_size", "base_lr", "rope_theta")
"""Of `TTTConfig`, what two models with TTT layers must agree on, and shapes do not tell."""


def initial_parameters(config: ExperimentConfig, given: Any = None) -> tuple[Any, Any]:
    """The model's parameters before the first update, and the low-rank factors (None unless the run trains such).

    They follow from `config.seed` and `given`, what `read_init_from` returned; what is not in there is fresh.
    """
    key = jax.random.key(config.seed)
    fresh = objective_of(config).init_parameters(key)
    params = _in_their_dtypes(config, unflatten_dict(flatten_dict(fresh) | flatten_dict(given or {})))
    if config.optimizer.train != "lora":
        return params, None
    return params, lora.init_factors(jax.random.fold_in(key, 1), params, config.lora.rank)


def read_init_from(config: ExperimentConfig, mesh: Mesh | None = None) -> dict[str, Any] | None:
    """The parameters of the model in `config.init_from`, None when that is "".

    Args:
        config: The experiment.
        mesh: Each device of it reads its part of the parameters; None puts them on the default device.

    Raises:
        FileNotFoundError, ValueError: See `check_init_from`.
    """
    if not config.init_from:
        return None
    check_init_from(config)
    shardings = None if mesh is None else functools.partial(sharding.parameter_shardings, mesh, config.model)
    with distributed.alone():
        _, params = load(config.init_from, shardings)
    return _in_their_dtypes(config, params)


def _in_their_dtypes(config: ExperimentConfig, params: Any) -> Any:
    def cast(path, leaf):
        trained = is_trained(jax.tree_util.keystr(path, simple=True, separator="/"), config.optimizer.train)
        return leaf.astype(config.precision.parameters if trained else config.precision.frozen)

    return jax.tree.map_with_path(cast, params)


def check_init_from(config: ExperimentConfig) -> None:
    """Checks, without reading the parameters, that the run can start from `config.init_from`.

    Raises:
        FileNotFoundError: No model there.
        ValueError: It cannot be read, or is not the experiment's model before TTT was inserted (or with TTT in fewer
            layers); lists every parameter that is missing, unexpected or misshapen.
    """
    if config.init_from:
        _check(config, *load_shapes(config.init_from))


def _check(config: ExperimentConfig, model: Any, params: Any) -> None:
    if type(model) is not type(config.model):
        expected, got = (type(m).__name__.removesuffix("Config") for m in (config.model, model))
        raise ValueError(f"config.init_from={config.init_from}: expected a {expected}, got a {got}.")
    compared = [
        (name, getattr(model, name), getattr(config.model, name)) for name in objective_of(config).not_in_the_shapes
    ]
    loops = model.ttt_config, config.model.ttt_config
    if None not in loops:
        compared += [(f"the TTT layers' {name}", *(getattr(loop, name) for loop in loops)) for name in INNER_LOOP]
    there, here = (getattr(m, "ttt", None) for m in (model, config.model))  # what was inserted into a Moshi
    if there and here:
        compared.append(("the TTT layers' design", there.design, here.design))
    differing = [
        f"{name}: there {there!r}, config.model says {here!r}" for name, there, here in compared if there != here
    ]
    if differing:
        raise ValueError(f"config.init_from={config.init_from}: is another model. " + "; ".join(differing))
    given = flatten_dict(params, sep="/")
    needed: dict[str, Any] = flatten_dict(jax.eval_shape(lambda: initial_parameters(config)[0]), sep="/")
    expected = {path: leaf.shape for path, leaf in needed.items() if path in given or group_of(path) == "base"}
    try:
        check_tensors(expected, given)
    except ValueError as error:
        raise ValueError(f"config.init_from={config.init_from}: {error}") from error
