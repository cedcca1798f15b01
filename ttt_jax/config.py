"""Building self-validating dataclasses from plain mappings, with errors that name the field.

A mapping comes from a `ConfigDict`, from JSON or from a checkpoint; the dataclass is all that the library sees.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any


def from_mapping[T](cls: type[T], mapping: Mapping[str, Any], path: str = "config") -> T:
    """Builds dataclass `cls` from `mapping`, nested dataclasses included.

    Missing keys take the dataclass' defaults. Ints are accepted for floats, lists for tuples, mappings for dataclasses.
    Where one field's value decides of which type others are, the class method `field_types(mapping)` of `cls` gives
    those types by field name.

    Args:
        cls: A dataclass whose annotations are made of bool, int, float, str, None, Literal, tuple, unions
            and dataclasses.
        mapping: Field name -> value.
        path: Dotted name of `mapping`, used in errors.

    Raises:
        ValueError: An unknown key (the nearest known one is suggested), a missing one, or a value that the dataclass'
            own validation refuses; each names the full dotted path.
        TypeError: A value of a wrong type; names the path, the expected type and what came.
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{path}: expected a mapping of {cls.__name__}'s fields, got {mapping!r}.")
    hints = typing.get_type_hints(cls) | getattr(cls, "field_types", lambda mapping: {})(mapping)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # pyright: ignore[reportArgumentType]
    for key in mapping:
        if key not in fields:
            raise ValueError(f"{path}.{key}: {cls.__name__} has no such field.{_suggestion(str(key), fields)}")
    missing = [name for name, field in fields.items() if name not in mapping and _is_required(field)]
    if missing:
        raise ValueError(f"{path}.{missing[0]}: missing; {cls.__name__} has no default for it.")
    values = {key: _convert(hints[key], value, f"{path}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _suggestion(key: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    return f" Did you mean `{close[0]}`?" if close else f" Its fields: {', '.join(names)}."


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, path)
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise ValueError(f"{path}: expected one of {list(typing.get_args(hint))}, got {value!r}.")
    if origin is tuple and isinstance(value, list | tuple):
        return _convert_tuple(hint, value, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError(f"{path}: expected {_describe(hint)}, got {value!r} ({type(value).__name__}).")


def _convert_union(hint: Any, value: Any, path: str) -> Any:
    """The option whose kind fits; an error inside the only fitting option is that option's error."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if value is None and len(options) < len(typing.get_args(hint)):
        return None
    if len(options) == 1:
        return _convert(options[0], value, path)
    for option in options:
        try:
            return _convert(option, value, path)
        except (TypeError, ValueError):
            continue
    raise TypeError(f"{path}: expected {_describe(hint)}, got {value!r} ({type(value).__name__}).")


def _convert_tuple(hint: Any, value: list | tuple, path: str) -> tuple:
    elements = typing.get_args(hint)
    if len(elements) == 2 and elements[1] is Ellipsis:
        elements = (elements[0],) * len(value)
    if len(elements) != len(value):
        raise ValueError(f"{path}: expected {len(elements)} values, got {len(value)}: {value!r}.")
    numbered = enumerate(zip(elements, value, strict=True))
    return tuple(_convert(element, item, f"{path}[{i}]") for i, (element, item) in numbered)


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
