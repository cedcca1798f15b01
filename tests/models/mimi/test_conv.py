import numpy as np
import pytest

from ttt_jax.models.mimi.conv import causal_conv, depthwise_transposed_conv, transposed_conv

CLOSE = {"atol": 1e-5}  # float32 sums of a few dozen products


@pytest.mark.parametrize(("width", "stride", "dilation"), [(7, 1, 1), (3, 1, 4), (1, 1, 1), (6, 3, 1), (2, 1, 1)])
def test_convolution_is_its_definition_wherever_it_is_cut(width, stride, dilation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 3)).astype(np.float32)
    kernel = rng.normal(size=(width, 3, 5)).astype(np.float32)
    reach = (width - 1) * dilation + 1 - stride
    padded = np.pad(x, ((0, 0), (reach, 0), (0, 0)))
    taps = [padded[:, i * dilation :][:, : 12 - stride + 1 : stride] for i in range(width)]
    expected = np.einsum("kbtc,kcf->btf", taps, kernel)
    whole, past = causal_conv(x, kernel, stride=stride, dilation=dilation)
    np.testing.assert_allclose(whole, expected, **CLOSE)
    parts, carried = [], None
    for start, stop in ((0, 3), (3, 3), (3, 9), (9, 12)):
        y, carried = causal_conv(x[:, start:stop], kernel, carried, stride=stride, dilation=dilation)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, **CLOSE)
    assert (carried is None) == (past is None) == (reach == 0)
    if reach:
        np.testing.assert_array_equal(carried, padded[:, -reach:])


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("depthwise", [False, True])
def test_transposed_convolution_is_its_definition_wherever_it_is_cut(stride, depthwise):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 3)).astype(np.float32)
    kernel = rng.normal(size=(2 * stride, 1, 3) if depthwise else (3, 5, 2 * stride)).astype(np.float32)
    function = depthwise_transposed_conv if depthwise else transposed_conv
    spread = "btc,kc->btkc" if depthwise else "btc,cfk->btkf"
    spread = np.einsum(spread, x, kernel[:, 0] if depthwise else kernel)
    expected = np.zeros((2, 8 * stride, spread.shape[-1]), np.float32)
    for t in range(7):
        expected[:, t * stride : (t + 2) * stride] += spread[:, t]
    whole, _ = function(x, kernel)
    np.testing.assert_allclose(whole, expected[:, : 7 * stride], **CLOSE)
    parts, tail = [], None
    for start, stop in ((0, 1), (1, 1), (1, 5), (5, 7)):
        y, tail = function(x[:, start:stop], kernel, tail)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, **CLOSE)
