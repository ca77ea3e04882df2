"""Typed settings: dataclasses that check and convert their values, built from plain mappings with errors a user can act
on.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def build(cls: type[Settings], values: Any) -> Settings:
    """Make the settings dataclass `cls` from a mapping of its field names.

    Raises:
        ValueError: not a mapping, an unknown key (the nearest known one is suggested), a missing key, or a wrong value.
            The message begins with the key, dotted where settings are nested.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected a mapping of settings, got {describe(values)}")
    fields = dataclasses.fields(cls)
    for key in values:
        check_key(key, [field.name for field in fields])
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"{field.name}: required, but not given")
    return cls(**values)


def convert_fields(settings: Any) -> None:
    """Replace every field of a settings dataclass by its value converted to the annotated type.

    Raises:
        ValueError: a value of another type.
    """
    for name, annotation in typing.get_type_hints(type(settings)).items():
        setattr(settings, name, convert(getattr(settings, name), annotation, name))


def convert(value: Any, annotation: Any, name: str) -> Any:
    """Convert one value to an annotation made of bool, int, float, str, dict, list[...], Literal[...], dataclasses and
    unions.

    Numbers written as text are read ("1e-4": YAML takes it for a string). An integer is taken as a float, never the
    other way.

    Raises:
        ValueError: with `name` in front.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(annotation), name)
    if origin is typing.Literal:
        if value not in typing.get_args(annotation):
            raise ValueError(
                f"{name}: must be one of {_choices(annotation)}, got {value!r}{_suggestion(value, annotation)}"
            )
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}: expected a list, got {describe(value)}")
        return [convert(item, typing.get_args(annotation)[0], f"{name}.{index}") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected a mapping, got {describe(value)}")
        kind = typing.get_args(annotation)[1]
        return {key: convert(item, kind, f"{name}.{key}") for key, item in value.items()}
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):
            return value
        try:
            return build(annotation, value)
        except ValueError as error:
            raise ValueError(f"{name}.{error}" if isinstance(value, dict) else f"{name}: {error}") from None
    if annotation is typing.Any:
        return value
    return _convert_scalar(value, annotation, name)


def check_key(key: Any, known: Sequence[str]) -> None:
    """Refuse a key that is not among the known ones.

    Raises:
        ValueError: with the nearest of them suggested.
    """
    if key in known:
        return
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
    raise ValueError(f"{key}: unknown setting{hint}")


def check_range(settings: Any, **limits: tuple[float | None, float | None]) -> None:
    """Check numbers.

    Args:
        settings: object whose attributes they are; one that is None is not checked.
        limits: name=(lowest, highest), either may be None.

    Raises:
        ValueError: a number outside, or NaN.
    """
    for name, (lowest, highest) in limits.items():
        value = getattr(settings, name)
        if value is None:
            continue
        # NaN, for which every comparison is false, is not inside either.
        inside = (lowest is None or value >= lowest) and (highest is None or value <= highest)
        if not inside:
            bounds = " and ".join(
                f"{word} {limit}" for word, limit in (("at least", lowest), ("at most", highest)) if limit is not None
            )
            raise ValueError(f"{name}: must be {bounds}, got {value}")


def override(values: Any, assignment: str) -> None:
    """Set one value inside nested mappings and lists: "stages.task.data.0.limit=10". Missing mappings are made.

    Raises:
        ValueError: no key=value, a value that is no YAML, or a key inside something that has none.
    """
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"override {assignment!r}: expected key=value")
    *parents, last = key.strip().split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {assignment!r}: the value is not readable as YAML: {error}") from error
    for parent in parents:
        if isinstance(values, dict):
            values.setdefault(parent, {})
        values = values[_place(values, parent, assignment)]
    values[_place(values, last, assignment)] = value


def describe(value: Any) -> str:
    """A value for an error message: its kind and, if short, itself."""
    kinds = {dict: "a mapping", list: "a list", str: "the text", type(None): "nothing", bool: "the boolean"}
    kind = kinds.get(type(value), type(value).__name__)
    if value is None or isinstance(value, (dict, list)):
        return kind
    text = repr(value)
    return f"{kind} {text if len(text) <= 60 else text[:57] + '...'}"


def _convert_union(value, members, name):
    if value is None and type(None) in members:
        return None
    members = [member for member in members if member is not type(None)]
    failure = None
    for member in members:
        try:
            return convert(value, member, name)
        except ValueError as error:
            failure = error
    raise failure


def _convert_scalar(value, kind, name):
    converted = os.fspath(value) if kind is str and isinstance(value, os.PathLike) else value
    if kind in (int, float) and isinstance(value, str):
        try:
            converted = kind(value)
        except ValueError:
            converted = value
    if kind is float and type(converted) is int:
        converted = float(converted)
    # bool is a subclass of int, so `is` and not isinstance: `steps: true` is a mistake.
    if type(converted) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise ValueError(f"{name}: expected {wanted}, got {describe(value)}")
    return converted


def _choices(annotation):
    return ", ".join(str(choice) for choice in typing.get_args(annotation))


def _suggestion(value, annotation):
    close = difflib.get_close_matches(str(value), [str(choice) for choice in typing.get_args(annotation)], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _place(values, key, assignment):
    if isinstance(values, dict):
        return key
    if isinstance(values, list) and key.isdecimal() and int(key) < len(values):
        return int(key)
    inside = f"a list of {len(values)}" if isinstance(values, list) else f"the value {values!r}"
    raise ValueError(f"override {assignment!r}: no {key!r} inside {inside}")
