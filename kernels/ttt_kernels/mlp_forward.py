"""TTT-MLP, D = 64: the forward kernel; four warpgroups of one thread block walk over a row and head.

Each has a slice of 64 hidden units, whose weights it keeps in registers. What sums over all units is split over tokens
instead: a block of 16 tokens is one warpgroup's, which reads what the others left in SMEM. So a mini-batch has four
parts, and after each the warpgroups wait for each other: the hidden layer of the keys, by slices; the inner gradient of
layer 2, by tokens; layer 1's and the hidden layer of the readers, by slices; the outputs, by tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper, inner, sums
from ttt_kernels.blocks import MLPBlocks
from ttt_kernels.cluster import AXIS, SLICES, units_of
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, D, load, over_columns, over_rows, product
from ttt_kernels.tiles import MiniBatches


class _Matrices(NamedTuple):
    """Operands in SMEM, bfloat16; of 256 hidden units each slice has 64."""

    out: Any  # [TILE, 64]
    w1: Any  # [256, 64], rows are outputs
    w2: Any  # [64, 256], likewise
    x: Any  # [256, TILE], the hidden layer
    g1: Any  # [256, C], gradients by the outputs of layer 1, then `x_q`
    g2: Any  # [64, C]
    g2_step: Any  # [64, C], times minus the step size
    k_step: Any  # [64, C], keys, likewise
    mixing1: Any  # [TILE, C]: (source, reader), minus the steps that readers take along gradients of a layer
    mixing2: Any

    @property
    def x_q(self) -> Any:
        """[256, C], the hidden layer of readers."""
        return self.g1


def forward(
    q, k, v, lr_read, lr_update, scale, w1t, b1, w2t, b2, ln_scale, ln_bias,
    *, causal: bool, keep: bool, eps: float, blocks: MLPBlocks, interpret,
):  # fmt: skip
    """Outputs and final weights, and for the backward kernel the weights at each checkpoint.

    Args: those of the linear model's kernel, its weights in slices of 64 hidden units:
        w1t: `[B, H, 4, 64, 64]` float32, transposed: (hidden, in).
        b1: `[B, H, 4, 64]` float32.
        w2t: `[B, H, 4, 64, 64]` float32, transposed: (out, hidden).
        b2: `[B, H, 64]` float32.

    Returns:
        out `[B, T, H, 64]` bfloat16 and the weights at the end; where kept, the weights at each checkpoint:
        `[B, H, N, ...]`.
    """
    batch_size, num_tokens, num_heads, _ = q.shape
    c = scale.shape[0]
    n = min(c, blocks.columns)
    mini_batches = MiniBatches(c, n)
    early = mini_batches.per_tile == 1  # the keys of the next tile are copied while outputs are computed
    num_tiles = num_tokens // TILE
    num_checkpoints = -(-num_tiles // blocks.tiles_per_checkpoint)
    f32, bf16 = jnp.float32, jnp.bfloat16
    rows, shape = (batch_size, num_heads), jax.ShapeDtypeStruct
    of_weights = tuple(shape(x.shape, f32) for x in (w1t, b1, w2t, b2))
    of_checkpoints = tuple(shape((*rows, num_checkpoints, *x.shape[2:]), f32) for x in of_weights) if keep else ()

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, w1t_g, b1_g, w2t_g, b2_g, ln_scale_g, ln_bias_g,
        out_g, w1t_end_g, b1_end_g, w2t_end_g, b2_end_g, *refs,
    ):  # fmt: skip
        kept_g, refs = refs[: len(of_checkpoints)], refs[len(of_checkpoints) :]
        (
            q_s, k_s, v_s, lr_read_s, lr_update_s, scale_s, steps2_s, sums_s, zero_s,
            keys_barrier, queries_barrier, start_barrier, everyone, *of_matrices,
        ) = refs  # fmt: skip
        zero = hopper.hidden_zero(zero_s, known=blocks.interpreted)
        row, head, own = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index(AXIS)
        units = units_of(own)
        loss = inner.Loss(eps, sums.total(sums_s.at[own], interpreted=blocks.interpreted))

        def matrices() -> _Matrices:
            at = zero()
            return _Matrices(*(ref.at[at] for ref in of_matrices))

        def together() -> None:
            hopper.wait_for_each_other(everyone, interpreted=blocks.interpreted)

        def for_block(body, first: int) -> None:
            """Each block of a mini-batch by a warpgroup of its own, block 0 by warpgroup `first`."""
            i = (own + SLICES - first) & (SLICES - 1)
            if mini_batches.num_blocks == SLICES:
                body(i)
            else:
                pl.when(i < mini_batches.num_blocks)(lambda: body(i))

        def fetch(i, barrier, *copies: tuple[Any, Any]) -> None:
            """Tile i, where there is one."""
            at = row, pl.ds(i * TILE, TILE), head
            pl.when((own == 0) & (i < num_tiles))(lambda: hopper.fetch_tokens(barrier, at, *copies))

        def fetch_keys(i) -> None:
            fetch(i, keys_barrier, (k_g, k_s), (v_g, v_s), (lr_update_g, lr_update_s))

        def fetch_queries(i) -> None:
            fetch(i, queries_barrier, (q_g, q_s), (lr_read_g, lr_read_s))

        def wait_for_outputs() -> None:
            """Those of the tile before; before the other warpgroups write, they wait for this one."""
            pl.when(own == 0)(lambda: plgpu.wait_smem_to_gmem(0))

        fetch_keys(jnp.int32(0))
        fetch_queries(jnp.int32(0))

        @pl.when(own == 0)
        def _():
            plgpu.copy_gmem_to_smem(scale_g, scale_s, start_barrier)

        w1t, w2t = (load(ref.at[row, head, own]) for ref in (w1t_g, w2t_g))
        b1, b2 = load(b1_g.at[row, head, own], ROWS), load(b2_g.at[row, head], ROWS)
        plgpu.barrier_wait(start_barrier)
        gamma, beta = (over_columns(load(ref.at[head], ROWS), n) for ref in (ln_scale_g, ln_bias_g))

        def save(weights, *targets):
            """Straight to global memory: once for many mini-batches."""
            *of_slice, (b2, b2_target) = zip(weights, targets, strict=True)
            for value, target in of_slice:
                target[...] = value

            @pl.when(own == 0)
            def _():
                b2_target[...] = b2

        def mini_batch(t, m, weights):
            w1t, b1, w2t, b2 = weights
            tokens = mini_batches.tokens(m)
            s = matrices()
            s.w1.at[units][...], s.w2.at[:, units][...] = w1t.astype(bf16), w2t.astype(bf16)
            plgpu.commit_smem()

            def hidden_layer(s, at, width):
                return product((D, width), (s.w1.at[units], k_s.at[at].T)) + over_columns(b1, width)

            s.x.at[units, tokens][...] = inner.gelu(hidden_layer(s, tokens, c)).astype(bf16)
            together()

            def learn(i):
                s = matrices()
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                z2 = product((D, n), (s.w2, s.x.at[:, at])) + over_columns(b2, n)
                keys = load(k_s.at[at].T).astype(f32)
                target = load(v_s.at[at].T).astype(f32) - keys
                g2 = loss.gradient(z2, target, gamma, beta).g
                lr = over_rows(load(lr_update_s.at[at], COLUMNS))
                g2_step = g2 * lr
                s.g2.at[:, block][...] = g2.astype(bf16)
                s.g2_step.at[:, block][...] = (-g2_step).astype(bf16)
                s.k_step.at[:, block][...] = (-(keys * lr)).astype(bf16)
                steps2_s.at[i][...] = g2_step.sum(axis=1)

            def steps_of(i):
                """[TILE, n]: minus the steps that the readers of block i take along their sources' gradients."""
                is_seen = mini_batches.is_seen(m, i, causal=causal)
                steps = over_columns(load(lr_read_s, ROWS), n)
                return jnp.where(is_seen, -steps * over_rows(load(scale_s.at[mini_batches.block(0, i)], COLUMNS)), 0.0)

            def attend(i):
                s = matrices()
                attention = product((TILE, n), (k_s, q_s.at[mini_batches.block(m, i)].T))
                s.mixing1.at[:, mini_batches.block(0, i)][...] = inner.mixing(attention, steps_of(i)).astype(bf16)

            for_block(learn, first=0)
            if early:
                plgpu.barrier_wait(queries_barrier)
            for_block(attend, first=1)
            together()

            s = matrices()

            def back(i, step1):
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                g1 = product((D, n), (s.w2.at[:, units].T, s.g2.at[:, block])) * inner.gelu_gradient(
                    hidden_layer(s, at, n)
                )
                s.g1.at[units, block][...] = g1.astype(bf16)
                return step1 + (g1 * over_rows(load(lr_update_s.at[at], COLUMNS))).sum(axis=1)

            step1 = mini_batches.over_blocks(back, jnp.zeros_like(b1))
            plgpu.commit_smem()

            s = matrices()
            z1 = product((D, c), (s.w1.at[units], q_s.at[tokens].T), (s.g1.at[units], s.mixing1.at[tokens]))
            x_q = inner.gelu(z1 + over_columns(b1, c)).astype(bf16)
            w1t = hopper.updated(w1t, s.g1.at[units], s.k_step.T, fused=not blocks.interpreted)
            plgpu.commit_smem()  # g1 has been read
            s.x_q.at[units][...] = x_q
            w2t = hopper.updated(w2t, s.g2_step, s.x.at[units, tokens].T, fused=not blocks.interpreted)
            step2 = hopper.total(load(steps2_s.at[i], ROWS) for i in range(mini_batches.num_blocks))

            if early:
                wait_for_outputs()
            together()
            if early:
                fetch_keys(t + 1)

            def read(i):
                s = matrices()
                at, block = mini_batches.block(m, i), mini_batches.block(0, i)
                attention = product((TILE, n), (s.x.T, s.x_q.at[:, block]))
                s.mixing2.at[:, block][...] = inner.mixing(attention, steps_of(i)).astype(bf16)
                plgpu.commit_smem()
                z2 = product(
                    (D, n),
                    (s.w2, s.x_q.at[:, block]),
                    (s.g2, s.mixing2.at[tokens, block]),
                )
                normalized, _ = loss.normalize(z2 + over_columns(b2, n))
                s.out.at[at].T[...] = (load(q_s.at[at].T).astype(f32) + gamma * normalized + beta).astype(bf16)

            for_block(read, first=1)
            together()
            return w1t, b1 - step1, w2t, b2 - step2

        def tile(i, weights):
            if keep:

                @pl.when(lax.rem(i, blocks.tiles_per_checkpoint) == 0)
                def _():
                    w1t_g, b1_g, w2t_g, b2_g = (
                        ref.at[row, head, lax.div(i, blocks.tiles_per_checkpoint)] for ref in kept_g
                    )
                    save(weights, w1t_g.at[own], b1_g.at[own], w2t_g.at[own], b2_g)

            plgpu.barrier_wait(keys_barrier)
            if not early:
                plgpu.barrier_wait(queries_barrier)
                wait_for_outputs()
            weights = lax.fori_loop(0, mini_batches.per_tile, lambda m, weights: mini_batch(i, m, weights), weights)
            fetch_queries(i + 1)
            if not early:
                fetch_keys(i + 1)

            @pl.when(own == 0)
            def _():
                plgpu.copy_smem_to_gmem(matrices().out, out_g.at[row, pl.ds(i * TILE, TILE), head])

            return weights

        weights = lax.fori_loop(0, num_tiles, tile, (w1t, b1, w2t, b2))
        save(
            weights,
            w1t_end_g.at[row, head, own],
            b1_end_g.at[row, head, own],
            w2t_end_g.at[row, head, own],
            b2_end_g.at[row, head],
        )

        @pl.when(own == 0)
        def _():
            plgpu.wait_smem_to_gmem(0)

    def matrix(*shape: int) -> Any:
        return plgpu.SMEM(shape, bf16, transforms=hopper.over_tokens(n))

    tokens, steps = matrix(TILE, D), plgpu.SMEM((TILE,), f32)
    return plgpu.kernel(
        body,
        out_type=(shape(q.shape, bf16), *of_weights, *of_checkpoints),
        grid=rows,
        grid_names=("row", "head"),
        num_threads=SLICES,
        thread_name=AXIS,
        scratch_types=[
            *(tokens, tokens, tokens, steps, steps, plgpu.SMEM((c,), f32)),
            *(plgpu.SMEM((mini_batches.num_blocks, D), f32), sums.scratch(SLICES)),
            hopper.HIDDEN_ZERO,
            *(plgpu.Barrier(num_arrivals=arrivals) for arrivals in (3, 2, 1)),
            plgpu.Barrier(num_arrivals=SLICES),
            *(matrix(1, TILE, D), matrix(1, SLICES * D, D), matrix(1, D, SLICES * D), matrix(1, SLICES * D, TILE)),
            *(matrix(1, SLICES * D, c), matrix(1, D, c), matrix(1, D, c), matrix(1, D, c)),
            *(matrix(1, TILE, c), matrix(1, TILE, c)),
        ],
        compiler_params=hopper.compiler_params(auto_barriers=False),
        interpret=interpret,
    )(q, k, v, lr_read, lr_update, scale, w1t, b1, w2t, b2, ln_scale, ln_bias)
