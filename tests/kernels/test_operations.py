"""The GPU kernels against the scan in float64: on a GPU where JAX has one, else interpreted, and
races detected in all that do not differ from another in a mask alone."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ttt_kernels
from jax.sharding import AxisType

import ttt_jax
from ttt_jax.layers.ttt import TTTConfig, TTTLayer
from ttt_jax.ttt import pallas

C, D = 16, 64
OUTPUT, STATE, GRADIENT = 1e-2, 2e-2, 2e-2
"""Largest errors relative to float64, by norm; the inputs are the same bfloat16 numbers."""

SHORT = 4e-3
"""The same of a few hundred tokens, whose outputs are rounded to within 1.7e-3."""

EPS = 1e-2
"""Of the LayerNorm where gradients are looked at: as large as the variance that it is added to."""

FLOAT32 = 5e-5
"""The same of float32 tokens. Products read 16 bits of each number: half a unit in the last is 8e-6 of it."""


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    kind: type
    mini_batch_size: int
    causal: bool
    dim: int = D

    def __str__(self):
        kind = "linear" if self.kind is ttt_jax.TTTLinearParams else "mlp"
        kind += "" if self.dim == D else f"-d{self.dim}"
        return f"{kind}-{self.mini_batch_size}-{'causal' if self.causal else 'full'}"

    def run(self, name, params, tokens, **options):
        operation = ttt_jax.ttt_linear if self.kind is ttt_jax.TTTLinearParams else ttt_jax.ttt_mlp
        options |= {"mini_batch_size": self.mini_batch_size, "causal": self.causal}
        return operation(params, *tokens, implementation=name, **options)


LINEAR, MLP = (
    [Variant(kind, c, causal) for c in (16, 64) for causal in (True, False)]
    for kind in (ttt_jax.TTTLinearParams, ttt_jax.TTTMLPParams)
)
LINEAR_128 = [variant._replace(dim=128) for variant in LINEAR]


ON_GPU = jax.default_backend() == "gpu"
without_gpu = pytest.mark.skipif(ON_GPU, reason="about devices that are no GPU")


@pytest.fixture(autouse=True)
def float64():
    """For all threads: the interpreter compiles in threads of its own."""
    jax.config.update("jax_enable_x64", True)
    with jax.default_matmul_precision("highest"):
        yield
    jax.config.update("jax_enable_x64", False)


@contextlib.contextmanager
def a_gpu(*, detect_races=True):
    """The real one, or the interpreted one."""
    with contextlib.nullcontext() if ON_GPU else ttt_kernels.interpreted(detect_races=detect_races):
        yield


@pytest.fixture
def gpu(request, capfd):
    """`a_gpu`; interpreted, it fails when memory was reached without a barrier's order.

    Not for variants that differ from others in a mask alone: looking for races doubles the time.
    """
    variant = request.node.callspec.params.get("variant") if hasattr(request.node, "callspec") else None
    with a_gpu(detect_races=variant not in (LINEAR[1], LINEAR[3], LINEAR_128[1], LINEAR_128[3])):
        yield
    assert "race" not in capfd.readouterr().out.lower()


def normal(rng, *shape, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)


def make_params(num_heads=1, dim=D, kind=ttt_jax.TTTLinearParams, hidden=4 * D):
    rng = np.random.default_rng(0)
    shapes = {"w1": (dim, dim), "b1": (dim,)}
    if kind is ttt_jax.TTTMLPParams:
        shapes = {"w1": (dim, hidden), "b1": (hidden,), "w2": (hidden, dim), "b2": (dim,)}
    weights = {name: normal(rng, num_heads, *shape, scale=0.1) for name, shape in shapes.items()}
    return kind(**weights, ln_scale=1 + normal(rng, num_heads, dim, scale=0.2), ln_bias=normal(rng, num_heads, dim))


def make_tokens(num_tokens, batch_size=1, num_heads=1, dim=D, seed=1, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    shape = (batch_size, num_tokens, num_heads)
    q, k = (normal(rng, *shape, dim, scale=dim**-0.5, dtype=dtype) for _ in range(2))
    return q, k, normal(rng, *shape, dim, dtype=dtype), jnp.asarray(rng.uniform(0.05, 0.4, shape), jnp.float32)


def float64_of(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def assert_close(got, expected, tolerance):
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), jax.tree_util.keystr(path)


def run(name, params, tokens, **options):
    return jax.jit(functools.partial(ttt_jax.ttt_linear, implementation=name))(params, *tokens, **options)


def check_forward(variant, num_tokens, dtype=jnp.bfloat16):
    params = make_params(kind=variant.kind, dim=variant.dim)
    tokens = make_tokens(num_tokens, dim=variant.dim, dtype=dtype)
    kernel = jax.jit(functools.partial(variant.run, "pallas"))
    out, state = kernel(params, tokens)
    assert out.dtype == dtype
    assert {x.dtype for x in state.weights} == {jnp.dtype("float32")}
    exact, exact_state = jax.jit(functools.partial(variant.run, "scan"))(*float64_of((params, tokens)))
    of_output, of_state = (OUTPUT, STATE) if num_tokens >= 8192 else (SHORT, SHORT)
    if dtype == jnp.float32:
        of_output = of_state = FLOAT32
    assert_close(out, exact, of_output)
    assert_close(state.weights, exact_state.weights, of_state)
    np.testing.assert_array_equal(state.count, exact_state.count)
    if num_tokens < 8192:  # weights that learn nothing stay as they are, bit by bit: the state is float32
        *others, lr = tokens
        _, state = kernel(params, (*others, jnp.zeros_like(lr)))
        jax.tree.map(lambda w, start: np.testing.assert_array_equal(w[0], start), state.weights, params.fast_weights)


def test_outputs_and_state_after_more_tiles_than_are_on_their_way_at_once(gpu):
    check_forward(LINEAR[0], 512)


def test_outputs_and_state_at_head_dim_128(gpu):
    check_forward(LINEAR_128[0], 256)


@pytest.mark.slow
@pytest.mark.parametrize("variant", LINEAR + LINEAR_128 + MLP, ids=str)
def test_outputs_and_state_after_8192_tokens(variant):
    with a_gpu(detect_races=False):
        check_forward(variant, 8192)


FLOAT32_TOKENS = {LINEAR[0]: 300, LINEAR[1]: 100, LINEAR[2]: 200, LINEAR[3]: 100, MLP[0]: 40, MLP[3]: 50}


@pytest.mark.parametrize("variant", FLOAT32_TOKENS, ids=str)
def test_float32_tokens(gpu, variant):
    check_forward(variant, FLOAT32_TOKENS[variant], jnp.float32)


@pytest.mark.parametrize("num_tokens", [4 * C, 1])
def test_float32_tokens_whose_predictions_have_a_large_mean(gpu, num_tokens):
    """60 times their deviation: of the mean square without the mean's square, float32 would leave 3 digits."""
    params, tokens = make_params(), make_tokens(num_tokens, dtype=jnp.float32)
    params = params._replace(b1=params.b1 + 30)
    state = LINEAR[0].run("scan", params, make_tokens(4 * C, seed=3, dtype=jnp.float32))[1]
    out, _ = LINEAR[0].run("pallas", params, tokens, state=state)
    exact, _ = LINEAR[0].run("scan", *float64_of((params, tokens)), state=float64_of(state))
    assert_close(out, exact, FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("variant", LINEAR + MLP, ids=str)
def test_float32_tokens_after_8192_tokens(variant):
    with a_gpu(detect_races=False):
        check_forward(variant, 8192, jnp.float32)


def test_float32_tokens_have_the_derivatives_of_the_scan(gpu):
    """In rows of which one ends early, after a part that the scan reads; named, since the scan is the default."""
    variant, params, tokens = LINEAR[0], make_params(), make_tokens(2 * C + 3, batch_size=2, dtype=jnp.float32)
    state = variant.run("scan", params, make_tokens(5, batch_size=2, seed=3, dtype=jnp.float32))[1]
    length = jnp.asarray([2 * C + 3, C + 1])

    def total(arguments, name):
        params, weights, tokens = arguments
        out, final = variant.run(name, params, tokens, state=state._replace(weights=weights), length=length)
        return sum(jnp.sum(jnp.sin(x)) for x in (out, *final.weights, *final.gradient))

    gradients = [
        jax.jit(jax.grad(total), static_argnums=1)((params, state.weights, tokens), name) for name in ("pallas", "scan")
    ]
    assert_close(*gradients, FLOAT32)


@pytest.mark.parametrize("variant", [MLP[1], MLP[2]], ids=str)
def test_mlp_outputs_and_state(gpu, variant):
    """Of the variants whose gradients take too long here."""
    check_forward(variant, 50 if variant.mini_batch_size == C else 64)


class Rows(NamedTuple):
    """A call whose rows differ, that continues a causal state."""

    num_tokens: int
    before: int  # tokens that the state has read
    length: list[int]
    reset: list[bool]
    remat_every: int


GRADIENTS = {
    # Rows that end after the call, inside of the open mini-batch, at once; the last starts afresh.
    LINEAR[0]: Rows(5 * C + 3, C + 5, [5 * C + 3, 7, 0, 4 * C + 2], [False, False, False, True], remat_every=4),
    LINEAR[1]: Rows(40, 5, [40, 21], [False, True], remat_every=16),
    LINEAR[2]: Rows(150, 30, [150, 90], [False, False], remat_every=16),
    LINEAR[3]: Rows(150, 0, [150, 0], [False, False], remat_every=2),  # the last checkpoint has fewer tiles
    LINEAR_128[0]: Rows(3 * 64 + 9, 5, [3 * 64 + 9], [False], remat_every=8),  # as above
    LINEAR_128[1]: Rows(40, 5, [40, 21], [False, True], remat_every=16),
    LINEAR_128[2]: Rows(150, 30, [150, 90], [False, False], remat_every=16),
    LINEAR_128[3]: Rows(150, 0, [150], [False], remat_every=2),
    MLP[0]: Rows(11 + 4 * C, 5, [11 + 4 * C], [False], remat_every=16),  # little but the kernel's part
    MLP[3]: Rows(64, 9, [62], [False], remat_every=16),
}


SLOW = {LINEAR_128[1], LINEAR_128[3]}  # the masks of which head dim 64 has the same


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] if v in SLOW else []) for v in GRADIENTS], ids=str
)
def test_every_gradient(gpu, variant):
    check_gradients(variant, GRADIENTS[variant])


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v == MLP[2] else [pytest.mark.slow]) for v in MLP], ids=str
)
def test_every_gradient_of_the_mlp_over_more_tiles(gpu, variant):
    """Three tiles after the open mini-batch, with two and one for a checkpoint."""
    check_gradients(variant, Rows(200, 60, [195], [False], remat_every=128 // variant.mini_batch_size))


def check_gradients(variant, rows_of_call):
    num_tokens, before, length, reset, remat_every = rows_of_call
    rows = len(length)
    make = functools.partial(make_tokens, batch_size=rows, dim=variant.dim)
    params, tokens = make_params(kind=variant.kind, dim=variant.dim), make(num_tokens)
    given = variant._replace(causal=True).run("scan", params, make(before, seed=3))[1]
    rng = np.random.default_rng(5)
    # Near the defaults: were all near 1, rounding w1 to bfloat16 would change these gradients by 2 % in float64 too.
    c = variant.mini_batch_size
    steps = 1 / (1 + np.arange(c)) if variant.causal else np.full(c, 1 / c)
    token_scale = jnp.asarray(steps * rng.uniform(0.5, 1.5, c), jnp.float32)
    d_out = normal(rng, rows, num_tokens, 1, variant.dim, dtype=jnp.float64)
    beyond = np.arange(num_tokens)[None] >= np.asarray(length)[:, None]
    tokens = tuple(jnp.where(beyond.reshape(beyond.shape + (1,) * (x.ndim - 2)), jnp.nan, x) for x in tokens)

    def objective(arguments, name):
        params, *tokens, token_scale, weights, gradient = arguments
        options = {"length": jnp.asarray(length), "reset": jnp.asarray(reset), "remat_every": remat_every, "eps": EPS}
        options |= {"token_scale": token_scale, "state": given._replace(weights=weights, gradient=gradient)}
        out, final = variant.run(name, params, tokens, **options)
        wide_out, wide = float64_of((out, final))
        of_state = sum(jnp.sum(jnp.sin(x + i)) for i, x in enumerate(wide.weights + wide.gradient))
        return jnp.sum(wide_out * d_out) + of_state, (out, final)

    arguments = (params, *tokens, token_scale, given.weights, given.gradient)
    results = [
        jax.jit(jax.grad(functools.partial(objective, name=name), has_aux=True))(arguments)
        for name, arguments in (("pallas", arguments), ("scan", float64_of(arguments)))
    ]
    (gradients, (out, state)), (exact_gradients, (exact_out, exact_state)) = results
    assert_close(out, exact_out, OUTPUT)
    assert_close((state.weights, state.gradient), (exact_state.weights, exact_state.gradient), STATE)
    np.testing.assert_array_equal(state.count, exact_state.count)
    assert_close(gradients, exact_gradients, GRADIENT)
    for x in (out, *gradients[1:5]):
        np.testing.assert_array_equal(np.asarray(x)[beyond], 0)


@pytest.mark.parametrize("variant", [LINEAR[0], LINEAR_128[0], MLP[0]], ids=str)
def test_decoding_token_by_token(gpu, variant):
    """Rows at other places of their mini-batches, one of which ends within; a step without a token changes nothing."""
    make = functools.partial(make_tokens, batch_size=2, dim=variant.dim)
    params, c = make_params(kind=variant.kind, dim=variant.dim), 4
    variant = variant._replace(mini_batch_size=c)
    state = variant.run("scan", params, make(6, seed=3), length=jnp.asarray([5, 6]))[1]
    steps = make(3, dtype=jnp.float32)

    @jax.jit
    def decode(token, state, length):
        return variant.run("pallas", params, token, state=state, length=length)

    outs, kernel_state = [], state
    for t, length in enumerate(([1, 1], [0, 1], [1, 1])):
        out, kernel_state = decode([x[:, t : t + 1] for x in steps], kernel_state, jnp.asarray(length))
        outs.append(out)
        token = float64_of([x[:, t : t + 1] for x in steps])
        exact, state = variant.run(
            "scan", float64_of(params), token, state=float64_of(state), length=jnp.asarray(length)
        )
        np.testing.assert_allclose(out, exact, atol=2e-5)  # float32, sums of 64 and 256
        assert_close(kernel_state, state, 1e-5)
    np.testing.assert_array_equal(outs[1][0], 0)


def test_a_step_has_the_derivatives_of_the_scan(gpu):
    params, tokens = make_params(), make_tokens(1, dtype=jnp.float32)
    state = LINEAR[0].run("scan", params, make_tokens(3))[1]

    def total(arguments, name):
        params, weights, tokens = arguments
        out, final = LINEAR[0].run(name, params, tokens, state=state._replace(weights=weights))
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(final.gradient[0]))

    gradients = [
        jax.jit(jax.grad(total), static_argnums=1)((params, state.weights, tokens), name) for name in ("pallas", "scan")
    ]
    assert_close(*gradients, 1e-5)


def test_training_that_began_with_scan_continues_with_the_kernels(gpu, monkeypatch):
    """The layer does not know that kernels exist: the dispatch alone takes them."""
    layer = TTTLayer(TTTConfig.ttt_lm("linear", width=D, num_heads=1), dtype=jnp.bfloat16)
    x = normal(np.random.default_rng(7), 1, 4 * C, D)
    params = jax.jit(layer.init)(jax.random.key(0), x)

    def mean_square(params):
        out, _ = layer.apply(params, x)
        return jnp.mean(jnp.square(out.astype(jnp.float32) - jnp.roll(x, 1, axis=1)))

    def update(params):
        return jax.value_and_grad(mean_square)(params)

    calls = []
    monkeypatch.setattr(pallas, "ttt", lambda call, ttt=pallas.ttt: calls.append(call) or ttt(call))
    monkeypatch.setattr(pallas, "FASTER_ON", frozenset())
    for _ in range(2):
        loss, gradients = jax.jit(update)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    assert not calls
    loss, gradients = jax.jit(lambda params: update(params))(params)
    monkeypatch.setattr(pallas, "FASTER_ON", frozenset({jax.devices()[0].device_kind}))
    kernel_loss, kernel_gradients = jax.jit(lambda params: update(params))(params)
    assert calls
    np.testing.assert_allclose(kernel_loss, loss, rtol=1e-3)
    flat, exact = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(x)]) for x in (kernel_gradients, gradients))
    assert_close(flat, exact, GRADIENT)


