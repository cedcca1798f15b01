"""TTT-MLP, D = 64, C = 64: the backward kernel; four warpgroups of one thread block walk back over a row and head.

From each checkpoint they first walk forward, keeping the weights at the start of each mini-batch in global memory, then
back. As in the forward kernel each has a slice of 64 hidden units, and what sums over all units is split over tokens:
each warpgroup has a block of 16, whose keys and readers it works on between the same two barriers.

SMEM holds three matrices of hidden units and two of weights at a time, so the parts of a mini-batch are in an order
in which each is read for the last time before another takes its place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_kernels import hopper, inner, kept, sums
from ttt_kernels.blocks import MLPBlocks
from ttt_kernels.cluster import AXIS, SLICES
from ttt_kernels.hopper import COLUMNS, ROWS, TILE, D, load, over_columns, over_rows, product
from ttt_kernels.mlp_backward import launch
from ttt_kernels.tiles import MiniBatches

C = TILE
"""Tokens of a mini-batch."""

BLOCK = C // SLICES
"""Tokens of which one warpgroup sums over all hidden units; also those whose hidden units it has in registers at once:
of all 64 they would take what it keeps for later."""

_Z1, _SLOPE_Q, _OF_Z1 = range(3)
"""Of what a warpgroup keeps of tokens in global memory: layer 1 of the keys; GELU's gradient of the readers; of the
derivative by layer 1 what does not come from layer 2's output."""

_D_W1, _D_W2 = range(2)
"""Of the derivatives by weights."""


class _Matrices(NamedTuple):
    """Matrices in SMEM, bfloat16; those of weights and hidden units begin with the slice, mixing has (source, reader).

    Most hold one thing after the other; the properties tell what, in this order.
    """

    q: Any  # [C, 64]
    k: Any
    values: Any
    readers: Any
    w2: Any  # [4, 64, 64], rows are outputs
    weights: Any  # [4, 64, 64], rows are outputs: w1, the derivatives by w2, by w1, w1 again
    hidden: Any  # [4, 64, C]: x, d_u, x again, d_z1
    g1: Any  # [4, 64, C]; at last the results, [C, 64]
    hidden_q: Any  # [4, 64, C]: x_q, d_z1_q
    mixing: Any  # [C, C]: of layer 1, then d_attention1
    mixing2: Any  # [C, C], then d_z2 [64, C]
    d_attention2: Any  # [C, C]

    @property
    def g2(self) -> Any:
        """[64, C], in the place of v."""
        return self.values.T

    @property
    def d_z2_q(self) -> Any:
        """[64, C], in the place of d_out; on the walk forward layer 2's gradient times minus the step size."""
        return self.readers.T

    @property
    def d_z2(self) -> Any:
        """[64, C]."""
        return self.mixing2


class _Vectors(NamedTuple):
    """In SMEM, float32."""

    lr_read: Any  # [C]
    lr_update: Any
    scale: Any
    d_lr_read: Any
    d_lr_update: Any
    d_scale: Any
    of_layer1: Any  # [4, C], of each slice
    of_blocks: Any  # [4, 64], of each block of tokens
    of_readers: Any  # [4, C], likewise


