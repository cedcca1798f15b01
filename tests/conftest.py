"""Strict defaults for every test: eight fake CPU devices, no rank promotion, strict dtypes in the numeric rooms."""

import os

# JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels -m "" runs the kernels on a GPU.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # Tests compile far more than they compute; these compile several times faster than the defaults.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_force_host_platform_device_count=8",
        ]
    )

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

STRICT_DTYPE_ROOMS = ("kernels", "ttt", "layers", "models")
TESTS = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    """The files that take minutes first, so that all workers have something to do until the end."""
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] != "training")


@pytest.fixture(autouse=True)
def strict_dtype_promotion(request):
    """optax mixes dtypes, so only the rooms below training are held to strict promotion."""
    room = request.path.relative_to(TESTS).parts[0]
    if room in STRICT_DTYPE_ROOMS:
        with jax.numpy_dtype_promotion("strict"):
            yield
    else:
        yield


@pytest.fixture(scope="session")
def fast_compilation() -> str:
    """XLA's flags for a process of its own, with one device."""
    return " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    return TESTS / "data"
