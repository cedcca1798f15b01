"""TTT-MLP, D = 64, C = 64: the backward kernel; a cluster of four thread blocks walks back over a row and head.

From each checkpoint it first walks forward, keeping the weights at the start of each mini-batch in global memory, then
back. Each thread block is one warpgroup with a slice of the hidden units; what sums over all units goes over the
cluster. A mini-batch is worked on in blocks of tokens.
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
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, D, load, over_columns, over_rows, product
from ttt_kernels.tiles import MiniBatches


class _Matrices(NamedTuple):
    """Matrices in SMEM, bfloat16 but for two; where not said otherwise, rows are tokens."""

    q: Any  # [TILE, 64]
    k: Any
    v: Any
    d_out: Any
    d_k: Any
    d_w1: Any  # [64, 64] float32, rows are outputs
    d_w2: Any
    w1: Any  # [64, 64], rows are outputs
    w2: Any
    d_w1_operand: Any
    d_w2_operand: Any
    x: Any  # [TILE, 64], the hidden layer
    g1: Any
    g2: Any
    x_q: Any  # [C, 64], of readers
    d_z1_q: Any
    d_z2_q: Any
    g1_step: Any  # [columns, 64]
    g2_step: Any
    d_u: Any
    d_z1: Any
    d_z2: Any
    mixing1: Any  # [TILE, C]: (source, reader)
    mixing2: Any
    d_attention1: Any
    d_attention2: Any


def backward(
    q, k, v, lr_read, lr_update, scale, w1t_kept, b1_kept, w2t_kept, b2_kept, ln_scale, ln_bias, d_out, d_w1t, d_b1,
    d_w2t, d_b2, *, causal: bool, eps: float, blocks: MLPBlocks, interpret,
):  # fmt: skip
    """As `mlp_backward.backward`."""
    batch_size, num_tokens, num_heads, _ = q.shape
    c = scale.shape[0]
    n = min(c, blocks.columns)
    mini_batches = MiniBatches(c, n)
    num_tiles = num_tokens // TILE
    per_group = min(blocks.tiles_per_checkpoint, num_tiles)
    num_groups = -(-num_tiles // blocks.tiles_per_checkpoint)
    f32, bf16 = jnp.float32, jnp.bfloat16
    exchange = Exchange(n, blocks.interpreted, at_once=1)
    rows = (batch_size, num_heads)
    of_sums = exchange.results(rows)

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, w1t_kept_g, b1_kept_g, w2t_kept_g, b2_kept_g, ln_scale_g,
        ln_bias_g, d_out_g, d_w1t_end_g, d_b1_end_g, d_w2t_end_g, d_b2_end_g,
        d_q_g, d_k_g, d_v_g, d_lr_read_g, d_lr_update_g, d_scale_g, d_w1t_g, d_b1_g, d_w2t_g, d_b2_g, d_ln_scale_g,
        d_ln_bias_g, weights_g, biases_g, *refs,
    ):  # fmt: skip
        sums_g, refs = refs[: len(of_sums)], refs[len(of_sums) :]
        (
            lr_read_s, lr_update_s, scale_s, d_lr_read_s, d_lr_update_s, d_scale_s,
            ln_scale_s, ln_bias_s, sums_s, zero_s, start_barrier, recompute_barrier, tile_barrier, *rest,
        ) = refs  # fmt: skip
        of_matrices, of_exchange = rest[: len(_Matrices._fields)], rest[len(_Matrices._fields) :]
        zero = hopper.hidden_zero(zero_s, known=blocks.interpreted)

        def matrices() -> _Matrices:
            at = zero()
            return _Matrices(*(ref.at[at] for ref in of_matrices))

        row, head, own = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index(AXIS)
        at_own = (row, head, own)
        loss = inner.Loss(eps, sums.total(sums_s.at[0], interpreted=blocks.interpreted))
        over_cluster = exchange.bind(tuple(ref.at[row, head] for ref in sums_g), of_exchange, zero)

        hopper.fetch(
            start_barrier, (scale_g, scale_s), (ln_scale_g.at[head], ln_scale_s), (ln_bias_g.at[head], ln_bias_s)
        )
        s = matrices()
        s.d_w1[...], s.d_w2[...] = load(d_w1t_end_g.at[at_own]), load(d_w2t_end_g.at[at_own])
        gamma, beta = (over_columns(load(ref, ROWS), n) for ref in (ln_scale_s, ln_bias_s))

        def read_keys(s, at, b1, b2):
            """The inner gradients of a block, under the weights in SMEM: of layer 2, then what layer 1 has."""
            k_b = s.k.at[at].T
            z1 = product((D, n), (s.w1, k_b)) + over_columns(b1, n)
            s.x.at[at].T[...] = inner.gelu(z1).astype(bf16)
            plgpu.commit_smem()
            (z2,) = over_cluster(lambda: product((D, n), (s.w2, s.x.at[at].T)))
            target = load(s.v.at[at].T).astype(f32) - load(k_b).astype(f32)
            keys = loss.gradient(z2 + over_columns(b2, n), target, gamma, beta)
            s.g2.at[at].T[...] = keys.g.astype(bf16)
            plgpu.commit_smem()
            d_x = product((D, n), (s.w2.T, s.g2.at[at].T))
            g1 = d_x * inner.gelu_gradient(z1)
            s.g1.at[at].T[...] = g1.astype(bf16)
            return keys, z1, d_x, g1

        def write_steps(s, at, g1, g2):
            lr = over_rows(load(lr_update_s.at[at], COLUMNS))
            s.g1_step.T[...] = (-(g1 * lr)).astype(bf16)
            s.g2_step.T[...] = (-(g2 * lr)).astype(bf16)
            return lr

        def recompute(first, j, weights):
            """Forward over tile `first + j`, keeping the weights that each mini-batch starts with."""
            s = matrices()
            tokens = pl.ds((first + j) * TILE, TILE)
            hopper.fetch(
                recompute_barrier,
                (k_g.at[row, tokens, head], s.k),
                (v_g.at[row, tokens, head], s.v),
                (lr_update_g.at[row, head, tokens], lr_update_s),
            )

            def mini_batch(m, weights):
                w1t, b1, w2t, b2 = weights
                s = matrices()
                kept = (*at_own, j * mini_batches.per_tile + m)
                w1, w2 = w1t.astype(bf16), w2t.astype(bf16)
                weights_g.at[*kept, 0][...], weights_g.at[*kept, 1][...] = w1, w2
                biases_g.at[*kept, 0][...], biases_g.at[*kept, 1][...] = b1, b2
                s.w1[...], s.w2[...] = w1, w2
                plgpu.commit_smem()

                def update(i, weights):
                    w1t, step1, w2t, step2 = weights
                    s = matrices()
                    at = mini_batches.block(m, i)
                    keys, _, _, g1 = read_keys(s, at, b1, b2)
                    lr = write_steps(s, at, g1, keys.g)
                    plgpu.commit_smem()
                    w1t = w1t + product((D, D), (s.g1_step.T, s.k.at[at]))
                    w2t = w2t + product((D, D), (s.g2_step.T, s.x.at[at]))
                    return w1t, step1 + (g1 * lr).sum(axis=1), w2t, step2 + (keys.g * lr).sum(axis=1)

                nothing = jnp.zeros_like(b1)
                w1t, step1, w2t, step2 = mini_batches.over_blocks(update, (w1t, nothing, w2t, nothing))
                return w1t, b1 - step1, w2t, b2 - step2

            weights = lax.fori_loop(0, mini_batches.per_tile, mini_batch, weights)
            plgpu.commit_smem()
            return weights

        def mini_batch(m, j, d_b1, d_b2, d_gamma, d_beta, d_lr_read):
            s = matrices()
            tokens, kept = mini_batches.tokens(m), (*at_own, j * mini_batches.per_tile + m)
            s.w1[...], s.w2[...] = load(weights_g.at[*kept, 0]), load(weights_g.at[*kept, 1])
            b1, b2 = (load(biases_g.at[*kept, i], ROWS) for i in range(2))
            s.d_w1_operand[...], s.d_w2_operand[...] = load(s.d_w1).astype(bf16), load(s.d_w2).astype(bf16)
            plgpu.commit_smem()
            step = -over_columns(load(lr_read_s, ROWS), n)

            def write_keys(i, _):
                read_keys(matrices(), mini_batches.block(m, i), b1, b2)

            mini_batches.over_blocks(write_keys, None)
            plgpu.commit_smem()

            def back_through_reading(i, carry):
                d_b1, d_b2, d_gamma, d_beta, d_lr_read = carry
                s = matrices()
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                q_b, x_q, d_z1_q, d_z2_q = s.q.at[at].T, s.x_q.at[block].T, s.d_z1_q.at[block].T, s.d_z2_q.at[block].T
                is_seen = mini_batches.is_seen(m, i, causal=causal)
                by_reader = over_rows(load(scale_s.at[block], COLUMNS))
                # The forward pass again.
                attention1 = jnp.where(is_seen, product((TILE, n), (s.k, q_b)) + 1.0, 0.0)
                s.mixing1.at[:, block][...] = (attention1 * by_reader * step).astype(bf16)
                plgpu.commit_smem()
                z1 = product((D, n), (s.w1, q_b), (s.g1.at[tokens].T, s.mixing1.at[tokens, block]))
                z1 = z1 + over_columns(b1, n)
                x_q[...] = inner.gelu(z1).astype(bf16)
                plgpu.commit_smem()
                attention2, z2 = over_cluster(
                    lambda: product((TILE, n), (s.x, x_q)), lambda: product((D, n), (s.w2, x_q))
                )
                attention2 = jnp.where(is_seen, attention2 + 1.0, 0.0)
                s.mixing2.at[:, block][...] = (attention2 * by_reader * step).astype(bf16)
                plgpu.commit_smem()
                z2 = z2 + product((D, n), (s.g2.at[tokens].T, s.mixing2.at[tokens, block])) + over_columns(b2, n)
                # Back through layer 2.
                d_out = load(s.d_out.at[at].T).astype(f32)
                normalized, rstd = loss.normalize(z2)
                d_gamma = d_gamma + (d_out * normalized).sum(axis=1)
                d_beta = d_beta + d_out.sum(axis=1)
                d_z2 = rstd * loss.without_projections(d_out * gamma, normalized)
                d_z2_q[...] = d_z2.astype(bf16)
                plgpu.commit_smem()
                d_mixing2 = jnp.where(is_seen, product((TILE, n), (s.g2, d_z2_q)), 0.0)
                s.d_attention2.at[:, block][...] = (d_mixing2 * by_reader * step).astype(bf16)
                plgpu.commit_smem()
                # Back through layer 1.
                d_x = product((D, n), (s.w2.T, d_z2_q), (s.x.at[tokens].T, s.d_attention2.at[tokens, block]))
                d_z1 = d_x * inner.gelu_gradient(z1)
                d_z1_q[...] = d_z1.astype(bf16)
                plgpu.commit_smem()
                d_mixing1 = jnp.where(is_seen, product((TILE, n), (s.g1, d_z1_q)), 0.0)
                s.d_attention1.at[:, block][...] = (d_mixing1 * by_reader * step).astype(bf16)
                # Each slice has its part of layer 1's, and a share of layer 2's, which all have.
                d_steps = d_mixing1 * attention1 + d_mixing2 * attention2 * (1.0 / SLICES)
                d_lr_read = d_lr_read - (d_steps * by_reader).sum(axis=1)
                d_scale_s.at[at][...] = loss.total(d_steps * step)
                return d_b1 + d_z1.sum(axis=1), d_b2 + d_z2.sum(axis=1), d_gamma, d_beta, d_lr_read

            *carry, d_lr_read = mini_batches.over_blocks(back_through_reading, (d_b1, d_b2, d_gamma, d_beta, d_lr_read))
            plgpu.commit_smem()

            def back_through_update(i, carry):
                next_d_b1, next_d_b2, d_gamma, d_beta = carry
                s = matrices()
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                keys, z1, d_x, g1 = read_keys(s, at, b1, b2)
                k_b, q_t, k_t = s.k.at[at].T, s.q.at[tokens].T, s.k.at[tokens].T
                slope = inner.gelu_gradient(z1)
                lr = write_steps(s, at, g1, keys.g)
                # Back through the step of layer 1 and its inner gradient.
                d_step1 = product((D, n), (s.d_w1_operand, k_b)) + over_columns(d_b1, n)
                d_g1 = product((D, n), (s.d_z1_q.T, s.mixing1.at[at].T)) - d_step1 * lr
                s.d_u.T[...] = (d_g1 * slope).astype(bf16)
                plgpu.commit_smem()
                # Back through the step of layer 2 and its inner gradient.
                d_step2, d_g2 = over_cluster(
                    lambda: product((D, n), (s.d_w2_operand, s.x.at[at].T)), lambda: product((D, n), (s.w2, s.d_u.T))
                )
                d_step2 = d_step2 + over_columns(d_b2, n)
                d_lr = loss.total(g1 * d_step1) + loss.total(keys.g * d_step2) * (1.0 / SLICES)
                d_lr_update_s.at[at][...] = -d_lr
                d_g2 = d_g2 + product((D, n), (s.d_z2_q.T, s.mixing2.at[at].T)) - d_step2 * lr
                d = loss.back_through_gradient(d_g2, keys, gamma)
                d_gamma, d_beta = d_gamma + d.d_gamma.sum(axis=1), d_beta + d.d_beta.sum(axis=1)
                s.d_z2.T[...] = d.d_z.astype(bf16)
                plgpu.commit_smem()
                # Back through the layers.
                d_z1 = slope * product(
                    (D, n),
                    (s.w2.T, s.d_z2.T),
                    (s.d_w2_operand.T, s.g2_step.T),
                    (s.x_q.T, s.d_attention2.at[at].T),
                )
                d_z1 = d_z1 + d_g1 * d_x * inner.gelu_second_derivative(z1)
                s.d_z1.T[...] = d_z1.astype(bf16)
                plgpu.commit_smem()
                # Back to the tokens and the weights.
                d_k, d_q = over_cluster(
                    lambda: product(
                        (D, n),
                        (q_t, s.d_attention1.at[at].T),
                        (s.d_w1_operand.T, s.g1_step.T),
                        (s.w1.T, s.d_z1.T),
                    ),
                    lambda: product((D, n), (s.w1.T, s.d_z1_q.at[block].T), (k_t, s.d_attention1.at[tokens, block])),
                )
                s.d_out.at[at].T[...] = (load(s.d_out.at[at].T).astype(f32) + d_q).astype(bf16)
                s.d_k.at[at].T[...] = (d_k - d.d_target).astype(bf16)
                s.v.at[at].T[...] = d.d_target.astype(bf16)
                s.d_w1[...] = load(s.d_w1) + product((D, D), (s.d_z1.T, s.k.at[at]))
                s.d_w2[...] = load(s.d_w2) + product((D, D), (s.d_z2.T, s.x.at[at]), (s.g2.at[at].T, s.d_u))
                return next_d_b1 + d_z1.sum(axis=1), next_d_b2 + d.d_z.sum(axis=1), d_gamma, d_beta

            carry = mini_batches.over_blocks(back_through_update, tuple(carry))
            s.d_w1[...] = load(s.d_w1) + product((D, D), (s.d_z1_q.T, s.q.at[tokens]))
            s.d_w2[...] = load(s.d_w2) + product((D, D), (s.d_z2_q.T, s.x_q))
            return *carry, d_lr_read

        def tile(first, j, carry):
            """Back over tile `first + j`."""
            s = matrices()
            tokens = pl.ds((first + j) * TILE, TILE)
            hopper.fetch(
                tile_barrier,
                (q_g.at[row, tokens, head], s.q),
                (k_g.at[row, tokens, head], s.k),
                (v_g.at[row, tokens, head], s.v),
                (d_out_g.at[row, tokens, head], s.d_out),
                (lr_read_g.at[row, head, tokens], lr_read_s),
                (lr_update_g.at[row, head, tokens], lr_update_s),
            )
            *carry, d_lr_read = lax.fori_loop(
                0,
                mini_batches.per_tile,
                lambda i, carry: mini_batch(mini_batches.per_tile - 1 - i, j, *carry),
                (*carry, jnp.zeros_like(carry[0])),
            )
            d_lr_read_s[...] = d_lr_read
            plgpu.commit_smem()

            @pl.when(own == 0)
            def _():
                plgpu.copy_smem_to_gmem(s.d_out, d_q_g.at[row, tokens, head])
                plgpu.copy_smem_to_gmem(s.d_k, d_k_g.at[row, tokens, head])
                plgpu.copy_smem_to_gmem(s.v, d_v_g.at[row, tokens, head])

            hopper.save(
                (d_lr_read_s, d_lr_read_g.at[*at_own, tokens]),
                (d_lr_update_s, d_lr_update_g.at[*at_own, tokens]),
                (d_scale_s, d_scale_g.at[*at_own, tokens]),
            )
            return tuple(carry)

        def group(i, carry):
            at = num_groups - 1 - i
            first = at * blocks.tiles_per_checkpoint
            count = per_group if num_tiles % per_group == 0 else jnp.minimum(per_group, num_tiles - first)
            weights = (
                load(w1t_kept_g.at[row, head, at, own]),
                load(b1_kept_g.at[row, head, at, own], ROWS),
                load(w2t_kept_g.at[row, head, at, own]),
                load(b2_kept_g.at[row, head, at], ROWS),
            )
            lax.fori_loop(0, count, lambda j, weights: recompute(first, j, weights), weights)
            return lax.fori_loop(0, count, lambda j, carry: tile(first, count - 1 - j, carry), carry)

        d_b1, d_b2 = load(d_b1_end_g.at[at_own], ROWS), load(d_b2_end_g.at[row, head], ROWS)
        nothing = jnp.zeros_like(d_b1)
        d_b1, d_b2, d_gamma, d_beta = lax.fori_loop(0, num_groups, group, (d_b1, d_b2, nothing, nothing))
        s = matrices()
        d_w1t_g.at[at_own][...], d_w2t_g.at[at_own][...] = load(s.d_w1), load(s.d_w2)
        d_b1_g.at[at_own][...] = d_b1

        @pl.when(own == 0)
        def _():
            for value, target in ((d_b2, d_b2_g), (d_gamma, d_ln_scale_g), (d_beta, d_ln_bias_g)):
                target.at[row, head][...] = value

        exchange.finish(of_exchange)

    def matrix(*shape: int) -> Any:
        return plgpu.SMEM(shape, bf16, transforms=hopper.over_tokens(n))

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, f32)

    steps, vector = plgpu.SMEM((TILE,), f32), plgpu.SMEM((D,), f32)
    kept = per_group * mini_batches.per_tile
    of_tokens, of_steps = jax.ShapeDtypeStruct(q.shape, bf16), float32(*rows, SLICES, num_tokens)
    of_weights = tuple(float32(*x.shape) for x in (d_w1t, d_b1, d_w2t, d_b2))
    results = plgpu.kernel(
        body,
        out_type=(
            *(of_tokens,) * 3,
            *(of_steps,) * 3,
            *of_weights,
            *(float32(*rows, D),) * 2,
            jax.ShapeDtypeStruct((*rows, SLICES, kept, 2, D, D), bf16),
            float32(*rows, SLICES, kept, 2, D),
            *of_sums,
        ),
        grid=rows,
        grid_names=("row", "head"),
        cluster=(SLICES,),
        cluster_names=(AXIS,),
        scratch_types=[
            *(steps, steps, plgpu.SMEM((c,), f32), steps, steps, steps, vector, vector),
            sums.scratch(1),
            hopper.HIDDEN_ZERO,
            *(plgpu.Barrier(num_arrivals=arrivals) for arrivals in (3, 3, 6)),
            *(matrix(1, TILE, D),) * 5,
            *(plgpu.SMEM((1, D, D), f32, transforms=hopper.FLOAT32),) * 2,
            *(matrix(1, D, D),) * 4,
            *(matrix(1, TILE, D),) * 3,
            *(matrix(1, c, D),) * 3,
            *(matrix(1, n, D),) * 5,
            *(matrix(1, TILE, c),) * 4,
            *exchange.scratch(),
        ],
        compiler_params=hopper.compiler_params(),
        interpret=interpret,
    )(
        *(q, k, v, lr_read, lr_update, scale, w1t_kept, b1_kept, w2t_kept, b2_kept, ln_scale, ln_bias, d_out, d_w1t),
        *(d_b1, d_w2t, d_b2),
    )
    d_q, d_k, d_v, *d_steps = results[:6]
    return d_q, d_k, d_v, *(x.sum(axis=2) for x in d_steps), *results[6:12]
