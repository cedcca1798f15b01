import dataclasses
from typing import Literal

import pytest

from ttt_jax.config import from_mapping


@dataclasses.dataclass(frozen=True)
class Inner:
    kind: Literal["linear", "mlp"] = "linear"
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        if len(self.layers) > 3:
            raise ValueError(f"layers: expected at most 3, got {len(self.layers)}")


@dataclasses.dataclass(frozen=True)
class Outer:
    width: int
    rate: float = 0.5
    name: str = "a"
    inner: Inner | None = None
    flag: bool = False
    pair: tuple[int, float] = (1, 2.0)
    either: int | str = 0


def test_nested_values_are_converted():
    made = from_mapping(
        Outer, {"width": 3, "rate": 1, "inner": {"kind": "mlp", "layers": [1, 2]}, "pair": [4, 5], "either": "x"}
    )
    assert made == Outer(3, 1.0, inner=Inner("mlp", (1, 2)), pair=(4, 5.0), either="x")
    assert isinstance(made.rate, float)
    assert from_mapping(Outer, dataclasses.asdict(made)) == made


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ({"width": 1, "inner": {"layer": (1,)}}, ValueError, r"config\.inner\.layer: .* Did you mean `layers`\?"),
        ({"width": 1, "zzz": 1}, ValueError, r"config\.zzz: .* Its fields: width, rate"),
        ({}, ValueError, r"config\.width: missing"),
        ({"width": "3"}, TypeError, r"config\.width: expected int, got '3' \(str\)"),
        ({"width": True}, TypeError, r"config\.width: expected int, got True"),
        ({"width": 1.0}, TypeError, r"config\.width: expected int"),
        ({"width": 1, "flag": 1}, TypeError, r"config\.flag: expected bool"),
        ({"width": 1, "inner": {"kind": "conv"}}, ValueError, r"config\.inner\.kind: .*'linear', 'mlp'.*'conv'"),
        ({"width": 1, "inner": {"layers": (1, "2")}}, TypeError, r"config\.inner\.layers\[1\]: expected int"),
        ({"width": 1, "inner": {"layers": (1, 2, 3, 4)}}, ValueError, r"config\.inner: layers: expected at most 3"),
        ({"width": 1, "pair": (1,)}, ValueError, r"config\.pair: expected 2 values, got 1"),
        ({"width": 1, "either": 1.5}, TypeError, r"config\.either: expected int \| str"),
        ({"width": 1, "inner": 5}, TypeError, r"config\.inner: expected a mapping of Inner's fields, got 5"),
    ],
)
def test_errors_name_the_path_and_what_came(mapping, error, message):
    with pytest.raises(error, match=message):
        from_mapping(Outer, mapping)
