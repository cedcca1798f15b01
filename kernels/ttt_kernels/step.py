"""One token, in one launch: what decoding repeats; one warpgroup reads and updates the state of one row and head.

There are no matrix products, so all is float32, exact for tokens of any dtype. A state is far larger than what is
computed with it: at best the step takes as long as to read the state once and to write it once.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import inner, interpreter
from ttt_kernels.hopper import COLUMNS, ROWS, WGMMA, D, load, over_columns, over_rows
from ttt_kernels.partitioned import EACH, EACH_ROW, HEADS, split

Arrays = tuple[jax.Array, ...]


def ttt_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    read_scale: jax.Array,
    update_scale: jax.Array,
    weights: Arrays,
    gradient: Arrays,
    ln_scale: jax.Array,
    ln_bias: jax.Array,
    *,
    eps: float = 1e-6,
) -> tuple[jax.Array, Arrays, Arrays]:
    """One token of each row: its gradient joins those of its mini-batch, then it reads.

        G <- G + lr * grad,   out = q + LN(f(q; w - read_scale * G)),   w <- w - update_scale * G

    Args:
        q: `[B, H, D]` float32, D = 64, or with linear weights 128.
        k: as q.
        v: as q.
        lr: `[B, H]` float32.
        read_scale: `[B]` float32.
        update_scale: `[B]` float32; 0 where the mini-batch does not end.
        weights: `w1 [B, H, D, D], b1 [B, H, D]`, or those of the MLP with 256 hidden units; float32.
        gradient: G, as the weights.
        ln_scale: `[H, D]` float32.
        ln_bias: `[H, D]` float32.
        eps: of the inner LayerNorm.

    Returns:
        out `[B, H, D]` float32, the weights, and G with the token's gradient.
    """
    dim = q.shape[-1]
    count, slices = len(weights), weights[0].shape[-1] // D

    def body(q_g, k_g, q_in_g, k_in_g, v_g, lr_g, read_scale_g, update_scale_g, ln_scale_g, ln_bias_g, *refs):
        weights_g, gradient_g, (out_g, *refs) = refs[:count], refs[count : 2 * count], refs[2 * count :]
        new_weights_g, new_gradient_g, scratch = refs[:count], refs[count : 2 * count], refs[2 * count :]
        row, head = lax.axis_index("row"), lax.axis_index("head")
        loss = inner.Loss(eps, axis=1, exact=True)
        lr, read_scale, update_scale = lr_g[row, head], read_scale_g[row], update_scale_g[row]

        def of_outputs():
            """gamma, beta, q, k and v, the same for each row."""
            refs = (ln_scale_g.at[head], ln_bias_g.at[head], *(ref.at[row, head] for ref in (q_g, k_g, v_g)))
            return tuple(over_rows(load(ref, COLUMNS)) for ref in refs)

        early = of_outputs() if dim == D else None  # at D = 128 they would take 160 registers
        # The same arrays: of two loads of one array in two layouts, the compiler would make one.
        inputs = [pl.ds(start, D) for start in range(0, dim, D)]
        q_in, k_in = (
            [over_columns(load(ref.at[row, head, at], ROWS), dim) for at in inputs] for ref in (q_in_g, k_in_g)
        )

        def updated(i, gradient, *at):
            """Of weights i: G with the token's `gradient`, and what the token reads; both weights and G are written."""
            layout = COLUMNS if gradient.ndim == 1 else WGMMA
            weights, before = (load(ref[i].at[row, head, *at], layout) for ref in (weights_g, gradient_g))
            gradient = before + lr * gradient
            new_gradient_g[i].at[row, head, *at][...] = gradient
            new_weights_g[i].at[row, head, *at][...] = weights - update_scale * gradient
            return weights - read_scale * gradient

        def inner_gradient(z):
            """By column, as [64, D] and as a vector."""
            gamma, beta, _, k_out, v_out = early or of_outputs()
            g = loss.gradient(over_rows(z), v_out - k_out, gamma, beta).g
            return g, g.max(axis=0)

        def write(z):
            gamma, beta, q_out, _, _ = early or of_outputs()
            normalized = loss.normalize(over_rows(z))[0]
            out_g.at[row, head][...] = (q_out + gamma * normalized + beta).max(axis=0)

        def linear():
            z = [(load(weights_g[0].at[row, head, at]) * k).sum(axis=0) for k, at in zip(k_in, inputs, strict=True)]
            g, g_vector = inner_gradient(sum(z, load(weights_g[1].at[row, head], COLUMNS)))
            z = [(updated(0, k * g, at) * q).sum(axis=0) for k, q, at in zip(k_in, q_in, inputs, strict=True)]
            write(sum(z, updated(1, g_vector)))

        def mlp():
            hidden_s, transposing_s = scratch
            (q_x,), (k_x,) = q_in, k_in

            def transposed(vector, to):
                plgpu.commit_smem()  # all have read what was there
                transposing_s[...] = vector
                plgpu.commit_smem()
                return load(transposing_s, to)

            def slice_of(i):
                at = pl.ds(pl.multiple_of(i * D, D), D)
                return at, (slice(None), at)

            def hidden(i, z):
                at, columns = slice_of(i)
                z1 = (load(weights_g[0].at[row, head, *columns]) * k_x).sum(axis=0)
                z1 = transposed(z1 + load(weights_g[1].at[row, head, at], COLUMNS), ROWS)
                hidden_s.at[i][...] = z1
                w2 = load(weights_g[2].at[row, head, at])
                return z + (w2 * over_columns(inner.gelu(z1), D)).sum(axis=0)

            z = lax.fori_loop(0, slices, hidden, load(weights_g[3].at[row, head], COLUMNS))
            g, g_vector = inner_gradient(z)

            def read(i, z):
                at, columns = slice_of(i)
                z1 = load(hidden_s.at[i], ROWS)
                g1 = (load(weights_g[2].at[row, head, at]) * g).sum(axis=1) * inner.gelu_gradient(z1)
                g1 = transposed(g1, COLUMNS)
                w1, b1 = updated(0, k_x * over_rows(g1), *columns), updated(1, g1, at)
                w2 = updated(2, over_columns(inner.gelu(z1), D) * g, at)
                x = inner.gelu(transposed((w1 * q_x).sum(axis=0) + b1, ROWS))
                return z + (w2 * over_columns(x, D)).sum(axis=0)

            plgpu.commit_smem()
            write(lax.fori_loop(0, slices, read, updated(3, g_vector)))

        linear() if count == 2 else mlp()

    f32 = jnp.float32

    def kernel(*arguments):
        (batch_size, num_heads, _), state = arguments[0].shape, arguments[-2 * count :]
        return plgpu.kernel(
            body,
            out_type=tuple(jax.ShapeDtypeStruct(x.shape, f32) for x in (arguments[0], *state)),
            grid=(batch_size, num_heads),
            grid_names=("row", "head"),
            scratch_types=[] if count == 2 else [plgpu.SMEM((slices, D), f32), plgpu.SMEM((D,), f32)],
            interpret=interpreter.parameters(),
        )(*arguments)

    out, *state = split(
        kernel,
        (q, k, q, k, v, lr, read_scale, update_scale, ln_scale, ln_bias, *weights, *gradient),
        (*(EACH,) * 6, *(EACH_ROW,) * 2, *(HEADS,) * 2, *(EACH,) * 2 * count),
        (EACH,) * (1 + 2 * count),
    )
    return out, tuple(state[:count]), tuple(state[count:])