@without_gpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": make_params(kind=ttt_jax.TTTMLPParams, hidden=128)}, "inner MLP has 256 hidden units, not 128"),
        ({"mini_batch_size": 8}, "the kernels' mini-batches have 16 or 64 tokens, not 8"),
        ({"tokens": make_tokens(32, dtype=jnp.float16)}, "the kernels compute on bfloat16 or float32, q is float16"),
        (
            {"tokens": make_tokens(32, dim=128, dtype=jnp.float32), "params": make_params(dim=128)},
            "the kernels' head dim is 64 in float32, not 128",
        ),
        (
            {"tokens": make_tokens(32, dim=32), "params": make_params(dim=32)},
            "the kernels' head dim is 64 or 128, not 32",
        ),
        (
            {
                "tokens": make_tokens(32, dim=128),
                "params": make_params(dim=128, kind=ttt_jax.TTTMLPParams, hidden=256),
            },
            "the kernels' head dim is 64, not 128",
        ),
        ({"tokens": make_tokens(15)}, "15 tokens have no whole mini-batch"),
        ({"tokens": make_tokens(32, batch_size=0)}, "the call has no rows or no heads"),
    ],
)
def test_what_the_kernels_cannot_take_is_told_and_left_to_the_scan(changes, message):
    arguments = {"params": make_params(), "tokens": make_tokens(32), "mini_batch_size": 16, "causal": True} | changes
    params, tokens = arguments.pop("params"), arguments.pop("tokens")
    operation = ttt_jax.ttt_mlp if isinstance(params, ttt_jax.TTTMLPParams) else ttt_jax.ttt_linear
    with ttt_kernels.interpreted():
        reason = ttt_jax.explain(params, *tokens, **arguments)
        assert reason.startswith("scan; the kernels cannot take this call: ")
        assert reason.endswith(message)
        with pytest.raises(NotImplementedError, match=message):
            operation(params, *tokens, implementation="pallas", **arguments)
        out, _ = operation(params, *tokens, implementation=("pallas", "scan"), **arguments)
    np.testing.assert_array_equal(out, operation(params, *tokens, **arguments)[0])


