import ml_dtypes
import numpy as np
import pytest

from ttt_jax.convert.table import Rule, Table, assemble, make_params, take_apart

RULES = (
    Rule("plain", ("a",), (3, 1, 5)),
    Rule("norm/alpha", ("b",), (1, 1, 4), view=(4,)),
    Rule("kernel", ("c",), (3, 5), transpose=True),
    Rule("conv", ("d",), (3, 5, 7), transpose=True),
    Rule("both", ("e",), (1, 4, 1), view=(1, 4), transpose=True),
    Rule("stacked", ("f.0", "f.1"), (3, 5), stack=True),
    Rule("kernels", ("g.0", "g.1", "g.2"), (3, 5), transpose=True, stack=True),
)
SHAPES = ((3, 1, 5), (4,), (5, 3), (7, 5, 3), (4, 1), (2, 3, 5), (3, 5, 3))


def tensors(rule, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(rule.shape).astype(dtype) for name in rule.names}


@pytest.mark.parametrize(("rule", "shape"), list(zip(RULES, SHAPES, strict=True)), ids=[rule.path for rule in RULES])
def test_a_leaf_taken_apart_gives_the_tensors_bit_for_bit(rule, shape):
    given = tensors(rule, ml_dtypes.bfloat16)
    leaf = assemble(rule, given)
    assert leaf.shape == rule.leaf_shape == shape
    assert leaf.dtype == ml_dtypes.bfloat16
    assert leaf.flags.c_contiguous
    back = dict(take_apart(rule, leaf))
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype


def test_a_kernel_is_the_transposed_weight_and_steps_lie_in_order():
    given = tensors(RULES[-1])
    leaf = assemble(RULES[-1], given)
    for i in range(3):
        np.testing.assert_array_equal(leaf[i], given[f"g.{i}"].T)


def test_tensors_of_two_dtypes_make_a_leaf_that_holds_both():
    given = tensors(RULES[-2]) | {"f.1": np.zeros((3, 5), ml_dtypes.bfloat16)}
    assert assemble(RULES[-2], given).dtype == np.float32
    assert assemble(RULES[-2], given, ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16


def test_constants_must_be_there_and_are_no_parameters():
    table = Table(RULES[:1], {"initialized": np.ones(1, np.float32)})
    given = tensors(RULES[0])
    with pytest.raises(ValueError, match=r"missing \(1\): initialized \[1\]"):
        make_params(table, given)
    assert set(make_params(table, given | {"initialized": np.zeros(1)})) == {"plain"}
