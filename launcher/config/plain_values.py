"""Settings as plain values, read from a file and checked before validation."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from data_shards.credentials import hide_credentials
from data_shards.strict_json import read_text
from launcher.config.field_types import kinds_of, takes_numbers_alone
from launcher.config.settings import SettingsError
from launcher.config.strict_yaml import MAX_DEPTH, MAX_INTEGER, parse_yaml
from mmcot.errors import InputError

MAX_BYTES = 1_000_000  # of a file of settings, which has some kilobytes
_MAX_FLOAT = sys.float_info.max
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def read_yaml_mapping(path: Path, *, remedy: str | None = None) -> dict[str, Any]:
    """Read a YAML file of settings in UTF-8 or, with its mark, in UTF-16.

    Args:
        remedy: what to do if it is broken; for a file that nobody wrote by hand.

    Raises:
        OSError: it cannot be read.
        SettingsError: it is too large, no text, no valid YAML, or no mapping.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        advice = remedy or "give a YAML file of settings"
        raise SettingsError(f"{path} has {size:,} bytes, and settings have some thousands; {advice}")
    try:
        values = parse_yaml(read_text(path), str(path))
    except InputError as error:
        raise SettingsError(f"{error}; {remedy}" if remedy else str(error)) from None
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {_kind(values)}"
        raise SettingsError(f"{path} {found}; {remedy or 'it must have sections such as training:'}")
    return values


def check_plain(value: Any, name: str = "", depth: int = 0) -> None:
    """Check what validation would let through or fail on: texts that no file can hold, numbers without bounds.

    Raises:
        SettingsError: the message names the setting.
    """
    if depth > MAX_DEPTH:
        raise SettingsError(f"setting {name} is nested more than {MAX_DEPTH} levels deep; write fewer")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise SettingsError(f"setting {name}: the key {str(key)[:40]} is no text; write it in quotes")
            check_plain(key, name, depth + 1)
            check_plain(inner, f"{name}.{key}" if name else key, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(inner, name, depth + 1)
    elif isinstance(value, str) and _NO_TEXT.search(value):
        raise SettingsError(
            f"setting {name}: {hide_credentials(ascii(value[:100]))} has a character that is no text, a zero or half "
            "of a pair; remove it"
        )
    elif isinstance(value, bool):
        if takes_numbers_alone(kinds_of(name) or ()):
            raise SettingsError(f"setting {name} = {str(value).lower()}: expected a number")
    elif isinstance(value, int | float) and not abs(value) <= (MAX_INTEGER if isinstance(value, int) else _MAX_FLOAT):
        raise SettingsError(f"setting {name}: the number is too large or not finite; give another one")


def _kind(value: Any) -> str:
    return {list: "list", str: "text", bool: "true or false"}.get(type(value), "number")
