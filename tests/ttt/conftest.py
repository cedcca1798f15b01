"""The operation's tests compute in float64 unless they say otherwise, so that tolerances show errors, not rounding."""

import jax
import pytest


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield
