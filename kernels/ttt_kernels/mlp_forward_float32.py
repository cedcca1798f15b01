"""TTT-MLP on float32 tokens: the forward kernel; a cluster of four thread blocks walks over a row and head.

Each block is one warpgroup with a slice of 64 hidden units, whose weights it keeps in registers. What every block needs
of all units is summed over the cluster; what has no hidden units each block computes for itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper, inner, sums
from ttt_kernels.blocks import MLPBlocks
from ttt_kernels.cluster import AXIS, SLICES, Exchange
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, D, Matrix, load, over_columns, over_rows, product
from ttt_kernels.tiles import MiniBatches


class _Matrices(NamedTuple):
    """Operands in SMEM."""

    out: Matrix  # [TILE, 64]
    w1: Matrix  # [64, 64], rows are outputs
    w2: Matrix
    x: Matrix  # [TILE, 64], the hidden layer
    x_q: Matrix  # [64, columns], that of readers
    g1: Matrix  # [64, C], gradients by the layers' outputs, and times minus the step size
    g1_step: Matrix
    g2: Matrix
    g2_step: Matrix
    mixing1: Matrix  # [TILE, columns]: (source, reader), minus the steps that readers take along gradients of a layer
    mixing2: Matrix


def forward(
    q, k, v, lr_read, lr_update, scale, w1t, b1, w2t, b2, ln_scale, ln_bias,
    *, causal: bool, eps: float, blocks: MLPBlocks, interpret,
):  # fmt: skip
    """Outputs and final weights: `mlp_forward.forward` on float32 tokens, without checkpoints."""
    batch_size, num_tokens, num_heads, _ = q.shape
    c = scale.shape[0]
    n = min(c, blocks.columns)
    mini_batches = MiniBatches(c, n)
    num_tiles = num_tokens // TILE
    parts = hopper.parts_of(q.dtype)
    f32 = jnp.float32
    of_tokens = [hopper.stacked(x) for x in (q, k, v)]
    rows, shape = (batch_size, num_heads), jax.ShapeDtypeStruct
    exchange = Exchange(n, blocks.interpreted, at_once=1 if c > n else 2)
    of_sums = exchange.results(rows)
    of_weights = tuple(shape(x.shape, f32) for x in (w1t, b1, w2t, b2))

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, w1t_g, b1_g, w2t_g, b2_g, ln_scale_g, ln_bias_g,
        out_g, w1t_end_g, b1_end_g, w2t_end_g, b2_end_g, *refs,
    ):  # fmt: skip
        sums_g, refs = refs[: len(of_sums)], refs[len(of_sums) :]
        (
            q_s, k_s, v_s, lr_read_s, lr_update_s, scale_s, sums_s, zero_s, tile_barrier, start_barrier,
            *rest,
        ) = refs  # fmt: skip
        of_matrices, of_exchange = rest[: len(_Matrices._fields)], rest[len(_Matrices._fields) :]
        zero = hopper.hidden_zero(zero_s, known=blocks.interpreted)

        def matrices() -> _Matrices:
            at = zero()
            return _Matrices(*(matrix[at] for matrix in of_matrices))

        row, head, own = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index(AXIS)
        loss = inner.Loss(eps, sums.total(sums_s.at[0], interpreted=blocks.interpreted), exact=True)
        over_cluster = exchange.bind(tuple(ref.at[row, head] for ref in sums_g), of_exchange, zero)

        def fetch(i):
            tokens = pl.ds(i * TILE, TILE)
            for source, target in ((q_g, q_s), (k_g, k_s), (v_g, v_s)):
                hopper.copy_tokens(source, (row, tokens, head), target, tile_barrier)
            for source, target in ((lr_read_g, lr_read_s), (lr_update_g, lr_update_s)):
                plgpu.copy_gmem_to_smem(source.at[row, head, tokens], target, tile_barrier)

        fetch(0)
        plgpu.copy_gmem_to_smem(scale_g, scale_s, start_barrier)
        w1t, w2t = (load(ref.at[row, head, own]) for ref in (w1t_g, w2t_g))
        b1, b2 = load(b1_g.at[row, head, own], ROWS), load(b2_g.at[row, head], ROWS)
        plgpu.barrier_wait(start_barrier)
        gamma, beta = (over_columns(load(ref.at[head], ROWS), n) for ref in (ln_scale_g, ln_bias_g))

        def mini_batch(m, weights):
            w1t, b1, w2t, b2 = weights
            s = matrices()
            tokens = mini_batches.tokens(m)
            q_t, k_t, v_t = q_s, k_s, v_s
            s.w1.write(w1t)
            s.w2.write(w2t)
            plgpu.commit_smem()

            def learn(i, steps):
                step1, step2 = steps
                s = matrices()
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                k_b = k_t[at].T
                z1 = product((D, n), (s.w1, k_b)) + over_columns(b1, n)
                s.x[at].T.write(inner.gelu(z1))
                plgpu.commit_smem()
                (z2,) = over_cluster(lambda: product((D, n), (s.w2, s.x[at].T)))
                target = v_t[at].T.read() - k_b.read()
                g2 = loss.gradient(z2 + over_columns(b2, n), target, gamma, beta).g
                lr = over_rows(load(lr_update_s.at[at], COLUMNS))
                s.g2[:, block].write(g2)
                s.g2_step[:, block].write(-(g2 * lr))
                plgpu.commit_smem()
                g1 = product((D, n), (s.w2.T, s.g2[:, block])) * inner.gelu_gradient(z1)
                s.g1[:, block].write(g1)
                s.g1_step[:, block].write(-(g1 * lr))
                return step1 + (g1 * lr).sum(axis=1), step2 + (g2 * lr).sum(axis=1)

            nothing = jnp.zeros_like(b1)
            step1, step2 = mini_batches.over_blocks(learn, (nothing, nothing))
            plgpu.commit_smem()

            def read(i, carry):
                s = matrices()
                at = mini_batches.block(m, i)
                q_b = q_t[at].T
                is_seen = mini_batches.is_seen(m, i, causal=causal)
                steps = over_columns(load(lr_read_s, ROWS), n)
                steps = jnp.where(is_seen, -steps * over_rows(load(scale_s.at[mini_batches.block(0, i)], COLUMNS)), 0.0)
                s.mixing1.write(inner.mixing(product((TILE, n), (k_t, q_b)), steps))
                plgpu.commit_smem()
                z1 = product((D, n), (s.w1, q_b), (s.g1, s.mixing1[tokens])) + over_columns(b1, n)
                s.x_q.write(inner.gelu(z1))
                plgpu.commit_smem()
                attention, z2 = over_cluster(
                    lambda: product((TILE, n), (s.x, s.x_q)), lambda: product((D, n), (s.w2, s.x_q))
                )
                s.mixing2.write(inner.mixing(attention, steps))
                plgpu.commit_smem()
                z2 = z2 + product((D, n), (s.g2, s.mixing2[tokens])) + over_columns(b2, n)
                out = q_b.read() + gamma * loss.normalize(z2)[0] + beta
                s.out[at].T.write(out)
                return carry

            mini_batches.over_blocks(read, 0)
            s = matrices()
            w1t = w1t + product((D, D), (s.g1_step, k_t[tokens]))
            w2t = w2t + product((D, D), (s.g2_step, s.x[tokens]))
            return w1t, b1 - step1, w2t, b2 - step2

        def tile(i, weights):
            plgpu.barrier_wait(tile_barrier)
            plgpu.wait_smem_to_gmem(0)  # the outputs of the tile before
            plgpu.commit_smem()
            weights = lax.fori_loop(0, mini_batches.per_tile, mini_batch, weights)
            plgpu.commit_smem()

            @pl.when(own == 0)
            def _():
                hopper.copy_tokens_back(matrices().out, out_g, (row, pl.ds(i * TILE, TILE), head))

            @pl.when(i + 1 < num_tiles)
            def _():
                fetch(i + 1)

            return weights

        *of_slice, b2 = lax.fori_loop(0, num_tiles, tile, (w1t, b1, w2t, b2))
        for value, target in zip(of_slice, (w1t_end_g, b1_end_g, w2t_end_g), strict=True):
            target.at[row, head, own][...] = value

        @pl.when(own == 0)
        def _():
            b2_end_g.at[row, head][...] = b2

        plgpu.wait_smem_to_gmem(0)
        exchange.finish(of_exchange)

    def matrix(*shape: int) -> Any:
        return Matrix.scratch(parts, shape, hopper.over_tokens(n))

    tokens, operand = matrix(TILE, D), matrix(1, D, c)
    steps = plgpu.SMEM((TILE,), f32)
    out, *results = plgpu.kernel(
        body,
        out_type=(shape(of_tokens[0].shape, jnp.bfloat16), *of_weights, *of_sums),
        grid=rows,
        grid_names=("row", "head"),
        cluster=(SLICES,),
        cluster_names=(AXIS,),
        scratch_types=[
            *(tokens, tokens, tokens, steps, steps, plgpu.SMEM((c,), f32)),
            sums.scratch(1),
            hopper.HIDDEN_ZERO,
            plgpu.Barrier(num_arrivals=3 * parts + 2),
            plgpu.Barrier(),
            *(matrix(1, TILE, D), matrix(1, D, D), matrix(1, D, D), matrix(1, TILE, D)),
            *(matrix(1, D, n), operand, operand, operand, operand, matrix(1, TILE, n), matrix(1, TILE, n)),
            *exchange.scratch(),
        ],
        compiler_params=hopper.compiler_params(exact=True),
        interpret=interpret,
    )(*of_tokens, lr_read, lr_update, scale, w1t, b1, w2t, b2, ln_scale, ln_bias)
    return hopper.joined(out, q.dtype), *results[: len(results) - len(of_sums)]
