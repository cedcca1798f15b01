"""What a mesh of devices splits goes through a kernel in parts: rows and heads apart, everything else whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ttt_kernels.partitioned import EACH, HEADS, SHARED, TOKENS, split

OF_ARGUMENTS, OF_RESULTS = (TOKENS, EACH, HEADS, SHARED), (TOKENS, EACH)
ROWS, TOKENS_OF_ROW, NUM_HEADS, DIM = 4, 6, 2, 8
SPLIT = P(("data", "fsdp"), None, "tensor")


@pytest.fixture
def kernel():
    """Sums over tokens and features, wrong for parts of them; it knows the shapes that it was traced with."""

    def run(x, steps, scale, shared):
        run.shapes.append(x.shape)
        total = jnp.sum(x, axis=(1, 3)) * jnp.sum(steps, axis=2)
        total = jnp.stack([total, total + jnp.max(scale, axis=1)[None]], axis=-1)
        return x * scale[None, None] + jnp.sum(shared), total

    run.shapes = []
    return run


@pytest.fixture
def arguments():
    shapes = ((ROWS, TOKENS_OF_ROW, NUM_HEADS, DIM), (ROWS, NUM_HEADS, TOKENS_OF_ROW), (NUM_HEADS, DIM), (5,))
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def through(kernel):
    return jax.jit(lambda *arguments: split(kernel, arguments, OF_ARGUMENTS, OF_RESULTS))


@pytest.mark.parametrize("given", [SPLIT, P("data"), P(None, "fsdp", None, "tensor"), P()])
def test_each_device_takes_its_rows_and_heads_whole(kernel, arguments, mesh, given):
    """Also of arguments that are split along other axes, which are brought together first."""
    expected = kernel(*arguments)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(arguments[0], NamedSharding(mesh, given)), *arguments[1:]]
        got = through(kernel)(*placed)
    rows, _, heads, _ = kernel.shapes[-1]
    assert kernel.shapes[-1] == (rows, TOKENS_OF_ROW, heads, DIM)
    assert [x.addressable_shards[0].data.shape[0] for x in got] == [rows, rows]
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)  # a product and a sum may be one operation


def test_what_is_split_by_rows_and_heads_stays_so(kernel, arguments, mesh):
    with jax.set_mesh(mesh):
        specs = (SPLIT, P(("data", "fsdp"), "tensor"), P("tensor"), P())
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
        compiled = through(kernel).lower(*placed).compile()
        got = compiled(*placed)
    assert kernel.shapes[-1] == (1, TOKENS_OF_ROW, 1, DIM)
    assert {x.addressable_shards[0].data.shape[:2] for x in got} == {(1, TOKENS_OF_ROW), (1, 1)}
    assert "all-gather" not in compiled.as_text()


def test_as_many_arguments_as_the_kernels_have(arguments, mesh):
    def kernel(*arguments):
        return (sum(jnp.mean(x, axis=(1, 3)) for x in arguments),)

    given = 12 * arguments[:1]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, SPLIT)) for x in given]
        (got,) = jax.jit(lambda *arguments: split(kernel, arguments, 12 * [TOKENS], [EACH]))(*placed)
    np.testing.assert_allclose(got, kernel(*given)[0], rtol=1e-5, atol=1e-6)


def test_one_device_and_one_devices_part_take_the_kernel_as_it_is(kernel, arguments, mesh):
    assert "custom_partitioning" not in str(jax.make_jaxpr(through(kernel))(*arguments))
    with jax.set_mesh(mesh):
        one = jax.shard_map(through(kernel), in_specs=P(), out_specs=P(), check_vma=False)
        assert "custom_partitioning" not in str(jax.make_jaxpr(one)(*arguments))
        assert "custom_partitioning" in str(jax.make_jaxpr(through(kernel))(*arguments))
