"""TTT-Linear: the backward kernel; a thread block walks back over one row and head.

From each checkpoint it first walks forward, to have the weights at the start of each mini-batch, then back.
A mini-batch is worked on in blocks of tokens, as many as registers hold: by one warpgroup, or each by its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper, inner, interpreter, sums
from ttt_kernels.blocks import LinearBlocks
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, load, over_columns, over_rows, product
from ttt_kernels.tiles import MiniBatches


class _Matrices(NamedTuple):
    """What lies in SMEM in bfloat16; `_tokens`: tokens are rows."""

    q: Any  # [TILE, D]
    k: Any
    v: Any
    d_out: Any
    g_tokens: Any
    q_over_tokens: Any  # as q, for products that sum over tokens
    k_over_tokens: Any
    wt: Any  # [D, D]
    d_wt: Any
    g: Any  # [D, C]
    d_zq: Any
    d_zk: Any
    d_zq_tokens: Any  # [C, D]
    d_zk_tokens: Any
    g_step_tokens: Any
    mixing: Any  # [TILE, C]
    d_attention: Any

    @classmethod
    def sharing(cls, *refs: Any) -> "_Matrices":
        """Of fewer buffers, where a tile is a mini-batch: once all its tokens have read, three lie over others."""
        shared = {"d_zk": "g", "d_zk_tokens": "q", "g_step_tokens": "g_tokens"}
        own: dict[str, Any] = dict(zip((name for name in cls._fields if name not in shared), refs, strict=True))
        return cls(**own, **{name: own[other] for name, other in shared.items()})


class _Tile(NamedTuple):
    """A tile of tokens, and which of the stages in SMEM it lies in."""

    index: Any
    slot: Any


def backward(
    q, k, v, lr_read, lr_update, scale, wt_kept, b_kept, ln_scale, ln_bias, d_out, d_wt, d_b,
    *, causal: bool, eps: float, blocks: LinearBlocks, interpret,
):  # fmt: skip
    """Derivatives by every argument of the forward kernel.

    Args: those of `forward`, the checkpoints `wt_kept` `[B, H, N, D, D]` and `b_kept` `[B, H, N, D]` in place of
        the first weights, and the derivatives by its results: `d_out` `[B, T, H, D]` bfloat16, `d_wt`
        `[B, H, D, D]` and `d_b` `[B, H, D]` float32.

    Returns:
        d_q, d_k, d_v `[B, T, H, D]` bfloat16; float32: d_lr_read and d_lr_update `[B, H, T]`, d_scale of each token
        `[B, H, T]`, d_wt `[B, H, D, D]`, d_b `[B, H, D]`, d_ln_scale and d_ln_bias of each row `[B, H, D]`.
    """
    batch_size, num_tokens, num_heads, dim = q.shape
    c = scale.shape[0]
    n = min(c, blocks.columns)
    tight = blocks.wide and c == TILE  # SMEM holds v and d_out of a block of tokens, and some buffers lie over others
    mini_batches = MiniBatches(c, n)
    warpgroups = 1 if blocks.wide else mini_batches.num_blocks
    stages = 2 if warpgroups > 1 else 1  # one of two blocks on an SM works while the other waits for its tile
    if interpret and warpgroups > 1:
        interpreter.require_threads(warpgroups + 2)
    hidden = (blocks.hidden_addresses or warpgroups > 1) and not interpret
    num_tiles = num_tokens // TILE
    per_group = min(blocks.tiles_per_checkpoint, num_tiles)
    num_groups = -(-num_tiles // blocks.tiles_per_checkpoint)
    f32, bf16 = jnp.float32, jnp.bfloat16

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, wt_kept_g, b_kept_g, ln_scale_g, ln_bias_g, d_out_g, d_wt_end_g,
        d_b_end_g,
        d_q_g, d_k_g, d_v_g, d_lr_read_g, d_lr_update_g, d_scale_g, d_wt_g, d_b_g, d_ln_scale_g, d_ln_bias_g,
        weights_g, biases_g,
        q_s, k_s, v_s, d_out_s, g_tokens_s, q_over_tokens_s, k_over_tokens_s, lr_read_s, lr_update_s, scale_s,
        d_lr_read_s, d_lr_update_s, d_scale_s, wt_s, d_wt_in_smem, d_wt_s, zero_s, sums_s, of_all_s, *refs,
    ):  # fmt: skip
        of_mini_batch, barriers = refs[: -len(barrier_types)], refs[-len(barrier_types) :]
        start_barrier, recompute_barriers, tile_barriers, weights_barrier, *block_barriers = barriers
        row, head = lax.axis_index("row"), lax.axis_index("head")
        own = lax.axis_index("warpgroup") if warpgroups > 1 else 0
        loss = inner.Loss(eps, sums.total(sums_s.at[own], interpreted=bool(interpret)))
        zero = hopper.hidden_zero(*zero_s, known=False) if zero_s else lambda: 0

        def matrices(tile: _Tile) -> _Matrices:
            at = zero()
            q, k, v, d_out, q_over_tokens, k_over_tokens = (
                ref.at[tile.slot + at] for ref in (q_s, k_s, v_s, d_out_s, q_over_tokens_s, k_over_tokens_s)
            )
            g_tokens, *others = (ref.at[at] for ref in (g_tokens_s, wt_s, d_wt_s, *of_mini_batch))
            refs = (q, k, v, d_out, g_tokens, q_over_tokens, k_over_tokens, *others)
            return _Matrices.sharing(*refs) if tight else _Matrices(*refs)

        def together() -> None:
            if warpgroups > 1:
                hopper.wait_for_each_other(of_all_s[1], interpreted=bool(interpret))
            else:
                plgpu.commit_smem()

        def by_one(body: Callable[[], None]) -> None:
            """What one warpgroup does for all."""
            if warpgroups > 1:
                pl.when(own == 0)(body)
            else:
                body()

        def of_all(vector):
            """The sum of each warpgroup's, over features; waits for all."""
            if warpgroups > 1:
                of_all_s[0].at[own][...] = vector
            together()
            if warpgroups > 1:
                vector = hopper.total(load(of_all_s[0].at[i], ROWS) for i in range(warpgroups))
            return vector

        def over_blocks(body: Callable[[Any, Any], Any], carry: Any) -> Any:
            return body(own, carry) if warpgroups > 1 else mini_batches.over_blocks(body, carry)

        d_wt_ref = d_wt_g.at[row, head] if blocks.wide else d_wt_in_smem[0]

        @by_one
        def _():
            plgpu.copy_gmem_to_smem(scale_g, scale_s, start_barrier)
            if not blocks.wide:
                plgpu.copy_gmem_to_smem(d_wt_end_g.at[row, head], d_wt_ref, start_barrier)

        plgpu.barrier_wait(start_barrier)
        if blocks.wide:
            d_wt_at_end = load(d_wt_end_g.at[row, head])
            d_wt_ref[...], d_wt_s.at[0][...] = d_wt_at_end, d_wt_at_end.astype(bf16)
        gamma, beta = (over_columns(load(ref.at[head], ROWS), n) for ref in (ln_scale_g, ln_bias_g))

        def of_tile(t: _Tile):
            """Its tokens, in global memory."""
            return row, pl.ds(t.index * TILE, TILE), head

        def of_block(t: _Tile, at):
            """Tokens `at` of a tile, in global memory."""
            return row, pl.ds(t.index * TILE + at.start, n), head

        def fetched(t: _Tile, source, target, at):
            """Tokens `at` of a tile in `target`; where that holds no tile but a block, they are copied now."""
            if not tight:
                return target.at[at]
            plgpu.commit_smem()  # all have read the block before
            hopper.fetch(*block_barriers, (source.at[*of_block(t, at)], target))
            return target

        def inner_gradient(t: _Tile, b, at):
            """Of the tokens `at` of a tile, under the weights in SMEM."""
            s = matrices(t)
            k_b, v_b = s.k.at[at].T, fetched(t, v_g, s.v, at).T
            z = product((dim, n), (s.wt, k_b)) + over_columns(b, n)
            target = load(v_b).astype(f32) - load(k_b).astype(f32)
            return loss.gradient(z, target, gamma, beta)

        def fetch_keys(t: _Tile) -> None:
            """For `recompute`."""
            s = matrices(t)
            hopper.fetch_tokens(
                recompute_barriers.at[t.slot],
                of_tile(t),
                *((k_g, s.k), *(() if tight else ((v_g, s.v),)), (lr_update_g, lr_update_s.at[t.slot])),
            )

        def recompute(t: _Tile, kept, weights, fetch_next):
            """Forward over a tile, keeping the weights that each mini-batch starts with, the first as number `kept`."""
            plgpu.barrier_wait(recompute_barriers.at[t.slot])
            if stages > 1:
                by_one(fetch_next)

            @by_one
            def _():
                s = matrices(t)
                k_step = load(s.k).astype(f32) * over_columns(load(lr_update_s.at[t.slot], ROWS), dim)
                s.k_over_tokens[...] = (-k_step).astype(bf16)

            def mini_batch(m, weights):
                s = matrices(t)
                wt, b = weights

                @by_one
                def _():
                    biases_g.at[row, head, kept + m][...] = b
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the weights of the mini-batch before
                    s.wt[...] = wt.astype(bf16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(s.wt, weights_g.at[row, head, kept + m])

                together()

                def update(i, step):
                    at = mini_batches.block(m, i)
                    g = inner_gradient(t, b, at).g
                    matrices(t).g.at[:, mini_batches.block(0, i)][...] = g.astype(bf16)
                    return step + (g * over_rows(load(lr_update_s.at[t.slot, at], COLUMNS), dim)).sum(axis=1)

                step = of_all(over_blocks(update, jnp.zeros_like(b)))
                fused = blocks.wide and blocks.fused_update  # wide, registers hold no second matrix
                wt = hopper.updated(wt, s.g, s.k_over_tokens.at[mini_batches.tokens(m)], fused=fused)
                if warpgroups > 1:
                    together()
                return wt, b - step

            weights = lax.fori_loop(0, mini_batches.per_tile, mini_batch, weights)
            plgpu.commit_smem()
            if stages == 1:
                fetch_next()
            return weights

        def fetch_weights(kept) -> None:
            """Those of a mini-batch."""
            plgpu.copy_gmem_to_smem(weights_g.at[row, head, kept], wt_s.at[zero()], weights_barrier)

        def mini_batch(t: _Tile, m, kept, fetch_next, d_b, d_gamma, d_beta, d_lr_read):
            tokens, s = mini_batches.tokens(m), matrices(t)
            b = load(biases_g.at[row, head, kept], ROWS)
            plgpu.barrier_wait(weights_barrier)
            if not blocks.wide:

                @by_one
                def _():
                    s.d_wt[...] = load(d_wt_ref).astype(bf16)

            together()
            step = -over_columns(load(lr_read_s.at[t.slot], ROWS), n)

            def read_keys(i):
                """The forward pass again: the inner gradient of a block."""
                s = matrices(t)
                at = mini_batches.block(m, i)
                keys = inner_gradient(t, b, at)
                s.g_tokens.at[at].T[...] = keys.g.astype(bf16)
                s.g.at[:, mini_batches.block(0, i)][...] = keys.g.astype(bf16)
                return keys

            read = None
            if mini_batches.num_blocks == warpgroups:
                read = read_keys(own)
            else:
                mini_batches.over_blocks(lambda i, _: read_keys(i) and None, None)
            if stages > 1:

                @by_one
                def _():
                    plgpu.wait_smem_to_gmem(0)  # the results of the tile before
                    fetch_next()

            together()

            def back_through_reading(i, carry):
                s = matrices(t)
                of_b, d_gamma, d_beta, d_lr_read = carry
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                q_b = s.q.at[at].T
                is_seen = mini_batches.is_seen(m, i, causal=causal)
                attention = jnp.where(is_seen, product((TILE, n), (s.k, q_b)) + 1.0, 0.0)
                by_reader = over_rows(load(scale_s.at[block], COLUMNS))
                s.mixing.at[:, block][...] = (attention * by_reader * step).astype(bf16)
                plgpu.commit_smem()
                z_q = product((dim, n), (s.wt, q_b), (s.g, s.mixing.at[tokens, block])) + over_columns(b, n)
                d_out = load(fetched(t, d_out_g, s.d_out, at).T).astype(f32)
                normalized, rstd = loss.normalize(z_q)
                d_gamma = d_gamma + (d_out * normalized).sum(axis=1)
                d_beta = d_beta + d_out.sum(axis=1)
                d_zq = rstd * loss.without_projections(d_out * gamma, normalized)
                s.d_zq_tokens.at[block].T[...] = d_zq.astype(bf16)
                s.d_zq.at[:, block][...] = d_zq.astype(bf16)
                plgpu.commit_smem()
                d_mixing = jnp.where(is_seen, product((TILE, n), (s.g_tokens, s.d_zq_tokens.at[block].T)), 0.0)
                d_steps = d_mixing * attention
                d_lr_read = d_lr_read - (d_steps * by_reader).sum(axis=1)
                d_scale_s.at[at][...] = loss.total(d_steps * step)
                s.d_attention.at[:, block][...] = (d_mixing * by_reader * step).astype(bf16)
                return of_b + d_zq.sum(axis=1), d_gamma, d_beta, d_lr_read

            of_b, d_gamma, d_beta, d_lr_read = over_blocks(
                back_through_reading, (jnp.zeros_like(d_b), d_gamma, d_beta, d_lr_read)
            )
            if warpgroups > 1:
                together()

            def back_through_update(i, carry):
                s = matrices(t)
                of_b, d_gamma, d_beta = carry
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                keys = inner_gradient(t, b, at) if read is None else read
                g = keys.g
                lr_update = over_rows(load(lr_update_s.at[t.slot, at], COLUMNS), dim)
                d_step = product((dim, n), (s.d_wt, s.k.at[at].T)) + over_columns(d_b, n)
                d_lr_update_s.at[at][...] = -loss.total(g * d_step)
                s.g_step_tokens.at[block].T[...] = (-(g * lr_update)).astype(bf16)
                d_g = product((dim, n), (s.d_zq, s.mixing.at[at].T)) - d_step * lr_update
                d = loss.back_through_gradient(d_g, keys, gamma)
                d_gamma, d_beta = d_gamma + d.d_gamma.sum(axis=1), d_beta + d.d_beta.sum(axis=1)
                s.d_zk_tokens.at[block].T[...] = d.d_z.astype(bf16)
                s.d_zk.at[:, block][...] = d.d_z.astype(bf16)
                plgpu.commit_smem()
                # Back to the tokens.
                s = matrices(t)
                q_tokens, k_tokens = s.q_over_tokens.at[tokens], s.k_over_tokens.at[tokens]
                d_q = product(
                    (dim, n), (s.wt.T, s.d_zq_tokens.at[block].T), (k_tokens.T, s.d_attention.at[tokens, block])
                )
                d_out_b = fetched(t, d_out_g, s.d_out, at)
                d_out_b.T[...] = (load(d_out_b.T).astype(f32) + d_q).astype(bf16)
                d_k = product(
                    (dim, n),
                    (q_tokens.T, s.d_attention.at[at].T),
                    (s.d_wt.T, s.g_step_tokens.at[block].T),
                    (s.wt.T, s.d_zk_tokens.at[block].T),
                )
                s.k.at[at].T[...] = (d_k - d.d_target).astype(bf16)
                v_b = s.v if tight else s.v.at[at]
                v_b.T[...] = d.d_target.astype(bf16)
                if tight:
                    hopper.save((d_out_b, d_q_g.at[*of_block(t, at)]), (v_b, d_v_g.at[*of_block(t, at)]))
                return of_b + d.d_z.sum(axis=1), d_gamma, d_beta

            of_b, d_gamma, d_beta = over_blocks(back_through_update, (of_b, d_gamma, d_beta))
            d_b = d_b + of_all(of_b)  # all have read s.wt and s.d_wt

            @by_one
            def _():
                s = matrices(t)
                pl.when(kept > 0)(lambda: fetch_weights(kept - 1))
                q_tokens, k_tokens = s.q_over_tokens.at[tokens], s.k_over_tokens.at[tokens]
                for start in range(0, dim, 64):
                    rows = pl.ds(start, 64)
                    d_wt = product((64, dim), (s.d_zq.at[rows], q_tokens), (s.d_zk.at[rows], k_tokens))
                    d_wt = load(d_wt_ref.at[rows]) + d_wt
                    d_wt_ref.at[rows][...] = d_wt
                    if blocks.wide:  # which is read from global memory once for each mini-batch
                        s.d_wt.at[rows][...] = d_wt.astype(bf16)

            return d_b, d_gamma, d_beta, d_lr_read

        def fetch_tile(t: _Tile) -> None:
            """For `back`."""
            s = matrices(t)
            hopper.fetch_tokens(
                tile_barriers.at[t.slot],
                of_tile(t),
                *((q_g, s.q), (q_g, s.q_over_tokens), (k_g, s.k), (k_g, s.k_over_tokens)),
                *(() if tight else ((v_g, s.v), (d_out_g, s.d_out))),
                *((lr_read_g, lr_read_s.at[t.slot]), (lr_update_g, lr_update_s.at[t.slot])),
            )

        def back(t: _Tile, kept, carry, fetch_next):
            """Over a tile, whose first mini-batch is number `kept` of those whose weights are kept."""
            plgpu.barrier_wait(tile_barriers.at[t.slot])
            d_lr_read, last = jnp.zeros(TILE, f32), mini_batches.per_tile - 1
            *carry, d_lr_read = lax.fori_loop(
                0,
                mini_batches.per_tile,
                lambda i, carry: mini_batch(t, last - i, kept + last - i, fetch_next, *carry),
                (*carry, d_lr_read),
            )
            d_lr_read_s.at[own][...] = d_lr_read
            together()

            @by_one
            def _():
                s, (_, tokens, _) = matrices(t), of_tile(t)
                plgpu.commit_smem()
                hopper.save_tokens(of_tile(t), (s.k, d_k_g), *(() if tight else ((s.v, d_v_g), (s.d_out, d_q_g))))
                plgpu.copy_smem_to_gmem(d_lr_read_s, d_lr_read_g.at[row, head, :, tokens])
                hopper.save_tokens(of_tile(t), (d_lr_update_s, d_lr_update_g), (d_scale_s, d_scale_g))
                if stages == 1:
                    plgpu.wait_smem_to_gmem(0)
                    fetch_next()

            return tuple(carry)

        def group(i, carry):
            at = num_groups - 1 - i
            first = at * blocks.tiles_per_checkpoint
            count = per_group if num_tiles % per_group == 0 else jnp.minimum(per_group, num_tiles - first)
            weights = load(wt_kept_g.at[row, head, at]), load(b_kept_g.at[row, head, at], ROWS)

            def slot(j):
                return jnp.int32(j & 1) if stages > 1 else 0

            def forward_tile(j) -> _Tile:
                return _Tile(first + j, slot(j))

            def backward_tile(j) -> _Tile:
                return _Tile(first + count - 1 - j, slot(j))

            def next_by(fetch, tile, j):
                return lambda: pl.when(j + 1 < count)(lambda: fetch(tile(j + 1)))

            by_one(lambda: fetch_keys(forward_tile(0)))
            lax.fori_loop(
                0,
                count,
                lambda j, weights: recompute(
                    forward_tile(j), j * mini_batches.per_tile, weights, next_by(fetch_keys, forward_tile, j)
                ),
                weights,
            )

            @by_one
            def _():
                plgpu.wait_smem_to_gmem(0)  # the weights of the last mini-batch
                fetch_weights(count * mini_batches.per_tile - 1)
                fetch_tile(backward_tile(0))

            carry = lax.fori_loop(
                0,
                count,
                lambda j, carry: back(
                    *(backward_tile(j), (count - 1 - j) * mini_batches.per_tile, carry),
                    next_by(fetch_tile, backward_tile, j),
                ),
                carry,
            )
            by_one(lambda: plgpu.wait_smem_to_gmem(0))
            return carry

        d_b = load(d_b_end_g.at[row, head], ROWS)
        nothing = jnp.zeros_like(d_b)
        d_b, d_gamma, d_beta = lax.fori_loop(0, num_groups, group, (d_b, nothing, nothing))
        for value, target in ((d_gamma, d_ln_scale_g), (d_beta, d_ln_bias_g)):
            target.at[row, head, own][...] = value

        @by_one
        def _():
            d_b_g.at[row, head][...] = d_b
            if not blocks.wide:
                hopper.save((d_wt_ref, d_wt_g.at[row, head]))

    def matrix(rows: int, columns: int, transforms: Any = hopper.OVER_FEATURES, slots: int = 1) -> Any:
        return plgpu.SMEM((slots, rows, columns), bf16, transforms=transforms)

    summed = hopper.over_tokens(n)
    tokens, over_tokens = matrix(TILE, dim, slots=stages), matrix(TILE, dim, summed, slots=stages)
    weights = matrix(dim, dim)
    operand, right_operand, pairs = matrix(dim, c, summed), matrix(c, dim), matrix(TILE, c, summed)
    v_or_d_out, shared = (matrix(n, dim), 1) if tight else (tokens, 0)
    d_wt_in_smem = () if blocks.wide else (plgpu.SMEM((dim, dim), f32, transforms=hopper.FLOAT32),)
    steps, steps_of_stages = plgpu.SMEM((TILE,), f32), plgpu.SMEM((stages, TILE), f32)
    barrier_types = [
        plgpu.Barrier(num_arrivals=1 if blocks.wide else 2),
        *(plgpu.Barrier(num_arrivals=count, num_barriers=stages) for count in ((2, 6) if tight else (3, 8))),
        *(plgpu.Barrier(),) * (2 if tight else 1),
    ]
    of_all = (plgpu.SMEM((warpgroups, dim), f32), plgpu.Barrier(num_arrivals=warpgroups)) if warpgroups > 1 else ()
    kept = per_group * mini_batches.per_tile
    rows = (batch_size, num_heads)
    shape = jax.ShapeDtypeStruct
    of_tokens, of_steps = shape(q.shape, bf16), shape(lr_read.shape, f32)
    results = plgpu.kernel(
        body,
        out_type=(
            *(of_tokens,) * 3,
            shape((*rows, warpgroups, num_tokens), f32),
            *(of_steps,) * 2,
            shape(d_wt.shape, f32),
            shape(d_b.shape, f32),
            *(shape((*rows, warpgroups, dim), f32),) * 2,
            shape((*rows, kept, dim, dim), bf16),
            shape((*rows, kept, dim), f32),
        ),
        grid=rows,
        grid_names=("row", "head"),
        **({"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}),
        scratch_types=[
            *(tokens, tokens, v_or_d_out, v_or_d_out, matrix(TILE, dim), over_tokens, over_tokens),
            *(steps_of_stages, steps_of_stages, plgpu.SMEM((c,), f32)),
            *(plgpu.SMEM((warpgroups, TILE), f32), steps, steps),
            *(
                weights,
                d_wt_in_smem,
                weights,
                (hopper.HIDDEN_ZERO,) if hidden else (),
                sums.scratch(warpgroups),
                of_all,
            ),
            *(operand,) * (3 - shared),
            *(right_operand,) * (3 - 2 * shared),
            *(pairs,) * 2,
            *barrier_types,
        ],
        compiler_params=hopper.compiler_params(auto_barriers=False),
        interpret=interpret,
    )(q, k, v, lr_read, lr_update, scale, wt_kept, b_kept, ln_scale, ln_bias, d_out, d_wt, d_b)
    d_q, d_k, d_v, d_lr_read, *others, d_ln_scale, d_ln_bias = results[:-2]
    return d_q, d_k, d_v, d_lr_read.sum(axis=2), *others, *(x.sum(axis=2) for x in (d_ln_scale, d_ln_bias))