@without_gpu
def test_arrays_with_explicit_shardings_are_told_to_use_shard_map(monkeypatch):
    """Others the compiler splits: `tests/kernels/test_partitioned.py`."""
    monkeypatch.setattr(ttt_jax.devices, "compute_capability", lambda: (9, 0))
    for kind, expected in ((AxisType.Explicit, "call it inside jax.shard_map"), (AxisType.Auto, "can take this call")):
        with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(kind,))):
            assert expected in ttt_jax.explain(make_params(), *make_tokens(32))


@without_gpu
def test_explain_says_what_none_takes(monkeypatch):
    arguments = (make_params(), *make_tokens(32))
    assert "scan; the kernels cannot take this call: the default device is no CUDA GPU" in ttt_jax.explain(*arguments)
    with ttt_kernels.interpreted():
        assert "not measured to be faster on 'cpu'" in ttt_jax.explain(*arguments)
        monkeypatch.setattr(pallas, "FASTER_ON", frozenset({"cpu"}))
        assert ttt_jax.explain(*arguments) == "pallas"
        state = LINEAR[0].run("scan", arguments[0], make_tokens(3))[1]
        step = make_tokens(1, dtype=jnp.float32)
        assert "on 'cpu' for one token: name 'pallas'" in ttt_jax.explain(arguments[0], *step, state=state)
        of_128 = make_params(dim=128), *make_tokens(64, dim=128)
        assert ttt_jax.explain(*of_128) == "pallas"
        of_64_tokens = ttt_jax.explain(*of_128, mini_batch_size=64)
        assert "faster on 'cpu' at head dim 128 and mini-batches of 64 tokens: name 'pallas'" in of_64_tokens
        of_float32 = ttt_jax.explain(make_params(), *make_tokens(32, dtype=jnp.float32))
        assert "faster on 'cpu' in float32, of which products read 16 bits: name 'pallas'" in of_float32
    with pytest.raises(ValueError, match="q: expected an array, got int"):
        ttt_jax.explain(make_params(), 1, 1, 1, 1)


