"""Seeded damage to files: what disks, editors, other programs and typing errors do to a valid input.

    change = mutate(folder / "problems.json", random.Random(17))
    change.label            # "json value ('7', 'choices', 1): text to a list"

A mutation of a file is chosen by its suffix: bytes and lines of any, values of JSON, headers of tars and arrays.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.sealed_json import sealed

HUGE = 10**400


@dataclasses.dataclass(frozen=True)
class Change:
    """What was done to a file.

    Attributes:
        label: in words.
        keeps: whether no record was removed, repeated or cut off by it, so that a reader may lose none.
        texts: whether it is of one place, so that a reader may find at most one record altered.
    """

    label: str
    keeps: bool = False
    one_place: bool = False


class NothingToChangeError(Exception):
    """The file has no place for this mutation."""


Mutation = Callable[[Path, random.Random], Change]


def flip_byte(path: Path, draw: random.Random) -> Change:
    data = bytearray(_some(path))
    at = draw.randrange(len(data))
    new = draw.choice([data[at] ^ (1 << draw.randrange(8)), draw.randrange(256), 0, 0xFF, 0x22, 0x2C, 0x0A])
    data[at] = new
    path.write_bytes(data)
    return Change(f"byte {at} becomes 0x{new:02x}")


def insert_bytes(path: Path, draw: random.Random) -> Change:
    data = _some(path)
    at = draw.randrange(len(data) + 1)
    new = draw.choice([b"\0", b'"', b",", b"\n", b"\xff\xfe", b"\xc3\x28", b"{", b"]", "\u2028".encode(), b"\r", b"\\"])
    new *= draw.choice([1, 1, 1, 40])
    path.write_bytes(data[:at] + new + data[at:])
    return Change(f"{new[:4]!r} x {len(new)} is inserted at byte {at}")


def cut(path: Path, draw: random.Random) -> Change:
    data = _some(path)
    at = draw.randrange(len(data))
    path.write_bytes(data[:at])
    return Change(f"cut off at byte {at}")


def remove_block(path: Path, draw: random.Random) -> Change:
    data = _some(path)
    start = draw.randrange(len(data))
    size = draw.choice([1, 2, 16, 512, len(data) // 2 + 1])
    path.write_bytes(data[:start] + data[start + size :])
    return Change(f"{size} bytes are removed at {start}")


def repeat_block(path: Path, draw: random.Random) -> Change:
    data = _some(path)
    start = draw.randrange(len(data))
    block = data[start : start + draw.choice([1, 16, 512, 4096])]
    at = draw.choice([start + len(block), len(data), draw.randrange(len(data))])
    path.write_bytes(data[:at] + block + data[at:])
    return Change(f"{len(block)} bytes from {start} are repeated at {at}")


def zero_block(path: Path, draw: random.Random) -> Change:
    data = bytearray(_some(path))
    start = draw.randrange(len(data))
    size = min(draw.choice([1, 16, 512, len(data)]), len(data) - start)
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    return Change(f"{size} bytes from {start} become zero")


def change_lines(path: Path, draw: random.Random) -> Change:
    lines = _some(path).splitlines(keepends=True)
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(["removed", "repeated", "swapped", "empty one before", "foreign one before", "indented"])
    if kind == "removed":
        del lines[at]
    elif kind == "repeated":
        lines.insert(at, lines[other])
    elif kind == "swapped":
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "indented":
        lines[at] = b"   " + lines[at]
    else:
        foreign = draw.choice([b"# a comment\n", b"<<<<<<< HEAD\n", b"null\n", b"[]\n", b'"', b"12\n", b"...\n"])
        lines.insert(at, b"\n" if kind == "empty one before" else foreign)
    path.write_bytes(b"".join(lines))
    return Change(f"line {at + 1}: {kind} (other: {other + 1})", keeps=kind in ("swapped", "empty one before"))


def encode(path: Path, draw: random.Random) -> Change:
    try:
        text = _some(path).decode("utf-8")
    except UnicodeDecodeError:
        raise NothingToChangeError from None
    kind = draw.choice(["utf-8-sig", "utf-16", "utf-16-le", "latin-1", "crlf", "cr"])
    if kind == "crlf":
        data = text.replace("\n", "\r\n").encode()
    elif kind == "cr":
        data = text.replace("\n", "\r").encode()
    elif kind == "latin-1":
        data = (text.replace("e", "é", 1) if path.suffix in (".csv", ".jsonl") else text).encode("latin-1", "replace")
    else:
        data = text.encode(kind)
    path.write_bytes(data)
    return Change(f"saved as {kind}", keeps=True, one_place=True)


def empty(path: Path, draw: random.Random) -> Change:
    path.write_bytes(draw.choice([b"", b" ", b"\n", b"\xef\xbb\xbf", bytes(64)]))
    return Change("emptied")


def replace(path: Path, draw: random.Random) -> Change:
    """Something else of this name: no file, a folder, a link to nothing, a file of another program."""
    kind = draw.choice(["missing", "a folder", "a dangling link", "a page", "an LFS pointer", "unreadable"])
    if kind == "unreadable":
        if os.getuid() == 0:  # may read everything
            raise NothingToChangeError
        path.chmod(0)
        return Change("cannot be read by this user")
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a dangling link":
        path.symlink_to(path.parent / "gone")
    elif kind == "a page":
        path.write_bytes(b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n")
    elif kind == "an LFS pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    return Change(f"is {kind}")


_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    3.5,
    10**18,
    HUGE,
    float("nan"),
    float("inf"),
    1e308,
    "",
    "text",
    "0",
    "../../etc/passwd",
    "a\0b",
    "\ud800",
    "/" * 5000,
    [],
    [None],
    ["a", 1],
    {},
    {"a": None},
    {"": []},
]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        found += [deeper for key, part in value.items() for deeper in _paths(part, (*path, key))]
    elif isinstance(value, list):
        found += [deeper for key, part in enumerate(value) for deeper in _paths(part, (*path, key))]
    return found


def _pick(value: Any, draw: random.Random) -> tuple[Any, ...]:
    """A place in a value, places near the top more often than their number."""
    paths = _paths(value)
    depth = draw.choice(sorted({len(path) for path in paths}))
    return draw.choice([path for path in paths if len(path) == depth])


def change_value(value: Any, draw: random.Random) -> tuple[Any, str]:
    """Return a changed copy of a JSON value, and what was done."""
    value = copy.deepcopy(value)
    path = _pick(value, draw)
    kind = draw.choice(["value", "value", "value", "removed", "wrapped", "key", "number"])
    holder: Any = {"top": value}
    place: tuple[Any, ...] = ("top", *path)
    for key in place[:-1]:
        holder = holder[key]
    last = place[-1]
    root = value
    if kind == "removed" and path:
        del holder[last]
    elif kind == "key" and path and isinstance(holder, dict):
        holder[draw.choice(["", "other", "Qid", "../x", str(last) + " ", str(last).upper()])] = holder.pop(last)
    elif kind == "wrapped":
        new = draw.choice([[holder[last]], {"a": holder[last]}, str(holder[last])])
        holder[last] = new
        root = new if not path else root
    elif kind == "number" and type(holder[last]) in (int, float):
        holder[last] = holder[last] * draw.choice([-1, 1000]) + draw.choice([0, 1])
        root = holder[last] if not path else root
    else:
        kind = "value"
        new = draw.choice(_VALUES)
        holder[last] = new
        root = new if not path else root
        kind = f"becomes {_shown(new)}"
    return root, f"json value {path!r}: {kind}"


def _shown(value: Any) -> str:
    return "a huge integer" if value is HUGE else repr(value)[:30]


def dumped(value: Any, **options: Any) -> str:
    text = json.dumps(_without_huge(value), **options)
    return text.replace('"<HUGE>"', "1" + "0" * 400)


def _without_huge(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_huge(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_huge(part) for part in value]
    return "<HUGE>" if value is HUGE or (type(value) is int and abs(value) >= HUGE) else value


def change_json(path: Path, draw: random.Random) -> Change:
    """A JSON file, or one line of a file of them, with another value in one place."""
    text = _text(path)
    if path.suffix == ".jsonl":
        lines = text.splitlines(keepends=True)
        if not lines:
            raise NothingToChangeError
        at = draw.randrange(len(lines))
        new, label = change_value(_parsed(lines[at]), draw)
        lines[at] = dumped(new) + "\n"
        path.write_text("".join(lines), encoding="utf-8")
        return Change(f"line {at + 1}, {label}", keeps=True, one_place=True)
    before = _parsed(text)
    new, label = change_value(before, draw)
    if isinstance(before, dict) and "fingerprint" in before and isinstance(new, dict) and draw.random() < 0.7:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            new, label = sealed(new), f"{label}, sealed again"
    path.write_text(dumped(new, indent=2), encoding="utf-8")
    return Change(label)


def change_json_text(path: Path, draw: random.Random) -> Change:
    """What a parser sees before there is a value: deep nesting, a key twice, a comma too much, quotes."""
    text = _text(path)
    depth = draw.choice([200, 5000, 200_000])
    kind = draw.choice(["deep lists", "deep objects", "key twice", "comma", "single quotes", "comment", "two values"])
    at = draw.choice([found.end() for found in re.finditer(r": ", text)] or [0])
    end = next((found.start() for found in re.finditer(r"[,}\]\n]", text[at:])), 0) + at
    if kind == "deep lists":
        text = text[:at] + "[" * depth + "]" * depth + text[end:]
    elif kind == "deep objects":
        text = text[:at] + '{"a":' * depth + "1" + "}" * depth + text[end:]
    elif kind == "key twice":
        keys = list(re.finditer(r'"[^"\n]*": [^,\n]*,', text))
        if not keys:
            raise NothingToChangeError
        found = draw.choice(keys)
        text = text[: found.end()] + found[0] + text[found.end() :]
    elif kind == "comma":
        text = text.replace("}", ",}", 1)
    elif kind == "single quotes":
        text = text.replace('"', "'")
    elif kind == "comment":
        text = text[:at] + " /* yes */ " + text[at:]
    else:
        text += text
    path.write_text(text, encoding="utf-8")
    return Change(f"{kind} at {at} (depth {depth})")


def change_csv(path: Path, draw: random.Random) -> Change:
    text = _text(path)
    places = [found.start() for found in re.finditer(r'[",\n|]', text)]
    at = draw.choice(places)
    kind = draw.choice(["removed", "repeated", "semicolons", "tabs", "quote", "header", "sep", "wide"])
    if kind == "removed":
        text = text[:at] + text[at + 1 :]
    elif kind == "repeated":
        text = text[:at] + text[at] + text[at:]
    elif kind in ("semicolons", "tabs"):
        text = text.replace(",", ";" if kind == "semicolons" else "\t")
    elif kind == "quote":
        text = text[:at] + '"' + text[at:]
    elif kind == "header":
        first, _, rest = text.partition("\n")
        names = first.split(",")
        names[draw.randrange(len(names))] = draw.choice(["", "qid", "answer", "Question ", "no such", '"'])
        text = ",".join(names) + "\n" + rest
    elif kind == "sep":
        text = draw.choice(["sep=,\n", "sep=;\n", "sep=\n"]) + text
    else:
        text = text[:at] + "x" * 300_000 + text[at:]
    path.write_text(text, encoding="utf-8")
    return Change(f"csv at {at}: {kind}")


def change_yaml(path: Path, draw: random.Random) -> Change:
    lines = _text(path).splitlines()
    at = draw.choice([number for number, line in enumerate(lines) if ":" in line])
    name, _, value = lines[at].partition(":")
    new = draw.choice(
        [
            f"{name}: &a [*a]",
            f"{name}: *nowhere",
            f"{name}: !!python/object/apply:os.getcwd []",
            f"{name}: !!binary x",
            f"{name}: 010",
            f"{name}: 1:30",
            f"{name}: .inf",
            f"{name}: 2026-01-01",
            f"{name}: 1{'0' * 5000}",
            f"{name}: {'[' * 3000}",
            f"{name}: {{a: 1, a: 2}}",
            f"{name}:\t{value}",
            f" {lines[at]}",
            lines[at].lstrip(),
            f"{lines[at]}\n{lines[at]}",
            f"{name}{value}",
            f'{name}: "',
            f"{name}: yes",
            f"{name}: null",
            f"{name}: \x01",
            f"{name}: [1, 2]",
            f"{name}: {{}}",
            "---",
            "? [a, b]\n: 1",
            "<<: {a: 1}",
        ]
    )
    lines[at] = new
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Change(f"yaml line {at + 1}: {new[:40]!r}")


def change_tar(path: Path, draw: random.Random) -> Change:
    """A field of a tar's header, with and without its checksum put right."""
    data = bytearray(_some(path))
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not heads:
        raise NothingToChangeError
    at = draw.choice(heads)
    start, size, new = draw.choice(
        [
            (0, 100, draw.choice([b"a.pkl", b"../x.json", b"\xff\xfe.json", b"noextension", b"a/b/", b".json", b"\0"])),
            (
                124,
                12,
                draw.choice([b"77777777777\0", b"00000000000\0", b"-1\0", b"\x80" + b"\xff" * 11, b"zz\0", b"\0"]),
            ),
            (156, 1, draw.choice([b"1", b"2", b"5", b"L", b"x", b"g", b"S", b"K", b"\0", b"Z"])),
            (148, 8, draw.choice([b"0000000\0", b"7777777\0", b"\0" * 8])),
            (257, 6, draw.choice([b"\0" * 6, b"nonsen"])),
            (345, 155, draw.choice([b"folder", b"\xff" * 155])),
        ]
    )
    data[at + start : at + start + size] = new.ljust(size, b"\0")[:size]
    mend = draw.random() < 0.7
    if mend and start != 148:
        head = data[at : at + 512]
        head[148:156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(head)
    path.write_bytes(data)
    return Change(f"tar header at {at}, field at {start} becomes {new[:12]!r}{', checksum right' if mend else ''}")


def change_npy(path: Path, draw: random.Random) -> Change:
    """A word of an array's header, or its values."""
    data = _some(path)
    head, values = data[:128], bytearray(data[128:])
    kind = draw.choice(["header", "header", "values", "version"])
    if kind == "header":
        words = [
            (b"'<f", b"'>f"),
            (b"'<f", b"'<c"),
            (b"'<f2'", b"'|O' "),
            (b"False", b"True "),
            (b"(", b"(9"),
            (b"(", b"(-"),
            (b"descr", b"descR"),
            (b"(", b"{"),
            (b"'<f4'", b"'<f8'"),
            (b"'<f4'", b"'|O' "),
            (b", ", b"**"),
        ]
        old, new = draw.choice([word for word in words if word[0] in head])
        changed = head.replace(old, new, 1)
        data = changed[:127] + b"\n" + bytes(values) if len(changed) > 128 else changed.ljust(128, b" ") + bytes(values)
        label = f"header: {old!r} becomes {new!r}"
    elif kind == "version":
        data, label = data[:6] + bytes([draw.choice([0, 2, 3, 9])]) + data[7:], "another version"
    else:
        if not values:
            raise NothingToChangeError
        values[-8:] = draw.choice([b"\xff", b"\x7f"]) * min(8, len(values))
        data, label = head + bytes(values), "values: NaN or huge"
    path.write_bytes(data)
    return Change(label)


_ANY: tuple[Mutation, ...] = (flip_byte, flip_byte, insert_bytes, cut, remove_block, repeat_block, zero_block)
_RARE: tuple[Mutation, ...] = (empty, replace)
_BY_SUFFIX: dict[str, tuple[Mutation, ...]] = {
    ".json": (change_json, change_json, change_json, change_json, change_json_text, change_lines, encode),
    ".jsonl": (change_json, change_json, change_json, change_json_text, change_lines, encode),
    ".csv": (change_csv, change_csv, change_csv, change_lines, encode),
    ".yaml": (change_yaml, change_yaml, change_yaml, change_lines, encode),
    ".tar": (change_tar, change_tar, change_tar),
    ".npy": (change_npy, change_npy),
    "": (change_lines, encode),
}


def mutate(path: Path, draw: random.Random) -> Change:
    """Damage a file once; which way is drawn."""
    own = _BY_SUFFIX.get(path.suffix, ())
    while True:
        kinds = draw.choice([own, own, own, _ANY, _ANY, _RARE] if own else [_ANY, _ANY, _ANY, _RARE])
        mutation = draw.choice(kinds)
        try:
            change = mutation(path, draw)
        except NothingToChangeError:
            continue
        return dataclasses.replace(change, label=f"{mutation.__name__}: {change.label}")


def _some(path: Path) -> bytes:
    if not (data := path.read_bytes()):
        raise NothingToChangeError
    return data


def _text(path: Path) -> str:
    return _some(path).decode("utf-8")


def _parsed(text: str) -> Any:
    return json.loads(text)
