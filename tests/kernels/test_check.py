"""What `make kernels-check` holds the kernels to; it compiles them itself where JAX's CUDA compiler is installed."""

import json

import pytest
from ttt_kernels import check

SPILLS = {f"mlp_backward_{mask}_c16": 704 for mask in ("causal", "full")}
SPILLS |= {f"mlp_forward_{mask}_c{c}": 512 for mask in ("causal", "full") for c in (16, 64)}
SPILLS |= {f"mlp_backward_{mask}_c64": 832 for mask in ("causal", "full")}
SPILLS |= {f"linear_backward_{mask}_c{c}": 224 for mask in ("causal", "full") for c in (16, 64)}
SPILLS |= {f"linear_backward_{mask}_c16_d128": 128 for mask in ("causal", "full")}
SPILLS |= {f"linear_forward_{mask}_c64_d128": 128 for mask in ("causal", "full")} | {"linear_step_d128": 128}
SPILLS |= {f"mlp_forward_{mask}_c{c}_float32": 128 for mask in ("causal", "full") for c in (16, 64)}
"""Kernels that may spill, and how many bytes a thread; kernels/README.md estimates what each costs."""


def test_the_table_has_every_kernel_and_no_other_spill():
    table = json.loads(check.TABLE.read_text())
    assert table.keys() == check.kernels().keys()
    for name, found in table.items():
        assert max(found["spill_store_bytes"], found["spill_load_bytes"]) <= SPILLS.get(name, 0), name
        taken = (found["registers"], found["shared_memory_bytes"], found["threads"])
        assert found["ctas_per_sm"] == check.ctas_per_sm(*taken) > 0, name


def test_every_difference_is_named():
    table = {"a": {"registers": 186, "ctas_per_sm": 2}, "b": {"registers": 255}}
    assert check.differences(table, table) == []
    found = {"a": {"registers": 190, "ctas_per_sm": 2}, "c": {"registers": 1}}
    assert check.differences(found, table) == [
        "a: registers expected 186, got 190",
        "c: registers expected None, got 1",
        "b: in the table, but no kernel",
    ]


@pytest.mark.parametrize(
    ("registers", "shared_memory", "threads", "expected"),
    [
        (255, 0, 128, 2),
        (256, 1000, 128, 2),
        (168, 0, 128, 3),
        (64, 115_000, 128, 2),
        (64, 231_000, 128, 1),
        (128, 113_664, 128, 2),
        (128, 116_000, 128, 1),
        (128, 1000, 512, 1),
        (64, 1000, 512, 2),
    ],
)
def test_ctas_per_sm(registers, shared_memory, threads, expected):
    assert check.ctas_per_sm(registers, shared_memory, threads) == expected


def test_a_kernel_that_was_not_compiled_is_an_error(monkeypatch):
    monkeypatch.setattr(check, "_directory_of_ptxas", lambda: "/nowhere")
    with pytest.raises(RuntimeError, match="linear_forward_c99 was not compiled"):
        check.resources(["linear_forward_c99"])
