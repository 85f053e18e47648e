"""JSON files that verify themselves: the last key is a fingerprint of all the others.

    {"step": 400, "files": {...}, "fingerprint": "9a1f0c2e5b7d4e60"}

It finds what a disk or an editor has changed. It is no signature: who wants to deceive can compute it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json, fingerprint, read_json
from mmcot.errors import InputError

_KEY = "fingerprint"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its fingerprint, in place of an earlier one."""
    content = {name: value for name, value in content.items() if name != _KEY}
    return {**content, _KEY: fingerprint(content)}


def commit_sealed(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``sealed(content)``."""
    commit_json(path, sealed(content))


def broken_seal(content: Any) -> str | None:
    """Why the content is not what was written; None where it is, or where it has no fingerprint (earlier versions)."""
    if not isinstance(content, dict):
        return f"it holds {type(content).__name__}, expected an object"
    if _KEY not in content or content == sealed(content):
        return None
    return f"its content has the fingerprint {sealed(content)[_KEY]}, it says {content[_KEY]}: it was altered"


def read_sealed(path: str | Path, *, remedy: str) -> dict[str, Any]:
    """Read a file that ``commit_sealed`` wrote.

    Raises:
        ValueError: it is no JSON object, or was altered; the message ends with the remedy.
    """
    content = read_json(path)
    if reason := broken_seal(content):
        raise InputError(f"{path} cannot be used: {reason}; {remedy}")
    return content
