import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ttt_jax.convert.tensors import computed, open_tensors
from ttt_jax.convert.writing import Entry, write_file


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((6, 4)).astype(ml_dtypes.bfloat16),
        "b": rng.standard_normal((3,)).astype(np.float32),
        "c": rng.integers(-127, 128, (4, 2)).astype(np.int8),
        "d": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "scalar": np.array(3.0, np.float32),
    }


def check(opened, arrays):
    assert opened.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (opened[name].shape, opened[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(np.asarray(opened[name]), array)


def test_one_file(tmp_path, arrays):
    save_file(arrays, tmp_path / "model.safetensors")
    opened = open_tensors(tmp_path / "model.safetensors")
    check(opened, arrays)
    part = opened["a"][2:5]
    assert part.shape == (3, 4)
    np.testing.assert_array_equal(np.asarray(part[1:2]), arrays["a"][3:4])


def test_an_index_of_several(tmp_path, arrays):
    files = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors", "d": "2.safetensors"}
    files["scalar"] = "2.safetensors"
    for file in set(files.values()):
        save_file({name: arrays[name] for name in arrays if files[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    check(open_tensors(index), arrays)
    index.write_text(json.dumps({"weight_map": files | {"e": "2.safetensors"}}))
    with pytest.raises(ValueError, match=r"lack: e in 2\.safetensors"):
        open_tensors(index)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1\.safetensors does not exist"):
        open_tensors(index)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is no index"):
        open_tensors(index)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_told_before_anything_is_read(tmp_path, arrays, keep):
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short .* download it again"):
        open_tensors(path)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"end in \.safetensors"):
        open_tensors(tmp_path / "model.pt")


def test_a_computed_tensor_is_computed_when_it_is_read():
    calls = []

    def compute():
        calls.append(1)
        return np.arange(6.0).reshape(3, 2)

    tensor = computed((3, 2), np.float64, compute)
    part = tensor[1:]
    assert not calls
    np.testing.assert_array_equal(np.asarray(part), [[2, 3], [4, 5]])


def test_written_files_are_what_the_package_reads(tmp_path, arrays):
    path = tmp_path / "model.safetensors"
    entries = [Entry(name, array.shape, array.dtype) for name, array in arrays.items()]
    sizes = []
    write_file(path, entries, arrays.values(), sizes.append)
    assert sizes == [array.nbytes for array in arrays.values()]
    read = load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_a_value_that_was_not_announced_is_refused(tmp_path, arrays):
    with pytest.raises(ValueError, match="not what was announced"):
        write_file(tmp_path / "x.safetensors", [Entry("a", (4, 6), arrays["a"].dtype)], [arrays["a"]])
