import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers.linear import linear

WIDTH, LAYERS = 256, 12


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            name = f"kernel_{i}"
            x = jnp.tanh(linear(self, name, x, self.param(name, nn.initializers.ones, (WIDTH, WIDTH), jnp.bfloat16)))
        return x


def test_bfloat16_kernels_are_widened_one_at_a_time_on_a_cpu():
    x = jax.ShapeDtypeStruct((1, WIDTH), jnp.bfloat16)
    params = jax.eval_shape(Chain().init, jax.random.key(0), x)
    memory = jax.jit(Chain().apply).lower(params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * WIDTH * WIDTH * 4


def test_elsewhere_nothing_waits():
    x = jnp.ones((1, WIDTH), jnp.bfloat16)
    traced = jax.jit(Chain().apply).trace(Chain().init(jax.random.key(0), x), x)
    assert "optimization_barrier" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "optimization_barrier" not in traced.lower(lowering_platforms=("cuda",)).as_text()
