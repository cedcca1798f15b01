"""Following recordings: the state is carried over chunks, and nothing else changes."""

import dataclasses
import functools
import itertools
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.config import from_mapping
from ttt_jax.data.chunks import Crops, Walks
from ttt_jax.models import moshi
from ttt_jax.training.checkpoints import Checkpoints, restore_latest
from ttt_jax.training.config import DataConfig, ExperimentConfig, MeshConfig, Stage
from ttt_jax.training.next_token import training_chunks
from ttt_jax.training.step import diagnostics, init_state, train_step

DELAYS, INITIAL = (0, 0, 1, 0, 1), (20,) * 5
CODES = np.random.default_rng(0).integers(0, 20, (4, 5, 22)).astype(np.int32)


def make(*, num_frames, batch_size=2, gradient_chunks=1, accumulate=1) -> ExperimentConfig:
    data = {"num_frames": num_frames, "batch_size": batch_size, "gradient_chunks": gradient_chunks}
    model = {
        **{"dim": 16, "num_layers": 1, "num_heads": 2, "context": 4, "hidden_scale": 3.0},
        **{"n_q": 4, "dep_q": 2, "card": 20, "text_card": 20, "delays": DELAYS},
        **{"depformer_dim": 8, "depformer_num_layers": 1, "depformer_num_heads": 2, "depformer_dim_feedforward": None},
        "ttt": {"layers": (0,), "kind": "linear", "mini_batch_size": 4},
    }
    mapping = {
        "data": {"directory": "", "mode": "follow", **data},
        "model": model,
        "optimizer": {"learning_rate": 1e-2, "steps": 30, "warmup_steps": 0, "accumulate": accumulate},
    }
    return from_mapping(ExperimentConfig, mapping)


class Recordings:
    """A dataset of given codes."""

    def __init__(self, codes):
        self._codes = codes
        self.num_frames = np.array([c.shape[1] for c in codes])

    def __len__(self):
        return len(self._codes)

    def codes(self, index):
        return self._codes[index]


def walk(config, codes) -> Walks:
    frames = config.data.num_frames * config.data.gradient_chunks
    rows = config.data.batch_size
    return Walks(Recordings(codes), seed=0, batch_size=rows, num_frames=frames, delays=DELAYS, initial=INITIAL)


@functools.cache
def compiled(config):
    return jax.jit(functools.partial(train_step, config))


@functools.cache
def start(config):
    """A state whose TTT layers take part: wo is not 0."""
    state = jax.jit(functools.partial(init_state, config))()
    layer = state.params["layers_0"]
    wo = jax.tree.map(lambda zero: jax.random.normal(jax.random.key(1), zero.shape) * 0.3, layer["ttt"]["wo"])
    layer = layer | {"ttt": layer["ttt"] | {"wo": wo}, "gate": jnp.ones(16)}
    return state._replace(params=state.params | {"layers_0": layer})


def assert_close(got, want, rtol=2e-5, atol=2e-6):
    """Float32 sums in another order."""
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol, atol=atol), got, want)