@pytest.mark.parametrize("capability", [None, (8, 0), (12, 0)])
def test_other_devices_never_fail_for_lack_of_a_kernel(monkeypatch, capability):
    monkeypatch.setattr(ttt_jax.devices, "compute_capability", lambda: capability)
    params, tokens = make_params(), make_tokens(32)
    with pytest.raises(NotImplementedError, match="pallas: the"):
        run("pallas", params, tokens)
    np.testing.assert_array_equal(run(None, params, tokens)[0], run("scan", params, tokens)[0])


def test_the_kernel_itself_names_a_wrong_argument():
    q, k, v, lr = make_tokens(32)
    params = make_params()
    weights = tuple(w[None] for w in params.fast_weights)
    scale, ln = jnp.ones(C, jnp.float32), (params.ln_scale, params.ln_bias)
    with pytest.raises(ValueError, match=r"k: expected bfloat16\[1, 32, 1, 64\], got float32\[1, 32, 1, 64\]"):
        ttt_kernels.ttt_linear(q, k.astype(jnp.float32), v, lr, lr, scale, *weights, *ln)
    with pytest.raises(ValueError, match="a multiple of 16, got 15"):
        ttt_kernels.ttt_linear(*(x[:, :15] for x in (q, k, v, lr, lr)), scale, *weights, *ln)
    with pytest.raises(ValueError, match=r"token_scale: expected C entries, C in \(16, 64\), got 8"):
        ttt_kernels.ttt_linear(q, k, v, lr, lr, scale[:8], *weights, *ln)
    with pytest.raises(ValueError, match="q: expected bfloat16 or float32, got float16"):
        ttt_kernels.ttt_linear(q.astype(jnp.float16), k, v, lr, lr, scale, *weights, *ln)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    of_wide = jax.grad(lambda *xs: ttt_kernels.ttt_linear(*xs, lr, lr, scale, *weights, *ln)[0].sum())
    with pytest.raises(NotImplementedError, match="q: there are no derivatives in float32; cast q, k and v"):
        jax.eval_shape(of_wide, *wide)
    wide_ln = [jnp.tile(x, (1, 2)) for x in ln]
    with pytest.raises(ValueError, match=r"w1: expected float32\[1, 1, 128, 128\], got float32\[1, 1, 64, 64\]"):
        ttt_kernels.ttt_linear(*make_tokens(32, dim=128)[:3], lr, lr, scale, *weights, *wide_ln)
    with pytest.raises(ValueError, match="q: expected head dim 64 in bfloat16, got 128"):
        ttt_kernels.ttt_mlp(*make_tokens(32, dim=128)[:3], lr, lr, scale, *weights, *weights, *ln)
    with pytest.raises(ValueError, match="q: expected head dim 64 or 128 in bfloat16, got 32"):
        ttt_kernels.ttt_linear(*make_tokens(32, dim=32)[:3], lr, lr, scale, *weights, *ln)
    with pytest.raises(ValueError, match=r"w1: expected float32\[1, 1, 64, 256\], got float32\[1, 1, 64, 64\]"):
        ttt_kernels.ttt_mlp(q, k, v, lr, lr, scale, *weights, *weights, *ln)


@without_gpu
def test_too_few_threads_are_an_error_where_blocks_would_wait_forever(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(jax, "devices", lambda backend: [None])
    with ttt_kernels.interpreted(), pytest.raises(RuntimeError, match="needs 6 threads, it has 2: set XLA_FLAGS"):
        MLP[0].run("pallas", make_params(kind=ttt_jax.TTTMLPParams), make_tokens(16))
