"""`sums.total` as 128 threads compute it, in NumPy: the interpreter leaves it out."""

import types

import numpy as np
import pytest
from jaxlib.mlir import ir
from ttt_kernels import sums

THREADS = np.arange(128)
WARPS, LANES = THREADS // 32, THREADS % 32


class Scratch:
    """SMEM. What two threads store to the same place must be the same."""

    def __init__(self, size: int):
        self.values = np.full(size, np.nan, np.float32)

    def store(self, value: np.ndarray, _, index: list[np.ndarray]) -> None:
        self.values[index[0]] = value[:, 0]
        np.testing.assert_array_equal(self.values[index[0]], value[:, 0])

    def load(self, kind, _, index: list[np.ndarray]) -> np.ndarray:
        return self.values[index[0][:, None] + np.arange(ir.VectorType(kind).shape[0])]


@pytest.fixture
def threads(monkeypatch) -> Scratch:
    """Operations of MLIR on arrays whose first axis is the thread."""
    scratch = Scratch(64 * 4)

    def exchanged(value: np.ndarray, distance: int) -> np.ndarray:
        return value[WARPS * 32 + (LANES ^ distance)]

    arith = types.SimpleNamespace(
        **{name: np.add for name in ("addf", "addi")},
        **{"muli": np.multiply, "remui": np.remainder, "divui": np.floor_divide, "andi": np.bitwise_and},
        **{"select": np.where, "index_cast": lambda kind, value: value},
        CmpIPredicate=types.SimpleNamespace(ne=np.not_equal),
        cmpi=lambda predicate, a, b: predicate(a, b),
    )
    vector = types.SimpleNamespace(
        broadcast=lambda kind, value: value[:, None],
        from_elements=lambda kind, values: np.stack(values, axis=1),
        store=scratch.store,
        load=scratch.load,
    )
    utils = types.SimpleNamespace(thread_idx=lambda: THREADS, shfl_bfly=exchanged)
    mgpu = types.SimpleNamespace(
        c=lambda value, kind: value,
        utils=utils,
        warpgroup_barrier=lambda: None,
        FragmentedArray=lambda *, _registers, **others: _registers,
    )
    for name, module in (("arith", arith), ("vector", vector), ("mgpu", mgpu)):
        monkeypatch.setattr(sums, name, module)
    monkeypatch.setattr(sums.hopper, "element", lambda value, i: value[:, i])
    return scratch


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("columns", [8, 16, 32, 64])
def test_each_thread_has_the_sums_of_its_columns(threads, rows, columns):
    x = np.random.default_rng(0).integers(-99, 99, (rows, columns)).astype(np.float32)  # sums in any order are exact
    # The layout of products: eight rows further is the other of two, 8 columns further the next register.
    row, column = 16 * WARPS + LANES // 4, 2 * (LANES % 4)
    registers = np.empty((rows // 64, columns // 8, 2), object)
    for at in np.ndindex(registers.shape):
        block, eight, lower = at
        registers[at] = x[(64 * block + row + 8 * lower)[:, None], (8 * eight + column)[:, None] + np.arange(2)]

    layout = types.SimpleNamespace(registers_shape=lambda shape: (shape[0] // 8,))
    layout.reduce = lambda axes: layout
    of_rows = types.SimpleNamespace(shape=x.shape, registers=registers, layout=layout)
    with ir.Context(), ir.Location.unknown():
        found = sums._total(None, of_rows, threads)

    for eight, pair in enumerate(found):
        np.testing.assert_array_equal(pair, x.sum(axis=0)[(8 * eight + column)[:, None] + np.arange(2)])