def test_chunks_with_the_state_carried_give_the_losses_of_whole_recordings():
    config = make(num_frames=5)
    state = start(config)
    chunks = walk(config, list(CODES[:2]))
    tokens = {"text": 0.0, "audio": np.zeros(2)}
    nll = {"text": 0.0, "audio": np.zeros(2)}
    for step in range(5):  # 22 frames and a delay of 1
        chunk = chunks[step]
        new, metrics = compiled(config)(state, chunk)
        state = state._replace(carry=new.carry)  # the same parameters all the way
        counts = (chunk.tokens[:, :3, 1:] >= 0) & (chunk.tokens[:, :3, 1:] < 20)
        for name, number in (("text", counts[:, 0].sum()), ("audio", counts[:, 1:].sum((0, 2)))):
            nll[name] = nll[name] + number * np.asarray(metrics[name], np.float64)
            tokens[name] = tokens[name] + number
    padded = np.pad(CODES[:2], ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    output = jax.jit(moshi.Moshi(config.model).apply)({"params": state.params}, padded)
    expected = moshi.losses(output, jnp.asarray(padded))
    assert tokens["text"] == expected.num_text_tokens
    np.testing.assert_array_equal(tokens["audio"], expected.num_audio_tokens)
    np.testing.assert_allclose(nll["text"] / tokens["text"], expected.text_nll, rtol=1e-5)
    np.testing.assert_allclose(nll["audio"] / tokens["audio"], expected.audio_nll, rtol=1e-5)


def test_a_row_that_starts_a_recording_is_as_fresh():
    config = make(num_frames=5)
    state = start(config)
    chunks = walk(config, list(CODES[:2]))
    used, _ = compiled(config)(state, chunks[0])
    used, _ = compiled(config)(used._replace(params=state.params), chunks[1])
    reset = chunks[2]._replace(reset=np.array([True, True]))
    from_used, metrics = compiled(config)(used._replace(params=state.params, optimizer=state.optimizer), reset)
    from_fresh, expected = compiled(config)(state, reset)
    assert_close(metrics, expected)
    assert_close(from_used.params, from_fresh.params)
    _, carried = compiled(config)(used._replace(params=state.params), chunks[2])
    assert abs(carried["loss"] - metrics["loss"]) > 1e-4


def test_gradients_flow_through_the_chunks_of_an_update():
    three, one = make(num_frames=6, gradient_chunks=3), make(num_frames=18)
    chunk = walk(one, list(CODES))[0]
    np.testing.assert_array_equal(chunk.tokens, walk(three, list(CODES))[0].tokens)
    got, metrics = compiled(three)(start(three), chunk)
    want, expected = compiled(one)(start(one), chunk)
    assert_close(metrics, expected)
    assert_close(got.carry, want.carry)
    # Adam's first step has the gradient's sign: where that is rounding, so is the step.
    assert_close(got.optimizer, want.optimizer, rtol=1e-4, atol=1e-6)


def test_diagnostics_read_no_more_at_one_time_than_an_update():
    """The first chunk of the first group of rows."""
    config = make(num_frames=6, batch_size=4, gradient_chunks=3, accumulate=2)
    state, chunk = start(config), walk(config, list(CODES))[0]
    small = make(num_frames=6, batch_size=2)
    first = jax.tree.map(lambda x: x[::2], chunk)
    first = first._replace(tokens=first.tokens[:, :, :7], length=np.minimum(first.length, 6))
    got = diagnostics(config, state.params, chunk, state.carry)
    assert any(name.endswith("inner_loss_after") for name in got)
    assert_close(got, diagnostics(small, state.params, first, jax.tree.map(lambda x: x[::2], state.carry)))


def test_layers_without_convolutions_carry_none(tmp_path):
    """Whose inputs would be arrays without a number, which Orbax does not save."""
    config = make(num_frames=6, batch_size=4, accumulate=2)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, ttt=dataclasses.replace(config.model.ttt, backbone="base"))
    )
    state, chunk = jax.jit(functools.partial(init_state, config))(), walk(config, list(CODES))[0]
    assert diagnostics(config, state.params, chunk, state.carry)
    jax.eval_shape(functools.partial(train_step, config), state, chunk)
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(0, state)
    restored = restore_latest(tmp_path, jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_diagnostics_of_crops_leave_out_padding():
    """Of recordings that are shorter than a crop."""
    config = dataclasses.replace(make(num_frames=12), data=DataConfig("", num_frames=12, batch_size=2))
    short = Crops(
        Recordings([c[:, :4] for c in CODES[:1]]), seed=0, batch_size=2, num_frames=12, delays=DELAYS, initial=INITIAL
    )[0]
    alone = short._replace(tokens=short.tokens[:, :, :7])  # initial, 4 frames, a delay of 1; and what is predicted
    params = start(config).params
    got, expected = diagnostics(config, params, short), diagnostics(config, params, alone)
    assert any(name.endswith("inner_loss_after") for name in got)
    assert_close(got, expected)


def test_accumulated_groups_of_rows_are_one_update():
    apart, together = make(num_frames=6, batch_size=4, accumulate=2), make(num_frames=6, batch_size=4)
    short = [CODES[0][:, :3], CODES[1], CODES[2][:, :5], CODES[3]]  # so that the groups weigh differently
    chunks = walk(together, short)
    got, want = start(apart), start(together)
    for step in range(2):
        got, metrics = compiled(apart)(got, chunks[step])
        want, expected = compiled(together)(want, chunks[step])
        assert_close(metrics, expected)
        assert_close(got.optimizer, want.optimizer, rtol=1e-4, atol=1e-6)
        assert_close(got.carry, want.carry)
        want = want._replace(params=got.params, optimizer=got.optimizer, carry=got.carry)


def test_three_hours_in_constant_memory():
    config = make(num_frames=256, batch_size=1)
    frames = round(3 * 3600 * 12.5)
    codes = np.random.default_rng(0).integers(0, 20, (5, frames)).astype(np.int32)
    chunks = walk(config, [codes])
    update = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    state = jax.tree.map(jnp.array, start(config))
    peaks = []
    resets = 0
    num_chunks = -(-(frames + 1) // 256)
    for step in range(num_chunks):
        chunk = chunks[step]
        resets += int(chunk.reset.sum())
        state, metrics = update(state, chunk)
        if step in (20, num_chunks - 1):
            jax.block_until_ready(state)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert resets == 1
    assert chunks[num_chunks].reset.all()
    assert np.isfinite(metrics["loss"])
    np.testing.assert_array_equal(state.carry[0].attention.position, [frames + 1])
    assert peaks[1] - peaks[0] < 20_000, peaks  # KiB; the tokens themselves are 2.7 MB


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"optimizer\.accumulate: expected a divisor of data\.batch_size = 2, got 3"):
        make(num_frames=4, accumulate=3)
    config = make(num_frames=4)
    with pytest.raises(ValueError, match="gradient_chunks: expected 1 unless mode is 'follow', got 2"):
        dataclasses.replace(config.data, mode="crops", gradient_chunks=2)
    with pytest.raises(ValueError, match="recording_frames: expected None unless mode is 'follow'"):
        dataclasses.replace(config.data, mode="crops", recording_frames=100)


def test_each_stage_walks_in_an_order_of_its_own():
    """Else a stage would begin with the recordings that the one before it has read; a run without stages stays."""
    codes = [np.full((5, 4), i, np.int32) for i in range(100)]
    config = dataclasses.replace(make(num_frames=8), mesh=MeshConfig(data=1, fsdp=1))
    stages = tuple(Stage(steps, 8) for steps in (10, 10))
    staged = training_chunks(
        dataclasses.replace(config, data=dataclasses.replace(config.data, stages=stages)), Recordings(codes)
    )
    read = [{int(row[1, 2]) for row in staged[step].tokens} for step in range(30)]
    orders = [[min(found) for found in read[first : first + 10]] for first in (0, 10, 20)]
    assert all(len(set().union(*read[first : first + 10])) == 20 for first in (0, 10, 20))
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    alone = training_chunks(config, Recordings(codes))
    for step in range(10):
        np.testing.assert_array_equal(alone[step].tokens, staged[20 + step].tokens)
