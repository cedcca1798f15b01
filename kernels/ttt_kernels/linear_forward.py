"""TTT-Linear: the forward kernel; one warpgroup walks over the tokens of one row and head.

At D = 64 a mini-batch is in registers at once. At D = 128 (`LinearBlocks.wide`), and with 64 float32 tokens, there is
room for a block of its tokens: it is worked on in blocks, and products read the weights from SMEM.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper, inner, sums
from ttt_kernels.blocks import LinearBlocks
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, WGMMA, Matrix, load, over_columns, over_rows, product
from ttt_kernels.tiles import MiniBatches


def forward(
    q, k, v, lr_read, lr_update, scale, wt, b, ln_scale, ln_bias,
    *, causal: bool, keep: bool, eps: float, blocks: LinearBlocks, interpret,
):  # fmt: skip
    """Outputs and final weights, and for the backward kernel the weights at each checkpoint.

    Args:
        q: `[B, T, H, D]` bfloat16, D = 64 or 128, or float32, D = 64; T a multiple of `TILE`.
        k: as q.
        v: as q.
        lr_read: `[B, H, T]` float32, step size of each token as readers of its mini-batch see it.
        lr_update: `[B, H, T]` float32, step size of each token in the update after its mini-batch.
        scale: `[C]` float32, C a divisor of `TILE`: what a reader multiplies `lr_read` by.
        wt: `[B, H, D, D]` float32, the weights transposed: (out, in).
        b: `[B, H, D]` float32.
        ln_scale: `[H, D]` float32.
        ln_bias: `[H, D]` float32.
        causal: whether a token reads only the gradients of its own mini-batch's tokens up to itself, not all.
        keep: whether to return checkpoints.
        eps: of the inner LayerNorm.
        blocks: block sizes.
        interpret: parameters of the interpreter, None for a GPU.

    Returns:
        out `[B, T, H, D]` in q's dtype, wt and b at the end; where kept, both at each checkpoint: `[B, H, N, ...]`.
    """
    batch_size, num_tokens, num_heads, dim = q.shape
    c = scale.shape[0]
    exact, parts = q.dtype == jnp.float32, hopper.parts_of(q.dtype)
    in_blocks = blocks.wide or (exact and c == TILE)
    n = min(c, blocks.columns) if in_blocks else c
    mini_batches = MiniBatches(c, n)
    num_tiles = num_tokens // TILE
    num_checkpoints = -(-num_tiles // blocks.tiles_per_checkpoint)
    stages = min(blocks.stages, num_tiles)
    f32 = jnp.float32
    in_registers = blocks.register_operands and not in_blocks and not exact
    fused_update = blocks.fused_update and not exact
    of_tokens = [hopper.stacked(x) for x in (q, k, v)]
    rows, shape = (batch_size, num_heads), jax.ShapeDtypeStruct
    of_checkpoints = (
        (shape((*rows, num_checkpoints, dim, dim), f32), shape((*rows, num_checkpoints, dim), f32)) if keep else ()
    )

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, wt_g, b_g, ln_scale_g, ln_bias_g,
        out_g, wt_end_g, b_end_g, *refs,
    ):  # fmt: skip
        kept_g = refs[: len(of_checkpoints)]
        (
            q_s, k_s, v_s, lr_read_s, lr_update_s, scale_s, mixings_s, k_steps_s, out_s, ln_scale_s, ln_bias_s,
            b_s, wt_or_zero_s, sums_s, tile_barriers, start_barrier, *operands_s,
        ) = refs[len(kept_g) :]  # fmt: skip
        zero = hopper.hidden_zero(wt_or_zero_s, known=not blocks.hidden_addresses)
        row, head = lax.axis_index("row"), lax.axis_index("head")
        loss = inner.Loss(eps, sums.total(sums_s.at[0], interpreted=bool(interpret)), exact=exact)

        def fetch(i, slot):
            tokens = pl.ds(i * TILE, TILE)
            for source, target in ((q_g, q_s), (k_g, k_s), (v_g, v_s)):
                hopper.copy_tokens(source, (row, tokens, head), target[slot], tile_barriers.at[slot])
            for source, target in ((lr_read_g, lr_read_s), (lr_update_g, lr_update_s)):
                plgpu.copy_gmem_to_smem(source.at[row, head, tokens], target.at[slot], tile_barriers.at[slot])

        for slot in range(stages):
            fetch(slot, slot)
        hopper.fetch(
            start_barrier,
            *(() if blocks.wide else ((wt_g.at[row, head], wt_or_zero_s),)),
            (b_g.at[row, head], b_s),
            (scale_g, scale_s),
            (ln_scale_g.at[head], ln_scale_s),
            (ln_bias_g.at[head], ln_bias_s),
        )
        gamma, beta = (over_columns(load(ref, ROWS), n) for ref in (ln_scale_s, ln_bias_s))

        def save(weights, wt_target, b_target):
            if blocks.wide:
                wt_target[...], b_target[...] = weights
                return
            wt_or_zero_s[...], b_s[...] = weights
            hopper.save((wt_or_zero_s, wt_target), (b_s, b_target))

        def tile(i, weights):
            slot = lax.rem(i, stages)

            if keep:

                @pl.when(lax.rem(i, blocks.tiles_per_checkpoint) == 0)
                def _():
                    save(weights, *(ref.at[row, head, lax.div(i, blocks.tiles_per_checkpoint)] for ref in kept_g))

            plgpu.barrier_wait(tile_barriers.at[slot])
            q_t, k_t, v_t = q_s[slot], k_s[slot], v_s[slot]
            mixing_s, k_step_s = (matrix[zero()] if in_blocks else matrix for matrix in (mixings_s, k_steps_s))
            # [source, reader]: minus the step that a reader takes along a source's gradient.
            attention = product((TILE, TILE), (k_t, q_t.T))
            source = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=WGMMA)
            reader = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=WGMMA)
            steps = over_columns(load(lr_read_s.at[slot], ROWS), TILE) * over_rows(load(scale_s, COLUMNS))
            mixing = -(attention + 1.0) * steps
            mixing_s.write(jnp.where(reader >= source, mixing, 0.0) if causal else mixing)
            k_step_s.write(-(k_t.read() * over_columns(load(lr_update_s.at[slot], ROWS), dim)))
            plgpu.commit_smem()

            def inner_gradient(operand, b, at):
                k_b = k_t[at].T
                target = v_t[at].T.read() - k_b.read()
                z = product((dim, n), (operand, k_b)) + over_columns(b, n)
                return loss.gradient(z, target, gamma, beta).g

            def updated_bias(b, g, at):
                return b - (g * over_rows(load(lr_update_s.at[slot, at], COLUMNS), dim)).sum(axis=1)

            def output(z_q, at):
                return q_t[at].T.read() + gamma * loss.normalize(z_q)[0] + beta

            def operand_of(value, i):
                """`value` as a left operand: in registers, in bfloat16, or in SMEM."""
                if in_registers:
                    return value.astype(jnp.bfloat16)
                operands_s[i].write(value)
                plgpu.commit_smem()
                return operands_s[i]

            def mini_batch(m, weights):
                wt, b = weights
                at = pl.ds(m * c, c)
                operand = operand_of(wt, 0)
                g = inner_gradient(operand, b, at)
                g_operand = operand_of(g, 1)
                z_q = product((dim, n), (operand, q_t[at].T), (g_operand, mixing_s[at, at])) + over_columns(b, n)
                wt = hopper.updated(wt, g_operand, k_step_s[at], fused=fused_update)
                b = updated_bias(b, g, at)
                out = output(z_q, at)
                if m == 0:
                    plgpu.wait_smem_to_gmem(0)  # of the tile before
                out_s[at].T.write(out)
                return wt, b

            def mini_batch_in_blocks(m, weights):
                wt, b = weights
                wt_s, g_s = (matrix[zero()] for matrix in operands_s)
                wt_s.write(wt)
                plgpu.commit_smem()

                def read_keys(i, new_b):
                    at = mini_batches.block(m, i)
                    g = inner_gradient(wt_s, b, at)
                    g_s[:, mini_batches.block(0, i)].write(g)
                    return updated_bias(new_b, g, at)

                new_b = mini_batches.over_blocks(read_keys, b)
                plgpu.commit_smem()
                tokens = mini_batches.tokens(m)

                def read(i, _):
                    at = mini_batches.block(m, i)
                    z_q = product((dim, n), (wt_s, q_t[at].T), (g_s, mixing_s[tokens, at])) + over_columns(b, n)
                    out_s[at].T.write(output(z_q, at))

                mini_batches.over_blocks(read, None)
                return hopper.updated(wt, g_s, k_step_s[tokens], fused=fused_update), new_b

            if in_blocks:
                plgpu.wait_smem_to_gmem(0)  # of the tile before
                weights = lax.fori_loop(0, mini_batches.per_tile, mini_batch_in_blocks, weights)
            else:
                for m in range(mini_batches.per_tile):
                    weights = mini_batch(m, weights)
            plgpu.commit_smem()
            hopper.copy_tokens_back(out_s, out_g, (row, pl.ds(i * TILE, TILE), head))

            @pl.when(i + stages < num_tiles)
            def _():
                fetch(i + stages, slot)

            return weights

        wt = load(wt_g.at[row, head] if blocks.wide else wt_or_zero_s)
        weights = lax.fori_loop(0, num_tiles, tile, (wt, load(b_s, ROWS)))
        plgpu.wait_smem_to_gmem(0)
        save(weights, wt_end_g.at[row, head], b_end_g.at[row, head])

    def matrix(*shape: int, transforms: Any = hopper.OVER_FEATURES) -> Any:
        return Matrix.scratch(parts, shape, transforms)

    tokens, summed = matrix(stages, TILE, dim), hopper.over_tokens(n)
    slots = (1,) if in_blocks else ()
    steps = plgpu.SMEM((stages, TILE), f32)
    vector = plgpu.SMEM((dim,), f32)
    wt_or_zero = hopper.HIDDEN_ZERO if blocks.wide else plgpu.SMEM((dim, dim), f32, transforms=hopper.FLOAT32)
    out, *rest = plgpu.kernel(
        body,
        out_type=(
            shape(of_tokens[0].shape, jnp.bfloat16),
            shape(wt.shape, f32),
            shape(b.shape, f32),
            *of_checkpoints,
        ),
        grid=rows,
        grid_names=("row", "head"),
        scratch_types=[
            *(tokens, tokens, tokens, steps, steps),
            plgpu.SMEM((TILE,), f32),
            *(matrix(*slots, TILE, size, transforms=summed) for size in (TILE, dim)),
            matrix(TILE, dim),
            *(vector, vector, vector, wt_or_zero, sums.scratch(1)),
            plgpu.Barrier(num_arrivals=3 * parts + 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=4 if blocks.wide else 5),
            *(() if in_registers else (matrix(*slots, dim, dim), matrix(*slots, dim, c, transforms=summed))),
        ],
        compiler_params=hopper.compiler_params(exact=exact),
        interpret=interpret,
    )(*of_tokens, lr_read, lr_update, jnp.tile(scale, TILE // c), wt, b, ln_scale, ln_bias)
    return hopper.joined(out, q.dtype), *rest
