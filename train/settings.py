"""Typed settings: pydantic dataclasses, built from plain mappings with errors a user can act on, and their JSON schema."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, core_schema

from layalign.spelling import did_you_mean, did_you_mean_or_known

# What every settings dataclass is made with, beside kw_only and slots.
CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

# Strict, for `steps: true` and `steps: 1.5` are mistakes. A whole number is taken where a number is asked for.
Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Switch = Annotated[bool, Field(strict=True)]

PathText = Annotated[str, BeforeValidator(lambda path: os.fspath(path) if isinstance(path, os.PathLike) else path)]

Built = TypeVar("Built")

_MAPPING, _WHOLE, _NUMBER, _SWITCH = "a mapping of settings", "a whole number", "a number", "true or false"
# What pydantic's kinds of errors are in the words of a recipe.
_EXPECTED = {
    "dataclass_type": _MAPPING,
    "dict_type": _MAPPING,
    "list_type": "a list",
    "string_type": "a text",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "a finite number",
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def one_of(known: Sequence[str]) -> Any:
    """For a key of a mapping that is one of some texts."""

    def check(key: str) -> str:
        check_key(key, known)
        return key

    return GetPydanticSchema(
        lambda source, handler: core_schema.no_info_after_validator_function(check, handler(source)),
        lambda schema, handler: {"enum": list(known), "type": "string"},
    )


def one_or_several(*kinds: type, of: Any) -> BeforeValidator:
    """For a list of which one item need not stand in a list.

    Args:
        kinds: what an item may be given as.
        of: what it is.
    """
    schema = of | list[of]
    return BeforeValidator(lambda given: [given] if isinstance(given, kinds) else given, json_schema_input_type=schema)


# What transformers' TrainingArguments call what has another name here.
_TRAINERS = {
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "bf16": "precision",
    "fp16": "precision",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_ratio",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "logging_steps": "log_steps",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "save_strategy": "save_steps",
    "save_total_limit": "keep_checkpoints",
    "load_best_model_at_end": "keep",
    "group_by_length": "length_grouped",
    "output_dir": "output",
    "run_name": "output",
}


@dataclass(config=CONFIG, kw_only=True, slots=True)
class Settings:
    """What every settings dataclass inherits: an unknown key is refused with the nearest known one."""

    # {where: settings} that keys which are none of these may belong in.
    _inner: ClassVar[Mapping[str, type]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, values: Any) -> Any:
        given = values.kwargs if isinstance(values, ArgsKwargs) else values
        known = [field.name for field in fields(cls)]
        for key in (given or {}) if isinstance(given, dict) or given is None else {}:
            own = _TRAINERS.get(key, key)
            if key not in known and own not in known:
                for place, inner in cls._inner.items():
                    if own in (field.name for field in fields(inner)):
                        raise ValueError(f"{key}: unknown setting here; it belongs in a stage, as {place}.{own}")
            check_key(key, known)
        return values


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4, without a point, for a text; here it is a number, as in YAML 1.2. PyYAML takes the last of equal keys; here
    they are refused, as in YAML 1.2."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Raises yaml.composer.ComposerError for a key that stands twice."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    problem = f"found the key {key.value!r} twice"
                    raise yaml.composer.ComposerError(
                        "while reading a mapping", node.start_mark, problem, key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: a text that is none.
    """
    try:
        return _apart(yaml.load(text, Loader=_Loader))  # noqa: S506, it is a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("too deep, or an alias stands inside of what it stands for") from None


def _apart(value: Any) -> Any:
    """A value without parts in common: what aliases (*name) stand for is one object, and an override of one would be all theirs."""
    if isinstance(value, dict):
        return {key: _apart(inner) for key, inner in value.items()}
    return [_apart(inner) for inner in value] if isinstance(value, list) else value


def build(cls: type[Built], values: Any) -> Built:
    """Make the settings dataclass `cls` from a mapping of its field names.

    Raises:
        ValueError: an unknown key (the nearest known one is suggested), missing keys, wrong values: a line each, which begins
            with the key, dotted where settings are nested.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        unknown = [mistake["loc"][:-1] for mistake in found if "[key]" in mistake["loc"]]
        # What stands below a key that is not allowed is not looked at.
        below = [any(mistake["loc"][: len(key)] == key for key in unknown) for mistake in found]
        lines = [
            _line(mistake) for mistake, skip in zip(found, below, strict=True) if not skip or "[key]" in mistake["loc"]
        ]
        raise ValueError("\n  ".join(lines)) from None


def check_key(key: Any, known: Sequence[str]) -> None:
    """Refuse a key that is not among the known ones.

    Raises:
        ValueError: with the nearest of them suggested.
    """
    if key in known:
        return
    if (own := _TRAINERS.get(key)) in known:
        raise ValueError(f"{key}: unknown setting; it is {own} here")
    raise ValueError(f"{key}: unknown setting{did_you_mean_or_known(key, known)}")


def check_keys(values: Iterable[str], known: Sequence[str], name: str) -> None:
    """Refuse keys below `name` that are not among the known ones.

    Raises:
        ValueError: as `check_key`, with `name` in front.
    """
    for key in values:
        try:
            check_key(key, list(known))
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None


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
        value = read_yaml(text)
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


def _line(mistake: Any) -> str:
    """One of pydantic's errors as a line: where: what."""
    kind, value, context = mistake["type"], mistake["input"], mistake.get("ctx", {})
    of_key = "[key]" in mistake["loc"]  # which then says itself what it is
    where = ".".join(map(str, mistake["loc"][:-2] if of_key else mistake["loc"]))
    if kind == "value_error":
        text = str(context["error"])
        # What a settings class says of itself begins with a key.
        return f"{where}.{text}" if where and re.match(r"[\w.]+: ", text) else f"{where}: {text}" if where else text
    if kind == "missing":
        text = "required, but not given"
    elif kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        text = f"must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}"
    elif kind in _EXPECTED:
        text = f"expected {_EXPECTED[kind]}, got {describe(value)}"
    elif kind in _LIMITS:
        word, limit = _LIMITS[kind]
        text = f"must be {word} {context[limit]:g}, got {value}"
    else:
        text = f"{mistake['msg']}, got {describe(value)}"
    return f"{where}: {text}" if where else text


def _place(values, key, assignment):
    if isinstance(values, dict):
        return key
    if isinstance(values, list) and key.isdecimal() and int(key) < len(values):
        return int(key)
    inside = f"a list of {len(values)}" if isinstance(values, list) else f"the value {values!r}"
    raise ValueError(f"override {assignment!r}: no {key!r} inside {inside}")
