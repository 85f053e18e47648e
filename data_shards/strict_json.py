"""JSON that people give us: what Python's parser accepts and would lose or alter is refused.

    parse_json('{"qid": "a1", "answer": 0}', "in.jsonl", line=3)
    read_json_file("problems.json")         # in UTF-8 or, with its mark, in UTF-16

Refused are keys that occur twice in an object (the first would be lost), NaN and infinities, and halves of UTF-16
pairs, which no file can hold. Errors have the file, the line and the key.
"""

from __future__ import annotations

import codecs
import json
import json.decoder
import json.scanner
import re
from pathlib import Path
from typing import Any, NoReturn

from mmcot.errors import InputError

_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class NotJsonError(InputError):
    """A text is not one value of JSON."""


def parse_json(
    text: str | bytes,
    file: object,
    *,
    line: int | None = None,
    member: str | None = None,
    finite: bool = True,
    remedy: str = "correct it there, or write it again",
) -> Any:
    """Parse a JSON value.

    Args:
        text: bytes are decoded as by ``decode_text``.
        file: the file in which it is, for messages.
        line: its line, if the file has a value a line.
        member: its place in a file without lines.
        finite: refuse NaN and infinities.
        remedy: what to do with a text that is no JSON.

    Raises:
        NotJsonError: it is no valid JSON.
        InputError: a value of it could not be kept.
    """
    try:
        if isinstance(text, bytes):
            # Found in bytes, because a text of wide characters is searched ten times slower.
            escapes = b"\\u" in text or text.startswith(_UTF_16)
            text = decode_text(text)
            has_halves = escapes and may_have_halves(text)
        else:
            has_halves = may_have_halves(text)
        value = (_STRICT if finite else _LOOSE).decode(text)
        if has_halves and (name := _place_of_surrogate(value)) is not None:
            raise InputError(
                f"{name} contains half of a UTF-16 pair (such as \\ud83d without \\ude00), which no file can hold; "
                "write the character itself"
            )
    except json.JSONDecodeError as error:
        # A value of several lines has a line of its own.
        where = f"line {error.lineno}, " if line is not None and "\n" in str(text).strip() else ""
        problem = f"no valid JSON ({error.msg} at {where}character {error.colno}); {remedy}"
        line = error.lineno if line is None and member is None and "\n" in str(text).strip() else line
        raise NotJsonError(problem).at(file, line=line, member=member) from None
    except RecursionError:
        raise InputError(f"objects and lists are nested too deeply; {remedy}").at(
            file, line=line, member=member
        ) from None
    except ValueError as error:
        if not isinstance(error, InputError):  # Python's limit of digits
            error = InputError("an integer has thousands of digits; write it as a text, or leave it out")
        if line is None and member is None and error.line is None:
            line = _line_of_object(str(text))
        raise error.at(file, line=None if member else error.line or line, member=member) from None
    return value


def may_have_halves(text: str) -> bool:
    """Whether a text of JSON may contain halves of UTF-16 pairs."""
    return "\\ud" in text or "\\uD" in text


def read_json_file(
    path: str | Path, *, finite: bool = True, remedy: str = "correct it there, or write it again"
) -> Any:
    """Read a file that is one JSON value.

    Raises:
        InputError: as ``parse_json`` and ``read_text``.
    """
    return parse_json(Path(path).read_bytes(), path, finite=finite, remedy=remedy)


def read_text(path: str | Path) -> str:
    """Return a file's text, without a byte order mark.

    Raises:
        InputError: it is neither UTF-8 nor, with its mark, UTF-16; the message has the line.
    """
    try:
        return decode_text(Path(path).read_bytes())
    except InputError as error:
        raise error.at(path, line=error.line) from None


def decode_text(data: bytes) -> str:
    """Return the text of bytes, without a byte order mark.

    Raises:
        InputError: they are neither UTF-8 nor, with its mark, UTF-16; the error has the line.
    """
    try:
        if data.startswith(_UTF_32):
            raise InputError("it is UTF-32; save it as UTF-8")
        if data.startswith(_UTF_16):
            return data.decode("utf-16")
        if (at := data.find(b"\0")) >= 0:
            raise _at_byte(data, at, "a byte of zero; save the file as text in UTF-8 (it may be UTF-16)")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith(_UTF_16):
            raise InputError("its mark says UTF-16, and it is cut off or no such text; save it as UTF-8") from None
        found = f"the byte 0x{data[error.start]:02x} is no UTF-8"
        raise _at_byte(
            data, error.start, f"{found}; save the file as UTF-8 (in a spreadsheet program: CSV UTF-8)"
        ) from None


def _at_byte(data: bytes, at: int, problem: str) -> InputError:
    error = InputError(problem)
    error.line = data.count(b"\n", 0, at) + 1
    return error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the key {twice!r} occurs more than once in an object; keep one of them")
    return found


def _refuse(name: str) -> NoReturn:
    raise InputError(f"{name} is no value of JSON; give a number or a text, or leave the field out")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
# For many small values: raises ValueError or RecursionError for what parse_json refuses, except halves of UTF-16 pairs.
decode_strict = _STRICT.decode
_LOOSE = json.JSONDecoder(object_pairs_hook=_unique)


def _line_of_object(text: str) -> int | None:
    """The line on which the innermost object with a refused key or value begins; None for a text of one line.

    The decoder in C does not say where it is, so the one in Python reads the text again.
    """
    if "\n" not in text.strip():
        return None
    starts: list[int] = []

    def parse_object(text_and_start: tuple[str, int], *arguments: Any) -> Any:
        try:
            return json.decoder.JSONObject(text_and_start, *arguments)  # pyright: ignore[reportAttributeAccessIssue]
        except InputError:
            starts.append(text_and_start[1])
            raise

    decoder: Any = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
    decoder.parse_object = parse_object
    decoder.scan_once = json.scanner.py_make_scanner(decoder)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        decoder.decode(text)
    except InputError:
        return text.count("\n", 0, starts[0]) + 1 if starts else None
    except RecursionError:
        return None
    return None


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
