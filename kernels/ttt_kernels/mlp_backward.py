"""TTT-MLP, D = 64, C = 16: the backward kernel; four warpgroups of one thread block walk back over a row and head.

From each checkpoint they first walk forward, keeping the weights at the start of each mini-batch in global memory, then
back. As in the forward kernel each has a slice of 64 hidden units, and what sums over all units is done by one
warpgroup, which reads what the others left in SMEM: of a mini-batch's keys by the first, of its readers by the second.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper, inner, kept, sums
from ttt_kernels.blocks import MLPBlocks
from ttt_kernels.cluster import AXIS, SLICES, units_of
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, D, load, over_columns, over_rows, product
from ttt_kernels.tiles import MiniBatches

C = 16
"""Tokens of a mini-batch; of more, SMEM does not hold what is kept of one."""

_OF_KEYS, _OF_READERS = 0, 1
"""The warpgroups."""

_STAGES = 2
_ALIGNED = 32
"""Numbers that TMA's alignment of 128 bytes leaves room for."""


def _columns(i: int, width: int = C) -> Any:
    """Of block i of a matrix whose columns are blocks of tokens."""
    return pl.ds(i * C, width)


_X, _G1, _X_Q, _D_Z1_Q, _D_U, _D_Z1 = range(6)
"""Blocks of `_Matrices.hidden`; first those that are also read with the columns behind them, 64 in all."""

_G2, _G2_STEP, _D_Z2_Q, _D_Z2 = range(4)
"""Blocks of `_Matrices.outputs`."""


class _Matrices(NamedTuple):
    """Matrices in SMEM, bfloat16; of 256 hidden units each slice has 64; mixing has (source, reader).

    A product has 64 rows: where sources are its rows, those behind the first 16 may be anything.
    """

    q: Any  # [stages, C, 64]
    k: Any  # [stages * C + 48, 64]
    v: Any  # [stages, C, 64]
    d_out: Any
    d_q: Any  # [C, 64]
    d_k: Any
    d_v: Any
    w1: Any  # [256, 64], rows are outputs
    d_w1: Any
    w2: Any  # [64, 256], likewise
    d_w2: Any
    hidden: Any  # [256, 6 C]
    outputs: Any  # [64, 4 C]
    mixing1: Any  # [TILE, C], then `d_attention1`
    mixing2: Any
    d_attention2: Any

    @property
    def d_attention1(self) -> Any:
        """[TILE, C]."""
        return self.mixing1


