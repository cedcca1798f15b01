import pytest

from ttt_jax.data import conversations

SMALL = {"hours": 0.015, "seed": 5, "min_minutes": 0.2, "max_minutes": 0.4}


@pytest.fixture(scope="session")
def small_settings():
    """Arguments of `conversations.make` for a few recordings of about 20 s."""
    return dict(SMALL)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory):
    """A few synthesized recordings of about 20 s; read only."""
    output = tmp_path_factory.mktemp("conversations") / "small"
    conversations.make(output, **SMALL, keep_wav=1, workers=2)
    return output
