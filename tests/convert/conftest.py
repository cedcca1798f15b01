import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


@pytest.fixture
def released(data_dir, tmp_path):
    """Function of a golden's name to a folder laid out as a released one: model.safetensors and config.json."""

    def make(name, weights="model.safetensors", **config):
        folder = tmp_path / "released" / name
        folder.mkdir(parents=True)
        shutil.copy(data_dir / f"{name}.safetensors", folder / weights)
        raw = json.loads((data_dir / f"{name}.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | config))
        return folder

    return make


@pytest.fixture
def rewritten():
    """Function that changes the tensors of a safetensors file in place."""

    def change(path, edit, metadata=None):
        tensors = {name: np.array(x) for name, x in load_file(path).items()}
        edit(tensors)
        save_file(tensors, path, metadata)

    return change
