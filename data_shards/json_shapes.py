"""The shape of a JSON value that this program wrote, verified where it is read.

    LOCK = {"pid": Whole(1, 2**31), "host": str, "released": bool, "since?": float}
    read_record("runs/demo/lock.json", LOCK)["pid"]     # an int, or an error that names file, key, value and remedy

A shape is one of these:

    str, bool, dict, list       a value of this type
    int                         an integer of 64 bits; true and false are none
    float                       a finite number, also an integer
    Whole(least, most)          an integer between them
    Between(least, most)        a number between them
    Text(pattern, example)      a text that matches a regular expression as a whole
    NUMBER                      a number that may be NaN or infinite, as of a metric
    ANY, None                   any value; null
    {"key": s, "key?": s}       an object with these keys; those with ? may be absent, others are not looked at
    {str: s}, [s]               an object of any keys, a list, of such values
    (s, s)                      one of these
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from data_shards.strict_json import parse_json, read_json_file
from mmcot.errors import InputError

_BITS = 1 << 63


@dataclasses.dataclass(frozen=True)
class Whole:
    """An integer from ``least`` to ``most``."""

    least: int = 0
    most: int = _BITS - 1

    def __str__(self) -> str:
        until = "on" if self.most == _BITS - 1 else f"to {self.most:,}"
        return f"an integer from {self.least:,} {until}"


@dataclasses.dataclass(frozen=True)
class Between:
    """A number from ``least`` to ``most``."""

    least: float
    most: float

    def __str__(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that matches ``pattern`` as a whole, such as ``example``."""

    pattern: str
    example: str

    def __str__(self) -> str:
        return f"a text such as {self.example}"


@dataclasses.dataclass(frozen=True)
class _Named:
    name: str

    def __str__(self) -> str:
        return self.name


ANY = _Named("any value")
NUMBER = _Named("a number")
Shape = Any

_NAMES: dict[Any, str] = {str: "a text", bool: "true or false", dict: "an object", list: "a list", None: "null"}
_NAMES |= {int: "an integer", float: "a finite number"}


def read_record(path: str | Path, shape: Shape, *, remedy: str = "restore or delete the file") -> Any:
    """Read a JSON file and verify its shape.

    Raises:
        InputError: it is not valid JSON, or has another shape; the message names the file and ends with the remedy.
    """
    value = read_json_file(path, finite=False, remedy=remedy)
    if (fault := fault_of_shape(value, shape)) is not None:
        raise InputError(f"{fault}; {remedy}").at(path)
    return value


def parse_record(text: str | bytes, shape: Shape, *, file: str | Path, line: int, remedy: str) -> Any:
    """Parse a line of a file of JSON values and verify its shape.

    Raises:
        InputError: as ``read_record``, with the line.
    """
    value = parse_json(text, file, line=line, finite=False, remedy=remedy)
    if (fault := fault_of_shape(value, shape)) is not None:
        raise InputError(f"{fault}; {remedy}").at(file, line=line)
    return value


def fault_of_shape(value: Any, shape: Shape, place: str = "") -> str | None:
    """What of a value has another shape, in words; None where all is as expected."""
    if isinstance(shape, tuple):
        faults = [fault_of_shape(value, each, place) for each in shape]
        return None if None in faults else _wrong(value, shape, place)
    if isinstance(shape, dict):
        return _fault_of_object(value, shape, place)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _wrong(value, list, place)
        parts = enumerate(value, start=1)
        faults = (fault_of_shape(part, shape[0], _within(place, f"entry {number}")) for number, part in parts)
        return next((fault for fault in faults if fault is not None), None)
    return None if _fits(value, shape) else _wrong(value, shape, place)


def _fault_of_object(value: Any, shape: dict[Any, Any], place: str) -> str | None:
    if not isinstance(value, dict):
        return _wrong(value, dict, place)
    if str in shape:
        parts = [(key, part, shape[str]) for key, part in value.items()]
    else:
        wanted = {name.removesuffix("?"): (each, name.endswith("?")) for name, each in shape.items()}
        for name, (each, may_lack) in wanted.items():
            if name not in value and not may_lack:
                return f"{_within(place, f'the key {name!r}')} is missing, expected {_describe(each)}"
        parts = [(name, value[name], each) for name, (each, _) in wanted.items() if name in value]
    for key, part, each in parts:
        if (fault := fault_of_shape(part, each, _within(place, f"the key {key!r}"))) is not None:
            return fault
    return None


def _fits(value: Any, shape: Any) -> bool:
    kind = type(value)
    if shape is ANY:
        return True
    if shape is None:
        return value is None
    if shape is NUMBER:
        return kind is float or (kind is int and abs(value) < _BITS)
    if shape is float:
        return (kind is float and math.isfinite(value)) or (kind is int and abs(value) < _BITS)
    if shape is int:
        return kind is int and abs(value) < _BITS
    if isinstance(shape, Whole):
        return kind is int and shape.least <= value <= shape.most
    if isinstance(shape, Between):
        return kind in (int, float) and shape.least <= value <= shape.most
    if isinstance(shape, Text):
        return kind is str and re.fullmatch(shape.pattern, value, re.DOTALL) is not None
    return kind is shape


def _within(place: str, name: str) -> str:
    return f"{place}, {name}" if place else name


def _wrong(value: Any, shape: Shape, place: str) -> str:
    return f"{place or 'it'} is {_shown(value)}, expected {_describe(shape)}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= _BITS:
        return "an integer of more than 64 bits"
    if isinstance(value, (dict, list)) and value:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _describe(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_describe, shape))
    if isinstance(shape, (dict, list)):
        return _NAMES[type(shape)]
    return _NAMES.get(shape) or str(shape)
