import ml_dtypes
import numpy as np
import pytest

from ttt_jax.convert.adapters import dequantized, with_lora_merged

RNG = np.random.default_rng(0)


def test_int8_is_the_matrix_times_its_rows_scale_over_127():
    int8, scale = RNG.integers(-127, 128, (4, 3)).astype(np.int8), RNG.random(4).astype(np.float32)
    plain = dequantized({"x.weight": int8, "x.weight_scb": scale, "norm": np.ones(2, ml_dtypes.bfloat16)})
    assert plain.keys() == {"x.weight", "norm"}
    assert plain["x.weight"].dtype == np.float32
    # float64 of the same product, within two roundings of float32
    np.testing.assert_allclose(np.asarray(plain["x.weight"]), int8 * scale[:, None].astype(float) / 127, rtol=2**-22)
    np.testing.assert_array_equal(np.asarray(plain["x.weight"][1:3]), np.asarray(plain["x.weight"])[1:3])


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.weight": np.zeros((4, 3), np.int8)},
        {"x.weight_scb": np.zeros(4, np.float32)},
        {"x.weight": np.zeros((4, 3), np.float32), "x.weight_scb": np.zeros(4, np.float32)},
    ],
)
def test_int8_without_scale_and_scale_without_int8_are_refused(tensors):
    with pytest.raises(ValueError, match=r"must come in pairs; alone are \['x\.weight'\]"):
        dequantized(tensors)


def test_a_scale_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"a scale per row, \[4\], got \[3\]"):
        dequantized({"x.weight": np.zeros((4, 3), np.int8), "x.weight_scb": np.zeros(3, np.float32)})


@pytest.mark.parametrize("base", ["x.frozen_W.weight", "x.weight"])
def test_lora_adds_the_scaled_product_b_a(base):
    w, a, b = (RNG.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (2, 3), (5, 2)))
    plain = with_lora_merged({base: w, "x.lora_A.weight": a, "x.lora_B.weight": b, "y.weight": a}, 1.5)
    assert plain.keys() == {"x.weight", "y.weight"}
    expected = w.astype(float) + 1.5 * b.astype(float) @ a.astype(float)
    np.testing.assert_allclose(np.asarray(plain["x.weight"]), expected, rtol=1e-5, atol=1e-6)  # float32, 3 terms
    np.testing.assert_array_equal(np.asarray(plain["y.weight"]), a)


def test_lora_keeps_the_dtype_of_the_matrix():
    w = np.ones((2, 2), ml_dtypes.bfloat16)
    a, b = np.full((1, 2), 0.5, np.float32), np.full((2, 1), 0.25, np.float32)
    merged = with_lora_merged({"x.weight": w, "x.lora_A.weight": a, "x.lora_B.weight": b}, 2.0)["x.weight"]
    assert merged.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(merged), np.full((2, 2), 1.25, ml_dtypes.bfloat16))


@pytest.mark.parametrize("missing", ["x.weight", "x.lora_A.weight", "x.lora_B.weight"])
def test_a_lora_part_that_is_missing_is_told(missing):
    tensors = {"x.weight": np.ones((5, 3)), "x.lora_A.weight": np.ones((2, 3)), "x.lora_B.weight": np.ones((5, 2))}
    del tensors[missing]
    with pytest.raises(ValueError, match=r"LoRA needs x\.weight"):
        with_lora_merged(tensors, 1.0)


def test_lora_factors_that_do_not_fit_are_told():
    tensors = {"x.weight": np.ones((5, 3)), "x.lora_A.weight": np.ones((2, 4)), "x.lora_B.weight": np.ones((5, 2))}
    with pytest.raises(ValueError, match=r"W \[5, 3\], A \[2, 4\], B \[5, 2\]"):
        with_lora_merged(tensors, 1.0)


def test_both_names_of_a_frozen_matrix_are_refused():
    with pytest.raises(ValueError, match="expected one of them"):
        with_lora_merged({"x.weight": np.ones((2, 2)), "x.frozen_W.weight": np.ones((2, 2))}, 1.0)
