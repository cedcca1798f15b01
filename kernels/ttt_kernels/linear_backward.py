"""TTT-Linear, causal, C = 16, D = 64: the backward kernel; one warpgroup walks back over one row and head.

From each checkpoint it first walks forward, to have the weights at the start of each mini-batch in SMEM, then back.
`g` is the gradient of the inner loss by the prediction, `d_x` the derivative of the outer loss by `x`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper
from ttt_kernels.blocks import LinearBlocks
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, WGMMA, load, mean_over_rows, over_columns, over_rows, product
from ttt_kernels.linear_forward import MINI_BATCHES, C, D, operand_of


def backward(
    q, k, v, lr_read, lr_update, scale, wt_kept, b_kept, ln_scale, ln_bias, d_out, d_wt, d_b,
    *, eps: float, blocks: LinearBlocks, interpret,
):  # fmt: skip
    """Derivatives by every argument of the forward kernel.

    Args: those of `forward`, the checkpoints `wt_kept` `[B, H, N, 64, 64]` and `b_kept` `[B, H, N, 64]` in place of
        the first weights, and the derivatives by its results: `d_out` `[B, T, H, 64]` bfloat16, `d_wt`
        `[B, H, 64, 64]` and `d_b` `[B, H, 64]` float32.

    Returns:
        d_q, d_k, d_v `[B, T, H, 64]` bfloat16; float32: d_lr_read and d_lr_update `[B, H, T]`, d_scale of each token
        `[B, H, T]`, d_wt `[B, H, 64, 64]`, d_b `[B, H, 64]`, d_ln_scale and d_ln_bias of each row `[B, H, 64]`.
    """
    batch_size, num_tokens, num_heads, _ = q.shape
    num_tiles = num_tokens // TILE
    per_group = min(blocks.tiles_per_checkpoint, num_tiles)
    num_groups = -(-num_tiles // blocks.tiles_per_checkpoint)
    f32, bf16 = jnp.float32, jnp.bfloat16

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, wt_kept_g, b_kept_g, ln_scale_g, ln_bias_g, d_out_g, d_wt_end_g,
        d_b_end_g,
        d_q_g, d_k_g, d_v_g, d_lr_read_g, d_lr_update_g, d_scale_g, d_wt_g, d_b_g, d_ln_scale_g, d_ln_bias_g,
        q_s, k_s, v_s, d_out_s, d_k_s, g_s, q_tokens_s, k_tokens_s, lr_read_s, lr_update_s, scale_s, d_lr_read_s,
        d_lr_update_s, d_scale_s, weights_s, biases_s, wt_s, d_wt_s, b_s, ln_scale_s, ln_bias_s, d_wt_operand_s,
        g_operand_s, d_zq_operand_s, d_zk_operand_s, d_zq_s, d_zk_s, g_step_s, mixing_s, d_attention_s,
        start_barrier, group_barrier, recompute_barrier, tile_barrier,
    ):  # fmt: skip
        row, head = lax.axis_index("row"), lax.axis_index("head")

        def fetch(barrier, *copies):
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, barrier)
            plgpu.barrier_wait(barrier)

        def save(*copies):
            plgpu.commit_smem()
            for source, target in copies:
                plgpu.copy_smem_to_gmem(source, target)
            plgpu.wait_smem_to_gmem(0)

        fetch(
            start_barrier,
            (scale_g, scale_s),
            (ln_scale_g.at[head], ln_scale_s),
            (ln_bias_g.at[head], ln_bias_s),
            (d_wt_end_g.at[row, head], d_wt_s),
            (d_b_end_g.at[row, head], b_s),
        )
        d_b = load(b_s, ROWS)
        plgpu.commit_smem()
        gamma, beta = (over_columns(load(ref, ROWS), C) for ref in (ln_scale_s, ln_bias_s))

        def inner_gradient(z, target):
            normalized, rstd = hopper.normalize(z, eps)
            error = gamma * normalized + beta - target
            return rstd * hopper.without_projections(gamma * error, normalized), normalized, rstd, error

        def target_of(at):
            return load(v_s.at[at].T).astype(f32) - load(k_s.at[at].T).astype(f32)

        def recompute(first, j, weights):
            """Forward over tile `first + j`, keeping the weights that each mini-batch starts with."""
            tokens = pl.ds((first + j) * TILE, TILE)
            fetch(
                recompute_barrier,
                (k_g.at[row, tokens, head], k_s),
                (v_g.at[row, tokens, head], v_s),
                (lr_update_g.at[row, head, tokens], lr_update_s),
            )
            k_step = load(k_s).astype(f32) * over_columns(load(lr_update_s, ROWS), D)
            k_tokens_s[...] = (-k_step).astype(bf16)

            def mini_batch(m, weights):
                wt, b = weights
                at, n = pl.ds(pl.multiple_of(m * C, C), C), j * MINI_BATCHES + m
                weights_s.at[n][...] = wt.astype(bf16)
                biases_s.at[n][...] = b
                plgpu.commit_smem()
                z = product((D, C), (weights_s.at[n], k_s.at[at].T)) + over_columns(b, C)
                g = inner_gradient(z, target_of(at))[0]
                operand = operand_of(g, g_operand_s, blocks)
                wt = wt + product((D, D), (operand, k_tokens_s.at[at]))
                return wt, b - (g * over_rows(load(lr_update_s.at[at], COLUMNS))).sum(axis=1)

            weights = lax.fori_loop(0, MINI_BATCHES, mini_batch, weights)
            plgpu.commit_smem()
            return weights

        def mini_batch(m, j, d_b, d_gamma, d_beta, d_lr_read):
            at, n = pl.ds(pl.multiple_of(m * C, C), C), j * MINI_BATCHES + m
            wt, bias = weights_s.at[n], over_columns(load(biases_s.at[n], ROWS), C)
            q_m, k_m = q_s.at[at].T, k_s.at[at].T
            scale = load(scale_s, COLUMNS)
            lr_read, lr_update = load(lr_read_s, ROWS), over_rows(load(lr_update_s.at[at], COLUMNS))
            # The forward pass again.
            g, k_normalized, k_rstd, error = inner_gradient(product((D, C), (wt, k_m)) + bias, target_of(at))
            g_s.at[at].T[...] = g.astype(bf16)
            source = plgpu.broadcasted_iota(jnp.int32, (TILE, C), 0, layout=WGMMA) - m * C
            reader = plgpu.broadcasted_iota(jnp.int32, (TILE, C), 1, layout=WGMMA)
            is_seen = (source >= 0) & (source <= reader)  # so is no source of another mini-batch
            attention = jnp.where(is_seen, product((TILE, C), (k_s, q_m)) + 1.0, 0.0)
            by_reader, by_source = over_rows(scale), over_columns(lr_read, C)
            mixing_s[...] = (-attention * by_reader * by_source).astype(bf16)
            g_operand = operand_of(g, g_operand_s, blocks)
            plgpu.commit_smem()
            z_q = product((D, C), (wt, q_m), (g_operand, mixing_s.at[at])) + bias
            # Back through the reading.
            d_out = load(d_out_s.at[at].T).astype(f32)
            q_normalized, q_rstd = hopper.normalize(z_q, eps)
            d_gamma = d_gamma + (d_out * q_normalized).sum(axis=1)
            d_beta = d_beta + d_out.sum(axis=1)
            d_zq = q_rstd * hopper.without_projections(d_out * gamma, q_normalized)
            d_zq_s.T[...] = d_zq.astype(bf16)
            d_zq_operand = operand_of(d_zq, d_zq_operand_s, blocks)
            d_wt_operand_s[...] = load(d_wt_s).astype(bf16)
            plgpu.commit_smem()
            d_mixing = jnp.where(is_seen, -product((TILE, C), (g_s, d_zq_s.T)), 0.0)
            d_steps = d_mixing * attention
            d_lr_read = d_lr_read + (d_steps * by_reader).sum(axis=1)
            d_scale_s.at[at][...] = (d_steps * by_source).sum(axis=0)
            d_attention_s[...] = (d_mixing * by_reader * by_source).astype(bf16)
            # Back through the update of the weights.
            d_step = product((D, C), (d_wt_operand_s, k_m)) + over_columns(d_b, C)
            d_lr_update_s.at[at][...] = -(g * d_step).sum(axis=0)
            g_step_s.T[...] = (-(g * lr_update)).astype(bf16)
            d_g = product((D, C), (d_zq_operand, mixing_s.at[at].T)) - d_step * lr_update
            # Back through the inner gradient.
            d_h = k_rstd * d_g
            d_gy = hopper.without_projections(d_h, k_normalized)
            gy = gamma * error
            d_normalized = (
                gamma * gamma * d_gy - d_h * mean_over_rows(gy * k_normalized) - gy * mean_over_rows(d_h * k_normalized)
            )
            d_gamma = d_gamma + (d_gy * (error + gamma * k_normalized)).sum(axis=1)
            d_beta = d_beta + (d_gy * gamma).sum(axis=1)
            d_target = -gamma * d_gy
            d_zk = hopper.without_projections(d_normalized, k_normalized) - k_normalized * mean_over_rows(d_g * g)
            d_zk = k_rstd * d_zk
            d_zk_s.T[...] = d_zk.astype(bf16)
            d_zk_operand = operand_of(d_zk, d_zk_operand_s, blocks)
            plgpu.commit_smem()
            # Back to the tokens and the weights.
            q_tokens, k_tokens, d_attention = q_tokens_s.at[at], k_tokens_s.at[at], d_attention_s.at[at]
            d_q = d_out + product((D, C), (wt.T, d_zq_s.T), (k_tokens.T, d_attention))
            d_k = product((D, C), (q_tokens.T, d_attention.T), (d_wt_operand_s.T, g_step_s.T), (wt.T, d_zk_s.T))
            d_out_s.at[at].T[...] = d_q.astype(bf16)
            d_k_s.at[at].T[...] = (d_k - d_target).astype(bf16)
            v_s.at[at].T[...] = d_target.astype(bf16)
            d_wt_s[...] = load(d_wt_s) + product((D, D), (d_zq_operand, q_tokens), (d_zk_operand, k_tokens))
            d_b = d_b + d_zq.sum(axis=1) + d_zk.sum(axis=1)
            return d_b, d_gamma, d_beta, d_lr_read

        def tile(first, j, carry):
            """Back over tile `first + j`."""
            tokens = pl.ds((first + j) * TILE, TILE)
            fetch(
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
            d_lr_read = jnp.zeros_like(carry[0])
            *carry, d_lr_read = lax.fori_loop(
                0,
                MINI_BATCHES,
                lambda i, carry: mini_batch(MINI_BATCHES - 1 - i, j, *carry),
                (*carry, d_lr_read),
            )
            d_lr_read_s[...] = d_lr_read
            save(
                (d_out_s, d_q_g.at[row, tokens, head]),
                (d_k_s, d_k_g.at[row, tokens, head]),
                (v_s, d_v_g.at[row, tokens, head]),
                (d_lr_read_s, d_lr_read_g.at[row, head, tokens]),
                (d_lr_update_s, d_lr_update_g.at[row, head, tokens]),
                (d_scale_s, d_scale_g.at[row, head, tokens]),
            )
            return tuple(carry)

        def group(i, carry):
            n = num_groups - 1 - i
            first = n * blocks.tiles_per_checkpoint
            count = per_group if num_tiles % per_group == 0 else jnp.minimum(per_group, num_tiles - first)
            fetch(group_barrier, (wt_kept_g.at[row, head, n], wt_s), (b_kept_g.at[row, head, n], b_s))
            weights = load(wt_s), load(b_s, ROWS)
            plgpu.commit_smem()
            lax.fori_loop(0, count, lambda j, weights: recompute(first, j, weights), weights)
            return lax.fori_loop(0, count, lambda j, carry: tile(first, count - 1 - j, carry), carry)

        nothing = jnp.zeros_like(d_b)
        d_b, d_gamma, d_beta = lax.fori_loop(0, num_groups, group, (d_b, nothing, nothing))
        b_s[...], ln_scale_s[...], ln_bias_s[...] = d_b, d_gamma, d_beta
        save(
            (d_wt_s, d_wt_g.at[row, head]),
            (b_s, d_b_g.at[row, head]),
            (ln_scale_s, d_ln_scale_g.at[row, head]),
            (ln_bias_s, d_ln_bias_g.at[row, head]),
        )

    tokens = plgpu.SMEM((TILE, D), bf16, transforms=hopper.OVER_FEATURES)
    source_tokens = plgpu.SMEM((TILE, D), bf16, transforms=hopper.OVER_TOKENS)
    operand = plgpu.SMEM((D, C), bf16, transforms=hopper.OVER_TOKENS)
    right_operand = plgpu.SMEM((C, D), bf16, transforms=hopper.OVER_FEATURES)
    pairs = plgpu.SMEM((TILE, C), bf16, transforms=hopper.OVER_TOKENS)
    steps, vector = plgpu.SMEM((TILE,), f32), plgpu.SMEM((D,), f32)
    kept = per_group * MINI_BATCHES
    rows = (batch_size, num_heads)
    shape = jax.ShapeDtypeStruct
    of_tokens, of_steps, of_vectors = shape(q.shape, bf16), shape(lr_read.shape, f32), shape(d_b.shape, f32)
    return plgpu.kernel(
        body,
        out_type=(*(of_tokens,) * 3, *(of_steps,) * 3, shape(d_wt.shape, f32), *(of_vectors,) * 3),
        grid=rows,
        grid_names=("row", "head"),
        scratch_types=[
            *(tokens,) * 6,
            *(source_tokens,) * 2,
            *(steps, steps, plgpu.SMEM((C,), f32), steps, steps, steps),
            plgpu.SMEM((kept, D, D), bf16, transforms=hopper.OVER_FEATURES),
            plgpu.SMEM((kept, D), f32),
            *(plgpu.SMEM((D, D), f32, transforms=hopper.FLOAT32) for _ in range(2)),
            *(vector,) * 3,
            plgpu.SMEM((D, D), bf16, transforms=hopper.OVER_FEATURES),
            *(operand,) * 3,
            *(right_operand,) * 3,
            *(pairs,) * 2,
            *(plgpu.Barrier(num_arrivals=n) for n in (5, 2, 3, 8)),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, lr_read, lr_update, scale, wt_kept, b_kept, ln_scale, ln_bias, d_out, d_wt, d_b)
