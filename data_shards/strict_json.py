"""JSON that people give us: what Python's parser accepts and would lose or alter is refused.

    parse_json('{"qid": "a1", "answer": 0}', "in.jsonl, line 3")
    read_json_file("problems.json")         # in UTF-8 or, with its mark, in UTF-16

Refused are keys that occur twice in an object (the first would be lost), NaN and infinities, and halves of UTF-16
pairs, which no file can hold.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from mmcot.errors import InputError

_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class NotJsonError(InputError):
    """A text is not one value of JSON."""


def parse_json(text: str, place: str) -> Any:
    """Parse a JSON value.

    Args:
        place: where it is, for messages: a file, with a line if there are several values.

    Raises:
        NotJsonError: it is no valid JSON.
        InputError: a value of it could not be kept.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{place}: the key {twice!r} occurs more than once in an object; keep one of them")
        return found

    def refuse(name: str) -> NoReturn:
        raise InputError(f"{place}: {name} is no value of JSON; give a number or a text, or leave the field out")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        # A value of several lines has a line of its own.
        where = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise NotJsonError(f"{place}: no valid JSON ({error.msg} at {where}character {error.colno})") from None
    except RecursionError:
        raise InputError(f"{place}: objects and lists are nested too deeply") from None
    if "\\u" in text and (name := _place_of_surrogate(value)) is not None:
        raise InputError(
            f"{place}: {name} contains half of a UTF-16 pair (such as \\ud83d without \\ude00), which no file can "
            "hold; write the character itself"
        )
    return value


def read_json_file(path: str | Path) -> Any:
    """Read a file that is one JSON value.

    Raises:
        InputError: as ``parse_json`` and ``read_text``.
    """
    return parse_json(read_text(path), str(path))


def read_text(path: str | Path) -> str:
    """Return a file's text, without a byte order mark.

    Raises:
        InputError: it is neither UTF-8 nor, with its mark, UTF-16; the message has the line.
    """
    data = Path(path).read_bytes()
    try:
        if data.startswith(_UTF_16):
            return data.decode("utf-16")
        if (zero := data.find(b"\0")) >= 0:
            line = data.count(b"\n", 0, zero) + 1
            raise InputError(f"{path}, line {line}: a byte of zero; save the file as text in UTF-8 (it may be UTF-16)")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is no UTF-8; save the file as UTF-8 (in a "
            "spreadsheet program: CSV UTF-8)"
        ) from None


def _place_of_surrogate(value: Any, name: str = "the value") -> str | None:
    """Name the first text with half of a UTF-16 pair; None where there is none."""
    if isinstance(value, str):
        return name if _SURROGATE.search(value) else None
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        if isinstance(key, str) and _SURROGATE.search(key):
            return "a key"
        if found := _place_of_surrogate(part, f"the field {key!r}" if isinstance(key, str) else name):
            return found
    return None
