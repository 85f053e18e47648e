"""The type of a setting by its name, and values as they are typed: ``--set section.key=value``.

    kinds_of("data.path")                        # (str, NoneType)
    typed_value("data.path", "my set #1/in.csv") # as it stands
    typed_value("run.seed", "1_000")             # 1000
    typed_value("data.splits", "{train: mini}")  # {"train": "mini"}

A text is taken as it is typed, but for one pair of quotes around all of it. ``null`` without quotes is none. Numbers
are those of YAML. A mapping begins with ``{``, a list with ``[``, both as in YAML; a list without is split at commas.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic

from data_shards.credentials import hide_credentials
from launcher.config.settings import Settings, SettingsError
from launcher.config.strict_yaml import parse_scalar, parse_yaml

_NULLS = ("null", "Null", "NULL")
_QUOTED = re.compile(r"'((?:[^']|'')*)'|\"([^\"]*)\"", re.DOTALL)
_LEADING_ZERO = re.compile(r"([-+]?)0+([0-9]+)")


def kinds_of(name: str) -> tuple[Any, ...] | None:
    """Return the types that a setting may have, such as ``(str, NoneType)``; None where the name is unknown.

    A part of a mapping has a name too: ``cluster.env.NCCL_DEBUG``. The choices of a ``Literal`` are one type.
    """
    return _kinds_of(tuple(name.split(".")))


@functools.cache
def _kinds_of(parts: tuple[str, ...]) -> tuple[Any, ...] | None:
    kinds: tuple[Any, ...] = (Settings,)
    for part in parts:
        inner = [found for kind in kinds if (found := _part(kind, part))]
        if not inner:
            return None
        kinds = inner[0]
    return kinds


def _part(kind: Any, part: str) -> tuple[Any, ...] | None:
    if is_section(kind):
        field = kind.model_fields.get(part)
        return _kinds(field.annotation) if field else None
    if kind is Any:
        return (Any,)
    return _kinds(get_args(kind)[1]) if get_origin(kind) is dict else None


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (types.UnionType, typing.Union):
        return tuple(kind for each in get_args(annotation) for kind in _kinds(each))
    return (annotation,)


def is_section(kind: Any) -> bool:
    """Whether a type is a section of settings."""
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def takes_text(kinds: tuple[Any, ...]) -> bool:
    """Whether a setting of these types may be any text, or one of several."""
    return any(kind is str or any(isinstance(each, str) for each in choices_of(kind)) for kind in kinds)


def takes_numbers_alone(kinds: tuple[Any, ...]) -> bool:
    """Whether a setting of these types is a number, and never true or false."""
    numbers = [kind for kind in kinds if kind in (int, float) or int in map(type, choices_of(kind))]
    return bool(numbers) and bool not in kinds and Any not in kinds


def is_optional(kinds: tuple[Any, ...]) -> bool:
    """Whether a setting of these types may be null."""
    return type(None) in kinds


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The choices of a ``Literal``; none of any other type."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def typed_value(name: str, text: str) -> Any:
    """Return the value of a setting that was typed as a text.

    Raises:
        SettingsError: it is no valid value of the setting's type.
    """
    kinds = kinds_of(name)
    if kinds is None:
        return text
    stripped, plain = text.strip(), _without_quotes(text)
    if _has_structure(kinds, stripped):
        return parse_yaml(stripped, f"setting {name}", with_line=False)
    if stripped in _NULLS:
        return None
    items = next((get_args(kind)[0] for kind in kinds if get_origin(kind) in (list, tuple)), None)
    if items is not None:
        if any(plain.strip() in choices_of(kind) for kind in kinds):
            return plain.strip()
        return [each if items is str else _number(name, each) for each in map(str.strip, plain.split(",")) if each]
    if str in kinds:
        return plain
    if Any in kinds:
        return plain if plain != text else _scalar(name, stripped)
    if (takes_text(kinds) and not takes_numbers_alone(kinds)) or bool in kinds:
        return plain.strip()
    return _number(name, plain.strip())


def _has_structure(kinds: tuple[Any, ...], text: str) -> bool:
    """Whether a text begins like a mapping or list, of a setting that may be one."""
    origins = [dict if is_section(kind) else get_origin(kind) or kind for kind in kinds]
    may_be_mapping = dict in origins or Any in origins
    may_be_list = list in origins or tuple in origins or Any in origins
    return (text.startswith("{") and may_be_mapping) or (text.startswith("[") and may_be_list)


def _without_quotes(text: str) -> str:
    found = _QUOTED.fullmatch(text.strip())
    if not found:
        return text
    return found[2] if found[1] is None else found[1].replace("''", "'")


def _number(name: str, text: str) -> Any:
    """The number that a text is, or else the text, which validation refuses."""
    if zero := _LEADING_ZERO.fullmatch(text):
        raise SettingsError(f"setting {name} = {text}: it begins with a zero; write {zero[1]}{zero[2]}")
    value = _scalar(name, text)
    return text if isinstance(value, bool) else value


def _scalar(name: str, text: str) -> Any:
    try:
        return parse_scalar(text)
    except SettingsError as error:
        raise SettingsError(f"setting {name}: {hide_credentials(str(error))}") from None
