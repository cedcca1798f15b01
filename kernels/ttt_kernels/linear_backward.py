"""TTT-Linear, D = 64: the backward kernel; one warpgroup walks back over one row and head.

From each checkpoint it first walks forward, to have the weights at the start of each mini-batch in SMEM, then back.
A mini-batch is worked on in blocks of tokens, as many as registers hold.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper, inner
from ttt_kernels.blocks import LinearBlocks
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, load, over_columns, over_rows, product
from ttt_kernels.linear_forward import updated
from ttt_kernels.tiles import MiniBatches


def backward(
    q, k, v, lr_read, lr_update, scale, wt_kept, b_kept, ln_scale, ln_bias, d_out, d_wt, d_b,
    *, causal: bool, eps: float, blocks: LinearBlocks, interpret,
):  # fmt: skip
    """Derivatives by every argument of the forward kernel.

    Args: those of `forward`, the checkpoints `wt_kept` `[B, H, N, 64, 64]` and `b_kept` `[B, H, N, 64]` in place of
        the first weights, and the derivatives by its results: `d_out` `[B, T, H, 64]` bfloat16, `d_wt`
        `[B, H, 64, 64]` and `d_b` `[B, H, 64]` float32.

    Returns:
        d_q, d_k, d_v `[B, T, H, 64]` bfloat16; float32: d_lr_read and d_lr_update `[B, H, T]`, d_scale of each token
        `[B, H, T]`, d_wt `[B, H, 64, 64]`, d_b `[B, H, 64]`, d_ln_scale and d_ln_bias of each row `[B, H, 64]`.
    """
    batch_size, num_tokens, num_heads, dim = q.shape
    c = scale.shape[0]
    n = min(c, blocks.columns)
    mini_batches = MiniBatches(c, n)
    num_tiles = num_tokens // TILE
    per_group = min(blocks.tiles_per_checkpoint, num_tiles)
    num_groups = -(-num_tiles // blocks.tiles_per_checkpoint)
    f32, bf16 = jnp.float32, jnp.bfloat16

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, wt_kept_g, b_kept_g, ln_scale_g, ln_bias_g, d_out_g, d_wt_end_g,
        d_b_end_g,
        d_q_g, d_k_g, d_v_g, d_lr_read_g, d_lr_update_g, d_scale_g, d_wt_g, d_b_g, d_ln_scale_g, d_ln_bias_g,
        weights_g, biases_g,
        q_s, k_s, v_s, d_out_s, g_s, q_tokens_s, k_tokens_s, lr_read_s, lr_update_s, scale_s, d_lr_read_s,
        d_lr_update_s, d_scale_s, wt_operand_s, extra_s, d_wt_operand_s,
        g_operand_s, d_zq_operand_s, d_zk_operand_s, d_zq_s, d_zk_s, g_step_s, mixing_s, d_attention_s,
        start_barrier, recompute_barrier, tile_barrier,
    ):  # fmt: skip
        row, head = lax.axis_index("row"), lax.axis_index("head")

        zero = hopper.hidden_zero(extra_s, known=not blocks.hidden_addresses)

        def matrices():
            """The operands of the weights and of their derivative."""
            at = zero()
            return wt_operand_s.at[at], d_wt_operand_s.at[at]

        d_wt_ref = d_wt_g.at[row, head] if blocks.wide else extra_s
        if blocks.wide:
            hopper.fetch(start_barrier, (scale_g, scale_s))
            d_wt_ref[...] = load(d_wt_end_g.at[row, head])
        else:
            hopper.fetch(start_barrier, (scale_g, scale_s), (d_wt_end_g.at[row, head], d_wt_ref))
        gamma, beta = (over_columns(load(ref.at[head], ROWS), n) for ref in (ln_scale_g, ln_bias_g))

        def inner_gradient(b, at):
            """Of the tokens `at`, under the weights in SMEM."""
            k_b, (wt_s, _) = k_s.at[at].T, matrices()
            z = product((dim, n), (wt_s, k_b)) + over_columns(b, n)
            target = load(v_s.at[at].T).astype(f32) - load(k_b).astype(f32)
            return inner.inner_gradient(z, target, gamma, beta, eps)

        def recompute(first, j, weights):
            """Forward over tile `first + j`, keeping the weights that each mini-batch starts with."""
            tokens = pl.ds((first + j) * TILE, TILE)
            hopper.fetch(
                recompute_barrier,
                (k_g.at[row, tokens, head], k_s),
                (v_g.at[row, tokens, head], v_s),
                (lr_update_g.at[row, head, tokens], lr_update_s),
            )
            k_step = load(k_s).astype(f32) * over_columns(load(lr_update_s, ROWS), dim)
            k_tokens_s[...] = (-k_step).astype(bf16)

            def mini_batch(m, weights):
                kept = (row, head, j * mini_batches.per_tile + m)
                wt_s, _ = matrices()
                operand, b_at_start = weights[0].astype(bf16), weights[1]
                weights_g.at[*kept][...], biases_g.at[*kept][...] = operand, b_at_start
                wt_s[...] = operand
                plgpu.commit_smem()

                def update(i, weights):
                    wt, b = weights
                    at = mini_batches.block(m, i)
                    g = inner_gradient(b_at_start, at).g
                    g_operand_s.at[:, mini_batches.block(0, i)][...] = g.astype(bf16)
                    plgpu.commit_smem()
                    if not blocks.wide:
                        wt = wt + product(wt.shape, (g_operand_s.at[:, mini_batches.block(0, i)], k_tokens_s.at[at]))
                    return wt, b - (g * over_rows(load(lr_update_s.at[at], COLUMNS), dim)).sum(axis=1)

                wt, b = mini_batches.over_blocks(update, weights)
                if blocks.wide:
                    wt = updated(wt, g_operand_s, k_tokens_s.at[mini_batches.tokens(m)], blocks)
                return wt, b

            weights = lax.fori_loop(0, mini_batches.per_tile, mini_batch, weights)
            plgpu.commit_smem()
            return weights

        def mini_batch(m, j, d_b, d_gamma, d_beta, d_lr_read):
            kept, tokens = (row, head, j * mini_batches.per_tile + m), mini_batches.tokens(m)
            q_tokens, k_tokens = q_tokens_s.at[tokens], k_tokens_s.at[tokens]
            wt_s, d_wt_s = matrices()
            wt_s[...], b = load(weights_g.at[*kept]), load(biases_g.at[*kept], ROWS)
            d_wt_s[...] = load(d_wt_ref).astype(bf16)
            plgpu.commit_smem()
            step = -over_columns(load(lr_read_s, ROWS), n)

            def read_keys(i):
                """The forward pass again: the inner gradient of a block."""
                at = mini_batches.block(m, i)
                keys = inner_gradient(b, at)
                g_s.at[at].T[...] = keys.g.astype(bf16)
                g_operand_s.at[:, mini_batches.block(0, i)][...] = keys.g.astype(bf16)
                return keys

            if mini_batches.num_blocks == 1:
                read = read_keys(0)
            else:
                read = None
                lax.fori_loop(0, mini_batches.num_blocks, lambda i, _: read_keys(i) and None, None)
            plgpu.commit_smem()

            def back_through_reading(i, carry):
                d_b, d_gamma, d_beta, d_lr_read = carry
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                q_b = q_s.at[at].T
                is_seen = mini_batches.is_seen(m, i, causal=causal)
                attention = jnp.where(is_seen, product((TILE, n), (k_s, q_b)) + 1.0, 0.0)
                by_reader = over_rows(load(scale_s.at[block], COLUMNS))
                mixing_s.at[:, block][...] = (attention * by_reader * step).astype(bf16)
                plgpu.commit_smem()
                wt_s, _ = matrices()
                z_q = product((dim, n), (wt_s, q_b), (g_operand_s, mixing_s.at[tokens, block])) + over_columns(b, n)
                d_out = load(d_out_s.at[at].T).astype(f32)
                normalized, rstd = inner.normalize(z_q, eps)
                d_gamma = d_gamma + (d_out * normalized).sum(axis=1)
                d_beta = d_beta + d_out.sum(axis=1)
                d_zq = rstd * inner.without_projections(d_out * gamma, normalized)
                d_zq_s.at[block].T[...] = d_zq.astype(bf16)
                d_zq_operand_s.at[:, block][...] = d_zq.astype(bf16)
                plgpu.commit_smem()
                d_mixing = jnp.where(is_seen, product((TILE, n), (g_s, d_zq_s.at[block].T)), 0.0)
                d_steps = d_mixing * attention
                d_lr_read = d_lr_read - (d_steps * by_reader).sum(axis=1)
                d_scale_s.at[at][...] = (d_steps * step).sum(axis=0)
                d_attention_s.at[:, block][...] = (d_mixing * by_reader * step).astype(bf16)
                return d_b + d_zq.sum(axis=1), d_gamma, d_beta, d_lr_read

            next_d_b, d_gamma, d_beta, d_lr_read = mini_batches.over_blocks(
                back_through_reading, (d_b, d_gamma, d_beta, d_lr_read)
            )

            def back_through_update(i, carry):
                next_d_b, d_gamma, d_beta = carry
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                keys = inner_gradient(b, at) if read is None else read
                g = keys.g
                lr_update = over_rows(load(lr_update_s.at[at], COLUMNS), dim)
                wt_s, d_wt_s = matrices()
                d_step = product((dim, n), (d_wt_s, k_s.at[at].T)) + over_columns(d_b, n)
                d_lr_update_s.at[at][...] = -(g * d_step).sum(axis=0)
                g_step_s.at[block].T[...] = (-(g * lr_update)).astype(bf16)
                d_g = product((dim, n), (d_zq_operand_s, mixing_s.at[at].T)) - d_step * lr_update
                d = inner.back_through_inner_gradient(d_g, keys, gamma)
                d_gamma, d_beta = d_gamma + d.d_gamma.sum(axis=1), d_beta + d.d_beta.sum(axis=1)
                d_zk_s.at[block].T[...] = d.d_z.astype(bf16)
                d_zk_operand_s.at[:, block][...] = d.d_z.astype(bf16)
                plgpu.commit_smem()
                # Back to the tokens.
                d_q = product((dim, n), (wt_s.T, d_zq_s.at[block].T), (k_tokens.T, d_attention_s.at[tokens, block]))
                d_out_s.at[at].T[...] = (load(d_out_s.at[at].T).astype(f32) + d_q).astype(bf16)
                d_k = product(
                    (dim, n),
                    (q_tokens.T, d_attention_s.at[at].T),
                    (d_wt_s.T, g_step_s.at[block].T),
                    (wt_s.T, d_zk_s.at[block].T),
                )
                k_s.at[at].T[...] = (d_k - d.d_target).astype(bf16)
                v_s.at[at].T[...] = d.d_target.astype(bf16)
                return next_d_b + d.d_z.sum(axis=1), d_gamma, d_beta

            d_b, d_gamma, d_beta = mini_batches.over_blocks(back_through_update, (next_d_b, d_gamma, d_beta))
            for start in range(0, dim, 64):
                rows = pl.ds(start, 64)
                d_wt = product((64, dim), (d_zq_operand_s.at[rows], q_tokens), (d_zk_operand_s.at[rows], k_tokens))
                d_wt_ref.at[rows][...] = load(d_wt_ref.at[rows]) + d_wt
            return d_b, d_gamma, d_beta, d_lr_read

        def tile(first, j, carry):
            """Back over tile `first + j`."""
            tokens = pl.ds((first + j) * TILE, TILE)
            hopper.fetch(
                tile_barrier,
                (q_g.at[row, tokens, head], q_s),
                (q_g.at[row, tokens, head], q_tokens_s),
                (k_g.at[row, tokens, head], k_s),
                (k_g.at[row, tokens, head], k_tokens_s),
                (v_g.at[row, tokens, head], v_s),
                (d_out_g.at[row, tokens, head], d_out_s),
                (lr_read_g.at[row, head, tokens], lr_read_s),
                (lr_update_g.at[row, head, tokens], lr_update_s),
            )
            d_lr_read = jnp.zeros(TILE, f32)
            *carry, d_lr_read = lax.fori_loop(
                0,
                mini_batches.per_tile,
                lambda i, carry: mini_batch(mini_batches.per_tile - 1 - i, j, *carry),
                (*carry, d_lr_read),
            )
            d_lr_read_s[...] = d_lr_read
            hopper.save(
                (d_out_s, d_q_g.at[row, tokens, head]),
                (k_s, d_k_g.at[row, tokens, head]),
                (v_s, d_v_g.at[row, tokens, head]),
                (d_lr_read_s, d_lr_read_g.at[row, head, tokens]),
                (d_lr_update_s, d_lr_update_g.at[row, head, tokens]),
                (d_scale_s, d_scale_g.at[row, head, tokens]),
            )
            return tuple(carry)

        def group(i, carry):
            at = num_groups - 1 - i
            first = at * blocks.tiles_per_checkpoint
            count = per_group if num_tiles % per_group == 0 else jnp.minimum(per_group, num_tiles - first)
            weights = load(wt_kept_g.at[row, head, at]), load(b_kept_g.at[row, head, at], ROWS)
            lax.fori_loop(0, count, lambda j, weights: recompute(first, j, weights), weights)
            return lax.fori_loop(0, count, lambda j, carry: tile(first, count - 1 - j, carry), carry)

        d_b = load(d_b_end_g.at[row, head], ROWS)
        nothing = jnp.zeros_like(d_b)
        d_b, d_gamma, d_beta = lax.fori_loop(0, num_groups, group, (d_b, nothing, nothing))
        for value, target in ((d_b, d_b_g), (d_gamma, d_ln_scale_g), (d_beta, d_ln_bias_g)):
            target.at[row, head][...] = value
        if not blocks.wide:
            hopper.save((d_wt_ref, d_wt_g.at[row, head]))

    tokens = plgpu.SMEM((TILE, dim), bf16, transforms=hopper.OVER_FEATURES)
    over_tokens = hopper.over_tokens(n)
    source_tokens = plgpu.SMEM((TILE, dim), bf16, transforms=over_tokens)
    operand = plgpu.SMEM((dim, c), bf16, transforms=over_tokens)
    right_operand = plgpu.SMEM((c, dim), bf16, transforms=hopper.OVER_FEATURES)
    pairs = plgpu.SMEM((TILE, c), bf16, transforms=over_tokens)
    steps = plgpu.SMEM((TILE,), f32)
    kept = per_group * mini_batches.per_tile
    rows = (batch_size, num_heads)
    shape = jax.ShapeDtypeStruct
    of_tokens, of_steps, of_vectors = shape(q.shape, bf16), shape(lr_read.shape, f32), shape(d_b.shape, f32)
    results = plgpu.kernel(
        body,
        out_type=(
            *(of_tokens,) * 3,
            *(of_steps,) * 3,
            shape(d_wt.shape, f32),
            *(of_vectors,) * 3,
            shape((*rows, kept, dim, dim), bf16),
            shape((*rows, kept, dim), f32),
        ),
        grid=rows,
        grid_names=("row", "head"),
        scratch_types=[
            *(tokens,) * 5,
            *(source_tokens,) * 2,
            *(steps, steps, plgpu.SMEM((c,), f32), steps, steps, steps),
            plgpu.SMEM((1, dim, dim), bf16, transforms=hopper.OVER_FEATURES),
            hopper.HIDDEN_ZERO if blocks.wide else plgpu.SMEM((dim, dim), f32, transforms=hopper.FLOAT32),
            plgpu.SMEM((1, dim, dim), bf16, transforms=hopper.OVER_FEATURES),
            *(operand,) * 3,
            *(right_operand,) * 3,
            *(pairs,) * 2,
            *(plgpu.Barrier(num_arrivals=n) for n in (1 if blocks.wide else 2, 3, 8)),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, lr_read, lr_update, scale, wt_kept, b_kept, ln_scale, ln_bias, d_out, d_wt, d_b)
    return results[:-2]