def backward(
    q, k, v, lr_read, lr_update, scale, w1t_kept, b1_kept, w2t_kept, b2_kept, ln_scale, ln_bias, d_out, d_w1t, d_b1,
    d_w2t, d_b2, *, causal: bool, eps: float, blocks: MLPBlocks, interpret,
):  # fmt: skip
    """Derivatives by every argument of the forward kernel.

    Args: those of `forward`, the checkpoints `[B, H, N, ...]` in place of the first weights, and the derivatives by its
        results.

    Returns:
        d_q, d_k, d_v `[B, T, H, 64]` bfloat16; float32: d_lr_read, d_lr_update and d_scale of each token `[B, H, T]`,
        the derivatives by the first weights, d_ln_scale and d_ln_bias of each row `[B, H, 64]`.
    """
    num_mini_batches = q.shape[1] // C
    every = blocks.tiles_per_checkpoint * TILE // C
    per_group, num_groups = min(every, num_mini_batches), -(-num_mini_batches // every)
    f32, bf16 = jnp.float32, jnp.bfloat16

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, w1t_kept_g, b1_kept_g, w2t_kept_g, b2_kept_g, ln_scale_g,
        ln_bias_g, d_out_g, d_w1t_end_g, d_b1_end_g, d_w2t_end_g, d_b2_end_g,
        d_q_g, d_k_g, d_v_g, d_lr_read_g, d_lr_update_g, d_scale_g, d_w1t_g, d_b1_g, d_w2t_g, d_b2_g, d_ln_scale_g,
        d_ln_bias_g, weights_g, biases_g, d_weights_g,
        of_tokens_s, of_features_s, sums_s, zero_s, start_barrier, recompute_barriers, back_barriers, everyone,
        *of_matrices,
    ):  # fmt: skip
        lr_update_s, (scale_s, d_lr_update_s, d_scale_s) = (
            of_tokens_s.at[pl.ds(0, _STAGES), pl.ds(0, C)],
            (of_tokens_s.at[_STAGES + at, pl.ds(0, C)] for at in range(3)),
        )
        d_lr_read_s, step2_s, d_b2_s, of_slices_s = (of_features_s.at[at] for at in range(4))
        lr_read_s = of_features_s.at[pl.ds(4, _STAGES)]
        zero = hopper.hidden_zero(zero_s, known=blocks.interpreted)
        row, head, own = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index(AXIS)
        at_own, units, of_all = (row, head, own), units_of(own), slice(None)
        loss = inner.Loss(eps, sums.total(sums_s.at[own], interpreted=blocks.interpreted))

        def matrices() -> _Matrices:
            at = zero()
            return _Matrices(*(ref.at[at] for ref in of_matrices))

        def together() -> None:
            hopper.wait_for_each_other(everyone, interpreted=blocks.interpreted)

        def by(warpgroup: int, body, otherwise):
            """What one warpgroup computes; the others have something of the same shapes."""
            return lax.cond(own == warpgroup, body, otherwise)

        def tokens_of(i):
            return pl.ds(pl.multiple_of(i * C, C), C)

        def fetch(barriers, i, slot, *sources: Any) -> None:
            """From each source, in global memory, the tokens of mini-batch i, to their slot."""
            hopper.fetch_tokens(barriers.at[slot], (row, tokens_of(i), head), *sources)

        def keys_at(slot):
            s = matrices()
            return (k_g, s.k.at[tokens_of(slot)]), (v_g, s.v.at[slot]), (lr_update_g, lr_update_s.at[slot])

        def fetch_keys(i, slot):
            fetch(recompute_barriers, i, slot, *keys_at(slot))

        def fetch_all(i, slot):
            s = matrices()
            of_readers = (q_g, s.q.at[slot]), (d_out_g, s.d_out.at[slot]), (lr_read_g, lr_read_s.at[slot, pl.ds(0, C)])
            fetch(back_barriers, i, slot, *keys_at(slot), *of_readers)

        def fetched(fetch, barriers, count, first, step, body, carry):
            """A loop over `count` mini-batches, `first + step * j`, which copies the ones to come."""

            def start(j):
                pl.when((own == 0) & (j < count))(lambda: fetch(first + step * j, lax.rem(j, jnp.int32(_STAGES))))

            def iteration(j, carry):
                slot = lax.rem(j, jnp.int32(_STAGES))
                plgpu.barrier_wait(barriers.at[slot])
                carry = body(first + step * j, slot, carry)
                start(j + _STAGES)
                return carry

            for j in range(_STAGES):
                start(jnp.int32(j))
            return lax.fori_loop(jnp.int32(0), count, iteration, carry)

        @pl.when(own == 0)
        def _():
            plgpu.copy_gmem_to_smem(scale_g, scale_s, start_barrier)

        plgpu.barrier_wait(start_barrier)
        gamma, beta = (over_columns(load(ref.at[head], ROWS), C) for ref in (ln_scale_g, ln_bias_g))

        def write_hidden(block: int, value) -> None:
            matrices().hidden.at[units, _columns(block)][...] = value.astype(bf16)

        def write_outputs(block: int, value) -> None:
            matrices().outputs.at[:, _columns(block)][...] = value.astype(bf16)

        def read_hidden(units, block: int):
            return matrices().hidden.at[units, _columns(block)]

        def read_outputs(block: int):
            return matrices().outputs.at[:, _columns(block)]

        def before_gelu(slot, b1):
            """Layer 1 of the keys."""
            s = matrices()
            return product((D, C), (s.w1.at[units], s.k.at[tokens_of(slot)].T)) + over_columns(b1, C)

        def write_weights(w1t, w2t) -> None:
            s = matrices()
            s.w1.at[units][...], s.w2.at[:, units][...] = w1t, w2t

        def keep(ref, layer: int, value) -> None:
            kept.keep(ref.at[layer], value, interpreted=blocks.interpreted)

        def kept_at(ref, layer: int):
            return kept.kept(ref.at[layer], interpreted=blocks.interpreted)

        def hidden_layer(slot, b1):
            """Of the keys, to SMEM, where the weights are; returns it before GELU."""
            plgpu.commit_smem()
            z1 = before_gelu(slot, b1)
            write_hidden(_X, inner.gelu(z1))
            together()
            return z1

        def step_size(slot):
            return over_rows(load(lr_update_s.at[slot], COLUMNS))

        def inner_gradient(slot, b2):
            """Of layer 2, to SMEM."""
            s = matrices()
            z2 = product((D, C), (s.w2, read_hidden(of_all, _X))) + over_columns(b2, C)
            target = load(s.v.at[slot].T).astype(f32) - load(s.k.at[tokens_of(slot)].T).astype(f32)
            keys = loss.gradient(z2, target, gamma, beta)
            step = keys.g * step_size(slot)
            write_outputs(_G2, keys.g)
            write_outputs(_G2_STEP, -step)
            return keys, step

        def back_through_layer2(z1):
            """The derivative of the inner loss by the hidden layer, and the gradient of layer 1."""
            d_x = product((D, C), (matrices().w2.at[:, units].T, read_outputs(_G2)))
            return d_x, d_x * inner.gelu_gradient(z1)

        def recompute(first, i, slot, weights):
            """Forward over mini-batch i, keeping the weights that it starts with."""
            w1t, b1, w2t, b2 = weights
            of_mini_batch = (*at_own, i - first)
            operands = w1t.astype(bf16), w2t.astype(bf16)
            for layer, (weight, bias) in enumerate(zip(operands, (b1, b2), strict=True)):
                keep(weights_g.at[*of_mini_batch], layer, weight)
                biases_g.at[*of_mini_batch, layer][...] = bias
            write_weights(*operands)
            z1 = hidden_layer(slot, b1)

            @pl.when(own == _OF_KEYS)
            def _():
                step2_s[...] = inner_gradient(slot, b2)[1].sum(axis=1)

            together()
            step1 = back_through_layer2(z1)[1] * step_size(slot)
            write_hidden(_G1, -step1)
            plgpu.commit_smem()
            s, fused = matrices(), not blocks.interpreted
            w1t = hopper.updated(w1t, read_hidden(units, _G1), s.k.at[tokens_of(slot)], fused=fused)
            w2t = hopper.updated(w2t, read_outputs(_G2_STEP), read_hidden(units, _X).T, fused=fused)
            b1, b2 = b1 - step1.sum(axis=1), b2 - load(step2_s, ROWS)
            together()
            return w1t, b1, w2t, b2

        is_seen = MiniBatches(C, C).is_seen(0, 0, causal=causal)
        nothing = jnp.zeros((TILE, C), f32)

        def mini_batch(first, i, slot, carry):
            """Back over mini-batch i."""
            d_b1, d_b2, d_gamma, d_beta = carry
            at, all_rows = tokens_of(slot), pl.ds(pl.multiple_of(slot * C, C), TILE)
            b1, b2 = (load(biases_g.at[*at_own, i - first, layer], ROWS) for layer in range(2))
            z1 = hidden_layer(slot, b1)

            def steps():
                """[TILE, C]: minus the step sizes of the sources that a reader sees; its own scale."""
                step = jnp.where(is_seen, -over_columns(load(lr_read_s.at[slot], ROWS), C), 0.0)
                return step, over_rows(load(scale_s, COLUMNS))

            # The forward pass again.
            def attend():
                s = matrices()
                step, by_reader = steps()
                attention = jnp.where(
                    is_seen, product((TILE, C), (hopper.FirstRows(s.k.at[all_rows], C), s.q.at[slot].T)) + 1.0, 0.0
                )
                s.mixing1[...] = (attention * by_reader * step).astype(bf16)
                return attention

            # Of the keys' warpgroup the inner gradient, of the readers' two of attention: in the same registers.
            own_matrices = by(
                *(_OF_KEYS, lambda: tuple(inner_gradient(slot, b2)[0])),
                lambda: by(_OF_READERS, lambda: (attend(), *(nothing,) * 3), lambda: (nothing,) * 4),
            )
            together()
            d_x, g1 = back_through_layer2(z1)
            write_hidden(_G1, g1)
            plgpu.commit_smem()
            s = matrices()
            z1_q = product(
                (D, C), (s.w1.at[units], s.q.at[slot].T), (read_hidden(units, _G1), s.mixing1.at[pl.ds(0, C)])
            )
            z1_q = z1_q + over_columns(b1, C)
            write_hidden(_X_Q, inner.gelu(z1_q))
            together()

            # Back through layer 2 of the readers.
            def read():
                s = matrices()
                step, by_reader = steps()
                attention = product((TILE, C), (s.hidden.at[:, _columns(_X, TILE)].T, read_hidden(of_all, _X_Q)))
                attention = jnp.where(is_seen, attention + 1.0, 0.0)
                s.mixing2[...] = (attention * by_reader * step).astype(bf16)
                plgpu.commit_smem()
                z2 = product(
                    (D, C),
                    (s.w2, read_hidden(of_all, _X_Q)),
                    (read_outputs(_G2), s.mixing2.at[pl.ds(0, C)]),
                )
                d_out = load(s.d_out.at[slot].T).astype(f32)
                normalized, rstd = loss.normalize(z2 + over_columns(b2, C))
                d_z2 = rstd * loss.without_projections(d_out * gamma, normalized)
                write_outputs(_D_Z2_Q, d_z2)
                d_b2_s[...] = d_z2.sum(axis=1)
                plgpu.commit_smem()
                d_mixing = product((TILE, C), (s.outputs.at[:, _columns(_G2, TILE)].T, read_outputs(_D_Z2_Q)))
                d_mixing = jnp.where(is_seen, d_mixing, 0.0)
                s.d_attention2[...] = (d_mixing * by_reader * step).astype(bf16)
                of_gamma, of_beta = (d_out * normalized).sum(axis=1), d_out.sum(axis=1)
                return (own_matrices[0], d_mixing * attention, *own_matrices[2:]), d_gamma + of_gamma, d_beta + of_beta

            @pl.when(own == 0)
            def _():
                plgpu.wait_smem_to_gmem(0)  # the results of the mini-batch before

            own_matrices, d_gamma, d_beta = by(_OF_READERS, read, lambda: (own_matrices, d_gamma, d_beta))
            together()
            # Back through layer 1 of the readers, and through the step of layer 1 and its inner gradient.
            s = matrices()
            d_x_q = product(
                (D, C),
                (s.w2.at[:, units].T, read_outputs(_D_Z2_Q)),
                (read_hidden(units, _X), s.d_attention2.at[pl.ds(0, C)]),
            )
            d_z1_q = d_x_q * inner.gelu_gradient(z1_q)
            write_hidden(_D_Z1_Q, d_z1_q)
            next_d_b1 = d_b1 + d_z1_q.sum(axis=1)
            plgpu.commit_smem()
            d_step1 = product((D, C), (s.d_w1.at[units], s.k.at[at].T)) + over_columns(d_b1, C)
            d_g1 = product((D, C), (read_hidden(units, _D_Z1_Q), s.mixing1.at[pl.ds(0, C)].T))
            d_g1 = d_g1 - d_step1 * step_size(slot)
            write_hidden(_D_U, d_g1 * inner.gelu_gradient(before_gelu(slot, b1)))
            of_slices_s.at[tokens_of(own)][...] = loss.total(load(read_hidden(units, _G1)).astype(f32) * d_step1)
            together()

            # Back to the queries, and through the step of layer 2 and its inner gradient.
            @pl.when(own == _OF_READERS)
            def _():
                s = matrices()
                step, by_reader = steps()
                d_mixing = product(
                    (TILE, C),
                    (s.hidden.at[:, _columns(_G1, TILE)].T, read_hidden(of_all, _D_Z1_Q)),
                )
                d_mixing = jnp.where(is_seen, d_mixing, 0.0)
                s.d_attention1[...] = (d_mixing * by_reader * step).astype(bf16)
                plgpu.commit_smem()
                attention1, d_steps, *_ = own_matrices
                of_reader = d_steps + d_mixing * attention1
                d_lr_read_s[...] = -(of_reader * by_reader).sum(axis=1)
                d_scale_s[...] = loss.total(of_reader * step)
                d_q = product(
                    (D, C),
                    (s.w1.T, read_hidden(of_all, _D_Z1_Q)),
                    (s.k.at[at].T, s.d_attention1.at[pl.ds(0, C)]),
                )
                s.d_q.T[...] = (load(s.d_out.at[slot].T).astype(f32) + d_q).astype(bf16)

            def back_through_keys():
                s, keys = matrices(), inner.InnerGradient(*own_matrices)
                d_step = product((D, C), (s.d_w2, read_hidden(of_all, _X)))
                d_step = d_step + over_columns(d_b2, C)
                d_g = product(
                    (D, C),
                    (s.w2, read_hidden(of_all, _D_U)),
                    (read_outputs(_D_Z2_Q), s.mixing2.at[pl.ds(0, C)].T),
                )
                of_layer1 = hopper.total(load(of_slices_s.at[pl.ds(j * C, C)], COLUMNS) for j in range(SLICES))
                d_lr_update_s[...] = -(of_layer1 + loss.total(keys.g * d_step))
                d = loss.back_through_gradient(d_g - d_step * step_size(slot), keys, gamma)
                write_outputs(_D_Z2, d.d_z)
                s.d_v.T[...] = d.d_target.astype(bf16)
                next_d_b2 = d_b2 + load(d_b2_s, ROWS) + d.d_z.sum(axis=1)
                return next_d_b2, d_gamma + d.d_gamma.sum(axis=1), d_beta + d.d_beta.sum(axis=1), d.d_target

            d_b2, d_gamma, d_beta, d_target = by(_OF_KEYS, back_through_keys, lambda: (d_b2, d_gamma, d_beta, nothing))
            together()
            # Back through the layers; z1 and d_x again, since registers do not hold them so long.
            s = matrices()
            z1 = before_gelu(slot, b1)
            d_x = back_through_layer2(z1)[0]
            d_z1 = product(
                (D, C),
                (s.w2.at[:, units].T, read_outputs(_D_Z2)),
                (s.d_w2.at[:, units].T, read_outputs(_G2_STEP)),
                (read_hidden(units, _X_Q), s.d_attention2.at[pl.ds(0, C)].T),
            )
            d_z1 = d_z1 * inner.gelu_gradient(z1) + d_g1 * d_x * inner.gelu_second_derivative(z1)
            write_hidden(_D_Z1, d_z1)
            next_d_b1 = next_d_b1 + d_z1.sum(axis=1)
            together()

            # Back to the keys and the weights.
            @pl.when(own == _OF_KEYS)
            def _():
                s = matrices()
                of_step = product((D, C), (s.d_w1.T, read_hidden(of_all, _G1)))
                d_k = product(
                    (D, C),
                    (s.w1.T, read_hidden(of_all, _D_Z1)),
                    (s.q.at[slot].T, s.d_attention1.at[pl.ds(0, C)].T),
                )
                s.d_k.T[...] = (d_k - of_step * step_size(slot) - d_target).astype(bf16)

            s = matrices()
            d_weights = d_weights_g.at[*at_own]
            d_w1 = kept_at(d_weights, 0) + product(
                (D, D), (read_hidden(units, _D_Z1), s.k.at[at]), (read_hidden(units, _D_Z1_Q), s.q.at[slot])
            )
            keep(d_weights, 0, d_w1)
            d_w1 = d_w1.astype(bf16)
            d_w2 = kept_at(d_weights, 1) + product(
                (D, D),
                (read_outputs(_D_Z2), read_hidden(units, _X).T),
                (read_outputs(_G2), read_hidden(units, _D_U).T),
                (read_outputs(_D_Z2_Q), read_hidden(units, _X_Q).T),
            )
            keep(d_weights, 1, d_w2)
            d_w2 = d_w2.astype(bf16)
            before = weights_g.at[*at_own, jnp.maximum(i - first - 1, 0)]
            weights = kept_at(before, 0), kept_at(before, 1)
            together()
            s.d_w1.at[units][...], s.d_w2.at[:, units][...] = d_w1, d_w2
            write_weights(*weights)

            @pl.when(own == 0)
            def _():
                s = matrices()
                hopper.save_tokens(
                    (row, tokens_of(i), head),
                    *((s.d_q, d_q_g), (s.d_k, d_k_g), (s.d_v, d_v_g)),
                    *(
                        (d_lr_read_s.at[pl.ds(0, C)], d_lr_read_g),
                        (d_lr_update_s, d_lr_update_g),
                        (d_scale_s, d_scale_g),
                    ),
                )

            return next_d_b1, d_b2, d_gamma, d_beta

        def group(i, carry):
            at = num_groups - 1 - i
            first = at * every
            count = jnp.minimum(jnp.int32(per_group), num_mini_batches - first)
            weights = (
                load(w1t_kept_g.at[row, head, at, own]),
                load(b1_kept_g.at[row, head, at, own], ROWS),
                load(w2t_kept_g.at[row, head, at, own]),
                load(b2_kept_g.at[row, head, at], ROWS),
            )
            fetched(
                fetch_keys, recompute_barriers, count, first, 1,
                lambda i, slot, weights: recompute(first, i, slot, weights), weights,
            )  # fmt: skip
            of_last = weights_g.at[*at_own, count - 1]
            write_weights(kept_at(of_last, 0), kept_at(of_last, 1))
            return fetched(
                fetch_all, back_barriers, count, first + count - 1, -1,
                lambda i, slot, carry: mini_batch(first, i, slot, carry), carry,
            )  # fmt: skip

        s = matrices()
        for layer, (end, operand) in enumerate(((d_w1t_end_g, s.d_w1.at[units]), (d_w2t_end_g, s.d_w2.at[:, units]))):
            d_w = load(end.at[at_own])
            keep(d_weights_g.at[*at_own], layer, d_w)
            operand[...] = d_w.astype(bf16)
        d_b1, d_b2 = load(d_b1_end_g.at[at_own], ROWS), load(d_b2_end_g.at[row, head], ROWS)
        zeros = jnp.zeros_like(d_b1)
        d_b1, d_b2, d_gamma, d_beta = lax.fori_loop(
            jnp.int32(0), jnp.int32(num_groups), group, (d_b1, d_b2, zeros, zeros)
        )
        for layer, result in enumerate((d_w1t_g, d_w2t_g)):
            result.at[at_own][...] = kept_at(d_weights_g.at[*at_own], layer)
        d_b1_g.at[at_own][...] = d_b1
        d_ln_scale_g.at[at_own][...], d_ln_bias_g.at[at_own][...] = d_gamma, d_beta

        @pl.when(own == _OF_KEYS)
        def _():
            d_b2_g.at[row, head][...] = d_b2

        @pl.when(own == 0)
        def _():
            plgpu.wait_smem_to_gmem(0)

    def matrix(*shape: int) -> Any:
        return plgpu.SMEM((1, *shape), bf16, transforms=hopper.over_tokens(C))

    def vector(*shape: int) -> Any:
        return plgpu.SMEM(shape, f32)

    arguments = (
        *(q, k, v, lr_read, lr_update, scale, w1t_kept, b1_kept, w2t_kept, b2_kept, ln_scale, ln_bias, d_out, d_w1t),
        *(d_b1, d_w2t, d_b2),
    )
    return launch(
        body,
        arguments,
        mini_batches=per_group,
        more=[jax.ShapeDtypeStruct((q.shape[0], q.shape[2], SLICES, 2, D, D), f32)],
        scratch=[
            *(vector(_STAGES + 3, _ALIGNED), vector(4 + _STAGES, D)),
            sums.scratch(SLICES),
            hopper.HIDDEN_ZERO,
            plgpu.Barrier(),
            *(plgpu.Barrier(num_arrivals=arrivals, num_barriers=_STAGES) for arrivals in (3, 6)),
            plgpu.Barrier(num_arrivals=SLICES),
            *(matrix(_STAGES, C, D), matrix(_STAGES * C + TILE - C, D), matrix(_STAGES, C, D), matrix(_STAGES, C, D)),
            *(matrix(C, D),) * 3,
            *(matrix(SLICES * D, D),) * 2,
            *(matrix(D, SLICES * D),) * 2,
            *(matrix(SLICES * D, 6 * C), matrix(D, 4 * C)),
            *(matrix(TILE, C),) * 3,
        ],
        interpret=interpret,
    )