def backward(
    q, k, v, lr_read, lr_update, scale, w1t_kept, b1_kept, w2t_kept, b2_kept, ln_scale, ln_bias, d_out, d_w1t, d_b1,
    d_w2t, d_b2, *, causal: bool, eps: float, blocks: MLPBlocks, interpret,
):  # fmt: skip
    """As `mlp_backward.backward`."""
    batch_size, num_mini_batches, num_heads = q.shape[0], q.shape[1] // C, q.shape[2]
    every = blocks.tiles_per_checkpoint
    per_group, num_groups = min(every, num_mini_batches), -(-num_mini_batches // every)
    mini_batches = MiniBatches(C, BLOCK)
    f32, bf16 = jnp.float32, jnp.bfloat16
    rows = (batch_size, num_heads)

    def body(
        q_g, k_g, v_g, lr_read_g, lr_update_g, scale_g, w1t_kept_g, b1_kept_g, w2t_kept_g, b2_kept_g, ln_scale_g,
        ln_bias_g, d_out_g, d_w1t_end_g, d_b1_end_g, d_w2t_end_g, d_b2_end_g,
        d_q_g, d_k_g, d_v_g, d_lr_read_g, d_lr_update_g, d_scale_g, d_w1t_g, d_b1_g, d_w2t_g, d_b2_g, d_ln_scale_g,
        d_ln_bias_g, weights_g, biases_g, kept_g, of_w2_g, d_weights_g,
        of_tokens_s, of_slices_s, sums_s, zero_s, start_barrier, recompute_barrier, back_barrier, everyone,
        *of_matrices,
    ):  # fmt: skip
        zero = hopper.hidden_zero(zero_s, known=blocks.interpreted)
        row, head, own = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index(AXIS)
        at = mini_batches.block(0, own)

        def matrices() -> _Matrices:
            at = zero()
            return _Matrices(*(ref.at[at] for ref in of_matrices))

        def vectors() -> _Vectors:
            at = zero()
            of_tokens, of_slices = of_tokens_s.at[at], of_slices_s.at[at]
            return _Vectors(*(of_tokens.at[i] for i in range(6)), *(of_slices.at[i] for i in range(3)))

        def inner_loss() -> inner.Loss:
            return inner.Loss(eps, sums.total(sums_s.at[own + zero()], interpreted=blocks.interpreted))

        def of_own(ref, *index):
            """What the warpgroup has in global memory."""
            return ref.at[row, head, own + zero(), *index]

        def keep(what: int, i, value) -> None:
            """For part i of the tokens and the own slice, in bfloat16."""
            kept.keep(of_own(kept_g, what, i), value.astype(bf16), interpreted=blocks.interpreted)

        def read(what: int, i):
            return kept.kept(of_own(kept_g, what, i), interpreted=blocks.interpreted)

        def keep_d_w(layer: int, value) -> None:
            kept.keep(of_own(d_weights_g, layer), value, interpreted=blocks.interpreted)

        def read_d_w(layer: int):
            return kept.kept(of_own(d_weights_g, layer), interpreted=blocks.interpreted)

        def over_blocks(body, carry=None):
            """A loop over the tokens of a mini-batch: `body(i, tokens, carry)`."""
            return lax.fori_loop(
                jnp.int32(0), jnp.int32(SLICES), lambda i, carry: body(i, mini_batches.block(0, i), carry), carry
            )

        def weights_at(j, layer: int):
            """Those that mini-batch j since the checkpoint starts with."""
            return kept.kept(of_own(weights_g, j, layer), interpreted=blocks.interpreted)

        def all_have_read() -> None:
            """So that a warpgroup may overwrite what its products or threads have read."""
            hopper.wait_for_warpgroup(interpreted=blocks.interpreted)

        def over_tokens(*xs):
            """The sums, by way of SMEM: else the compiler adds up where a sum is read, and keeps `x` until then."""
            sums_of_own = [sums_s.at[own + zero(), pl.ds(i * D, D)] for i in range(len(xs))]
            for x, ref in zip(xs, sums_of_own, strict=True):
                ref[...] = x.sum(axis=1)
            hopper.wait_for_warpgroup(interpreted=blocks.interpreted)
            found = [load(ref, ROWS) for ref in sums_of_own]
            all_have_read()
            return found

        def together() -> None:
            hopper.wait_for_each_other(everyone, interpreted=blocks.interpreted)

        def over_slices(pair):
            """A sum over all hidden units."""
            return [pair(j) for j in range(SLICES)]

        def over_warpgroups(ref):
            """The sum over tokens of what each warpgroup had of its block."""
            return hopper.total(load(ref.at[j], ROWS) for j in range(SLICES))

        def step_size(at):
            return over_rows(load(vectors().lr_update.at[at], COLUMNS))

        def fetch(barrier, i, *copies: tuple[Any, Any]) -> None:
            """From global memory, of mini-batch i."""
            at = row, pl.ds(i * C, C), head
            pl.when(own == 0)(lambda: hopper.fetch_tokens(barrier, at, *copies))

        @pl.when(own == 0)
        def _():
            plgpu.copy_gmem_to_smem(scale_g, vectors().scale, start_barrier)

        plgpu.barrier_wait(start_barrier)
        gamma, beta = (over_columns(load(ref.at[head], ROWS), BLOCK) for ref in (ln_scale_g, ln_bias_g))

        def before_gelu(s, b1, at):
            """Layer 1 of a block of keys."""
            return product((D, BLOCK), (s.weights.at[own], s.k.at[at].T)) + over_columns(b1, BLOCK)

        def write_weights(w1t, w2t) -> None:
            s = matrices()
            s.weights.at[own][...], s.w2.at[own][...] = w1t, w2t
            plgpu.commit_smem()

        def inner_gradient(b2):
            """Of layer 2, of the own block, to SMEM."""
            s = matrices()
            z2 = product((D, BLOCK), *over_slices(lambda j: (s.w2.at[j], s.hidden.at[j, :, at])))
            target = load(s.values.at[at].T).astype(f32) - load(s.k.at[at].T).astype(f32)
            keys = inner_loss().gradient(z2 + over_columns(b2, BLOCK), target, gamma, beta)
            s.g2.at[:, at][...] = keys.g.astype(bf16)
            return keys

        def fetch_keys(i) -> None:
            s = matrices()
            fetch(recompute_barrier, i, (k_g, s.k), (v_g, s.values), (lr_update_g, vectors().lr_update))

        def recompute(first, count, j, weights):
            """Forward over mini-batch `first + j`, keeping the weights that it starts with."""
            w1t, b1, w2t, b2 = weights
            plgpu.barrier_wait(recompute_barrier)
            operands = w1t.astype(bf16), w2t.astype(bf16)
            for layer, (weight, bias) in enumerate(zip(operands, (b1, b2), strict=True)):
                kept.keep(of_own(weights_g, j, layer), weight, interpreted=blocks.interpreted)
                of_own(biases_g, j, layer)[...] = bias
            write_weights(*operands)

            s = matrices()

            def hidden_layer(i, at, _):
                s.hidden.at[own, :, at][...] = inner.gelu(before_gelu(s, b1, at)).astype(bf16)

            over_blocks(hidden_layer)
            together()
            g2_step = inner_gradient(b2).g * step_size(at)
            matrices().d_z2_q.at[:, at][...] = (-g2_step).astype(bf16)
            vectors().of_blocks.at[own][...] = g2_step.sum(axis=1)
            together()

            s = matrices()

            def back(_, of_block, step1):
                g1 = product((D, BLOCK), (s.w2.at[own].T, s.g2.at[:, of_block]))
                g1_step = g1 * inner.gelu_gradient(before_gelu(s, b1, of_block)) * step_size(of_block)
                s.g1.at[own, :, of_block][...] = (-g1_step).astype(bf16)
                return step1 + g1_step.sum(axis=1)

            step1 = over_blocks(back, jnp.zeros_like(b1))
            plgpu.commit_smem()
            s, fused = matrices(), not blocks.interpreted
            w1t = hopper.updated(w1t, s.g1.at[own], s.k, fused=fused)
            w2t = hopper.updated(w2t, s.d_z2_q, s.hidden.at[own].T, fused=fused)
            b1, b2 = b1 - step1, b2 - over_warpgroups(vectors().of_blocks)
            together()
            pl.when(j + 1 < count)(lambda: fetch_keys(first + j + 1))
            return w1t, b1, w2t, b2

        def is_seen():
            return mini_batches.is_seen(zero(), own, causal=causal)

        def steps():
            """[C, BLOCK]: minus the step sizes of the sources that a reader sees; its own scale."""
            step = jnp.where(is_seen(), -over_columns(load(vectors().lr_read, ROWS), BLOCK), 0.0)
            return step, over_rows(load(vectors().scale.at[at], COLUMNS))

        def attend():
            """[C, BLOCK]: how the own block's readers attend to keys."""
            s = matrices()
            return jnp.where(is_seen(), product((C, BLOCK), (s.k, s.q.at[at].T)) + 1.0, 0.0)

        def fetch_others(i) -> None:
            """What is not read at the end of the mini-batch before."""
            s = matrices()
            fetch(back_barrier, i, (v_g, s.values), (d_out_g, s.readers), (lr_read_g, vectors().lr_read))

        def fetch_queries_and_keys(i) -> None:
            s = matrices()
            fetch(back_barrier, i, (q_g, s.q), (k_g, s.k), (lr_update_g, vectors().lr_update))

        def mini_batch(first, j, carry):
            """Back over mini-batch `first + j`; then come those before it, down to `first`."""
            d_b1, d_b2, d_gamma, d_beta = carry
            b1, b2 = (load(of_own(biases_g, j, layer), ROWS) for layer in range(2))
            plgpu.commit_smem()
            plgpu.barrier_wait(back_barrier)

            # The forward pass again. By slices: the hidden layer of the keys.
            s = matrices()

            def hidden_layer(i, at, _):
                z1 = before_gelu(s, b1, at)
                keep(_Z1, i, z1)
                s.hidden.at[own, :, at][...] = inner.gelu(z1).astype(bf16)

            over_blocks(hidden_layer)

            @pl.when(own == 0)
            def _():
                plgpu.wait_smem_to_gmem(0)  # the results of the mini-batch before

            together()
            # By tokens: the inner gradient, and how readers attend to keys.
            keys = inner_gradient(b2)

            def gradient():
                """As products read it: eight registers fewer to keep."""
                return load(matrices().g2.at[:, at]).astype(f32)

            s = matrices()
            step, by_reader = steps()
            s.mixing.at[:, at][...] = (attend() * by_reader * step).astype(bf16)
            together()

            # By slices: layer 1's inner gradient, and the hidden layer of the readers.
            s = matrices()

            def back_to_layer1(i, at, _):
                z1 = read(_Z1, i)
                d_x = product((D, BLOCK), (s.w2.at[own].T, s.g2.at[:, at]))
                s.g1.at[own, :, at][...] = (d_x * inner.gelu_gradient(z1.astype(f32))).astype(bf16)

            def readers(i, at, _):
                z1_q = product((D, BLOCK), (s.weights.at[own], s.q.at[at].T), (s.g1.at[own], s.mixing.at[:, at]))
                z1_q = z1_q + over_columns(b1, BLOCK)
                keep(_SLOPE_Q, i, inner.gelu_gradient(z1_q))
                s.hidden_q.at[own, :, at][...] = inner.gelu(z1_q).astype(bf16)

            over_blocks(back_to_layer1)
            plgpu.commit_smem()
            d_w2 = read_d_w(_D_W2).astype(bf16)
            s = matrices()
            over_blocks(readers)
            all_have_read()
            matrices().weights.at[own][...] = d_w2
            together()

            # By tokens: back through layer 2 of the readers, and through its step for the keys.
            s = matrices()
            attention2 = product((C, BLOCK), *over_slices(lambda j: (s.hidden.at[j].T, s.hidden_q.at[j, :, at])))
            attention2 = jnp.where(is_seen(), attention2 + 1.0, 0.0)
            step, by_reader = steps()
            s.mixing2.at[:, at][...] = (attention2 * by_reader * step).astype(bf16)
            plgpu.commit_smem()
            s = matrices()
            z2 = product(
                (D, BLOCK),
                *over_slices(lambda j: (s.w2.at[j], s.hidden_q.at[j, :, at])),
                (s.g2, s.mixing2.at[:, at]),
            )
            d_out = load(s.readers.at[at].T)
            normalized, rstd = inner_loss().normalize(z2 + over_columns(b2, BLOCK))
            of_out = d_out.astype(f32)
            of_gamma, of_beta = over_tokens(of_out * normalized, of_out)
            d_gamma, d_beta = d_gamma + of_gamma, d_beta + of_beta
            d_z2_q = rstd * inner_loss().without_projections(of_out * gamma, normalized)
            s.d_z2_q.at[:, at][...] = d_z2_q.astype(bf16)
            vectors().of_blocks.at[own][...] = d_z2_q.sum(axis=1)
            plgpu.commit_smem()
            s = matrices()
            d_mixing2 = jnp.where(is_seen(), product((C, BLOCK), (s.g2.T, s.d_z2_q.at[:, at])), 0.0)
            s.d_attention2.at[:, at][...] = (d_mixing2 * by_reader * step).astype(bf16)
            of_reader = d_mixing2 * attention2
            d_step2 = product((D, BLOCK), *over_slices(lambda j: (s.weights.at[j], s.hidden.at[j, :, at])))
            d_step2 = d_step2 + over_columns(d_b2, BLOCK)
            d_lr = inner_loss().total(gradient() * d_step2)
            together()

            # By slices: back through layer 1 of the readers, and through layer 1's step and its inner gradient.
            s = matrices()
            d_b2 = d_b2 + over_warpgroups(vectors().of_blocks)
            d_g2 = product((D, BLOCK), (s.d_z2_q, s.mixing2.at[at].T)) - d_step2 * step_size(at)

            s = matrices()

            def back_through_attention2(i, at, _):
                z1 = read(_Z1, i)
                of_x = product((D, BLOCK), (s.hidden_q.at[own], s.d_attention2.at[at].T))
                of_x = of_x - product((D, BLOCK), (s.weights.at[own].T, s.g2.at[:, at])) * step_size(at)
                keep(_OF_Z1, i, of_x * inner.gelu_gradient(z1.astype(f32)))

            over_blocks(back_through_attention2)
            s = matrices()
            of_w2 = product((D, D), (s.d_z2_q, s.hidden_q.at[own].T))
            kept.keep(of_own(of_w2_g), of_w2.astype(bf16), interpreted=blocks.interpreted)
            all_have_read()

            s = matrices()

            def back_to_readers(i, at, of_b1):
                slope = read(_SLOPE_Q, i)
                d_x_q = product(
                    (D, BLOCK), (s.w2.at[own].T, s.d_z2_q.at[:, at]), (s.hidden.at[own], s.d_attention2.at[:, at])
                )
                d_z1_q = d_x_q * slope.astype(f32)
                s.hidden_q.at[own, :, at][...] = d_z1_q.astype(bf16)
                return of_b1 + d_z1_q.sum(axis=1)

            d_w1 = read_d_w(_D_W1).astype(bf16)
            next_d_b1 = over_blocks(back_to_readers, d_b1)
            all_have_read()
            matrices().weights.at[own][...] = d_w1
            plgpu.commit_smem()

            s = matrices()

            def back_through_step1(i, at, _):
                z1, of_z1 = read(_Z1, i), read(_OF_Z1, i)
                d_step1 = product((D, BLOCK), (s.weights.at[own], s.k.at[at].T)) + over_columns(d_b1, BLOCK)
                g1 = load(s.g1.at[own, :, at]).astype(f32)
                vectors().of_layer1.at[own, at][...] = inner_loss().total(g1 * d_step1)
                d_g1 = product((D, BLOCK), (s.hidden_q.at[own], s.mixing.at[at].T)) - d_step1 * step_size(at)
                z1 = z1.astype(f32)
                s.hidden.at[own, :, at][...] = (d_g1 * inner.gelu_gradient(z1)).astype(bf16)
                d_x = product((D, BLOCK), (s.w2.at[own].T, s.g2.at[:, at]))
                keep(_OF_Z1, i, of_z1.astype(f32) + d_g1 * d_x * inner.gelu_second_derivative(z1))

            over_blocks(back_through_step1)
            d_b1 = next_d_b1
            together()

            # By tokens: back through layer 1's attention, and through layer 2's inner gradient.
            s = matrices()
            d_mixing1 = product((C, BLOCK), *over_slices(lambda j: (s.g1.at[j].T, s.hidden_q.at[j, :, at])))
            d_mixing1 = jnp.where(is_seen(), d_mixing1, 0.0)
            step, by_reader = steps()
            s.mixing.at[:, at][...] = (d_mixing1 * by_reader * step).astype(bf16)
            of_reader = of_reader + d_mixing1 * attend()
            vectors().of_readers.at[own][...] = (of_reader * by_reader).sum(axis=1)
            vectors().d_scale.at[at][...] = inner_loss().total(of_reader * step)
            s = matrices()
            d_g2 = d_g2 + product((D, BLOCK), *over_slices(lambda j: (s.w2.at[j], s.hidden.at[j, :, at])))
            of_step1 = product((D, BLOCK), *over_slices(lambda j: (s.weights.at[j].T, s.g1.at[j, :, at])))
            of_layer1 = hopper.total(load(vectors().of_layer1.at[j, at], COLUMNS) for j in range(SLICES))
            vectors().d_lr_update.at[at][...] = -(of_layer1 + d_lr)
            d = inner_loss().back_through_gradient(d_g2, keys._replace(g=gradient()), gamma)
            s.d_z2.at[:, at][...] = d.d_z.astype(bf16)
            vectors().of_blocks.at[own][...] = d.d_z.sum(axis=1)
            of_gamma, of_beta = over_tokens(d.d_gamma, d.d_beta)
            d_gamma, d_beta = d_gamma + of_gamma, d_beta + of_beta
            of_key = d.d_target + of_step1 * step_size(at)
            together()

            # By slices: back through the layers of the keys, to the weights.
            s = matrices()
            d_b2 = d_b2 + over_warpgroups(vectors().of_blocks)
            fused = not blocks.interpreted
            of_w2 = kept.kept(of_own(of_w2_g), interpreted=blocks.interpreted).astype(f32)
            d_w2 = hopper.updated(read_d_w(_D_W2) + of_w2, s.g2, s.hidden.at[own].T, fused=fused)
            plgpu.commit_smem()

            def hidden_layer_again(i, at, _):
                matrices().hidden.at[own, :, at][...] = inner.gelu(read(_Z1, i).astype(f32)).astype(bf16)

            over_blocks(hidden_layer_again)
            plgpu.commit_smem()
            s = matrices()
            keep_d_w(_D_W2, hopper.updated(d_w2, s.d_z2, s.hidden.at[own].T, fused=fused))
            plgpu.commit_smem()

            s = matrices()

            def back_to_keys(i, at, of_b1):
                z1, of_z1 = read(_Z1, i), read(_OF_Z1, i)
                d_x = product((D, BLOCK), (s.w2.at[own].T, s.d_z2.at[:, at]))
                d_z1 = d_x * inner.gelu_gradient(z1.astype(f32)) + of_z1.astype(f32)
                s.hidden.at[own, :, at][...] = d_z1.astype(bf16)
                return of_b1 + d_z1.sum(axis=1)

            d_b1 = over_blocks(back_to_keys, d_b1)
            w1t, d_w1 = weights_at(j, 0), read_d_w(_D_W1)
            matrices().weights.at[own][...] = w1t
            plgpu.commit_smem()
            s = matrices()
            d_w1 = hopper.updated(d_w1, s.hidden.at[own], s.k, fused=fused)
            keep_d_w(_D_W1, hopper.updated(d_w1, s.hidden_q.at[own], s.q, fused=fused))
            together()

            # By tokens: back to the queries and the keys.
            pl.when(j > 0)(lambda: fetch_others(first + j - 1))
            s = matrices()
            d_q_s, d_k_s, d_v_s = (s.g1.at[result] for result in range(3))
            before = [weights_at(jnp.maximum(j - 1, 0), layer) for layer in range(2)]
            d_q = product(
                (D, BLOCK),
                *over_slices(lambda j: (s.weights.at[j].T, s.hidden_q.at[j, :, at])),
                (s.k.T, s.mixing.at[:, at]),
            )
            d_q_s.at[at].T[...] = (d_out.astype(f32) + d_q).astype(bf16)
            d_k = product(
                (D, BLOCK),
                *over_slices(lambda j: (s.weights.at[j].T, s.hidden.at[j, :, at])),
                (s.q.T, s.mixing.at[at].T),
            )
            d_k_s.at[at].T[...] = (d_k - of_key).astype(bf16)
            d_v_s.at[at].T[...] = d.d_target.astype(bf16)

            @pl.when(own == 0)
            def _():
                vectors().d_lr_read[...] = -over_warpgroups(vectors().of_readers)

            together()

            s = matrices()
            s.weights.at[own][...], s.w2.at[own][...] = before

            @pl.when(own == 0)
            def _():
                at = row, pl.ds((first + j) * C, C), head
                hopper.save_tokens(at, (d_q_s, d_q_g), (d_k_s, d_k_g), (d_v_s, d_v_g))
                hopper.save_tokens(
                    at,
                    (vectors().d_lr_read, d_lr_read_g),
                    (vectors().d_lr_update, d_lr_update_g),
                    (vectors().d_scale, d_scale_g),
                )

            pl.when(j > 0)(lambda: fetch_queries_and_keys(first + j - 1))
            return d_b1, d_b2, d_gamma, d_beta

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

            @pl.when(own == 0)
            def _():
                plgpu.wait_smem_to_gmem(0)  # the results of the mini-batch before

            fetch_keys(first)
            lax.fori_loop(jnp.int32(0), count, lambda j, weights: recompute(first, count, j, weights), weights)
            last = first + count - 1
            fetch_others(last)
            fetch_queries_and_keys(last)
            write_weights(*(weights_at(count - 1, layer) for layer in range(2)))
            return lax.fori_loop(jnp.int32(0), count, lambda j, carry: mini_batch(first, count - 1 - j, carry), carry)

        for layer, end in ((_D_W1, d_w1t_end_g), (_D_W2, d_w2t_end_g)):
            keep_d_w(layer, load(of_own(end)))
        d_b1, d_b2 = load(of_own(d_b1_end_g), ROWS), load(d_b2_end_g.at[row, head], ROWS)
        zeros = jnp.zeros_like(d_b1)
        d_b1, d_b2, d_gamma, d_beta = lax.fori_loop(
            jnp.int32(0), jnp.int32(num_groups), group, (d_b1, d_b2, zeros, zeros)
        )
        for layer, result in ((_D_W1, d_w1t_g), (_D_W2, d_w2t_g)):
            of_own(result)[...] = read_d_w(layer)
        of_own(d_b1_g)[...] = d_b1
        of_own(d_ln_scale_g)[...], of_own(d_ln_bias_g)[...] = d_gamma, d_beta

        @pl.when(own == 0)
        def _():
            d_b2_g.at[row, head][...] = d_b2
            plgpu.wait_smem_to_gmem(0)

    def matrix(*shape: int) -> Any:
        return plgpu.SMEM((1, *shape), bf16, transforms=hopper.over_tokens(BLOCK))

    arguments = (
        *(q, k, v, lr_read, lr_update, scale, w1t_kept, b1_kept, w2t_kept, b2_kept, ln_scale, ln_bias, d_out, d_w1t),
        *(d_b1, d_w2t, d_b2),
    )
    return launch(
        body,
        arguments,
        mini_batches=per_group,
        more=[
            jax.ShapeDtypeStruct((*rows, SLICES, 3, C // BLOCK, D, BLOCK), bf16),
            jax.ShapeDtypeStruct((*rows, SLICES, D, D), bf16),
            jax.ShapeDtypeStruct((*rows, SLICES, 2, D, D), f32),
        ],
        scratch=[
            *(plgpu.SMEM((1, 6, C), f32), plgpu.SMEM((1, 3, SLICES, D), f32)),
            sums.scratch(SLICES),
            hopper.HIDDEN_ZERO,
            *(plgpu.Barrier(num_arrivals=arrivals) for arrivals in (1, 3, 6)),
            plgpu.Barrier(num_arrivals=SLICES),
            *(matrix(C, D),) * 4,
            *(matrix(SLICES, D, D),) * 2,
            *(matrix(SLICES, D, C),) * 3,
            *(matrix(C, C),) * 3,
        ],
        interpret=interpret,
    )
