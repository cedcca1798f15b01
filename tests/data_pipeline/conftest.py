import json

import pytest
from safetensors.numpy import load_file

from ttt_jax import save_model
from ttt_jax.convert import mimi_params
from ttt_jax.data import conversations, reader
from ttt_jax.models.mimi import MimiConfig

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


@pytest.fixture(scope="session")
def mimi_directory(tmp_path_factory, data_dir):
    """A converted Mimi with random weights, 16 codebooks of 64 of which 8 are used."""
    config = MimiConfig.from_kyutai(data_dir / "mimi_tiny.json")
    directory = tmp_path_factory.mktemp("mimi") / "tiny"
    save_model(directory, config, mimi_params(config, load_file(data_dir / "mimi_tiny.safetensors")))
    return directory


@pytest.fixture(scope="session")
def contents():
    """Everything a dataset directory holds, comparable with `==`.

    Records are compared decoded: protobuf maps have no order, so TFDS's record files differ between processes in the
    order of a record's three fields.
    """

    def read(folder):
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        found: dict = {name: path.read_bytes() for name, path in files.items() if "array_record" not in name}
        assert len(found) < len(files)
        for split in json.loads(found["tokens.json"])["num_frames"]:
            dataset = reader.open_dataset(folder, split)
            records = (dataset[i] for i in range(len(dataset)))
            found[split] = [(r.id, r.codes.tobytes(), r.metadata) for r in records]
        return found

    return read