def launch(
    body, arguments, *, mini_batches: int, more: Sequence[Any] = (), scratch: Sequence[Any], interpret,
):  # fmt: skip
    """Runs a backward kernel of four warpgroups for each row and head.

    Args:
        body: gets `arguments`, references to the results, to the weights `[B, H, 4, mini_batches, 2, 64, 64]` bfloat16
            and biases `[B, H, 4, mini_batches, 2, 64]` float32 that it keeps, to `more`, and to `scratch`.
        arguments: those of `backward`.
        mini_batches: between two checkpoints.
        more: what else it keeps in global memory.
        scratch: its types.
        interpret: the interpreter's parameters, or None.

    Returns:
        As `backward`.
    """
    q, *_, d_w1t, d_b1, d_w2t, d_b2 = arguments
    batch_size, num_tokens, num_heads, _ = q.shape
    rows = (batch_size, num_heads)

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    results = plgpu.kernel(
        body,
        out_type=(
            *(jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),) * 3,
            *(float32(*rows, num_tokens),) * 3,
            *(float32(*x.shape) for x in (d_w1t, d_b1, d_w2t, d_b2)),
            *(float32(*rows, SLICES, D),) * 2,
            jax.ShapeDtypeStruct((*rows, SLICES, mini_batches, 2, D, D), jnp.bfloat16),
            float32(*rows, SLICES, mini_batches, 2, D),
            *more,
        ),
        grid=rows,
        grid_names=("row", "head"),
        num_threads=SLICES,
        thread_name=AXIS,
        scratch_types=scratch,
        compiler_params=hopper.compiler_params(auto_barriers=False),
        interpret=interpret,
    )(*arguments)
    return *results[:10], *(x.sum(axis=2) for x in results[10:12])
