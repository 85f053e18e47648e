"""Finding secrets in addresses and settings, and hiding them in output.

    hide_credentials("s3://key:secret@bucket/a?X-Amz-Signature=0f3a")    # "s3://***@bucket/a?X-Amz-Signature=***"
    find_credentials({"comet": {"api_key": "0f3a"}}, "deepspeed")        # "deepspeed.comet.api_key"

This prevents mistakes, not intent. Other users read settings, manifests, MLflow and reports, so
secrets belong in the environment or in files of their own.
"""

from __future__ import annotations

import re
from typing import Any

# In an address the user comes before @. After the first slash, @ names a revision (hf://datasets/a/b@main), unless a
# password contains the slash. Digits and a slash are a port. Each pattern passes over a character a fixed number of
# times at most: whoever writes an error message must not be able to hold this process up.
_WORD = re.compile(r"[^@\s]+@?")
_USER = re.compile(r"://(?:[^/@]+@|[^/@:]*:(?!\d+/))")  # in a word that ends in @
_QUERY = re.compile(
    r"([?&;#](?=[\w.%-]*?(?:token|key|secret|passw|pwd|signature|\bsig\b|credential|auth))[\w.%-]*=)[^&;#\s'\"]+",
    re.IGNORECASE,
)
_KEY = re.compile(r"(?:api|access|private)[_-]?key|secret|passw|credential|token$", re.IGNORECASE)


def holds_credentials(text: str) -> bool:
    """Whether an address in a text has a user, a password, or a key or signature in its query."""
    return any(_user_in(word) for word in _WORD.finditer(text)) or _QUERY.search(text) is not None


def hide_credentials(text: str) -> str:
    """Replace the credentials in every address of a text by ``***``."""
    return _QUERY.sub(r"\1***", _WORD.sub(_without_user, text))


def _user_in(word: re.Match[str]) -> re.Match[str] | None:
    return _USER.search(word[0]) if word[0].endswith("@") else None


def _without_user(word: re.Match[str]) -> str:
    found = _user_in(word)
    return word[0][: found.start()] + "://***@" if found else word[0]


def find_credentials(value: Any, name: str) -> str | None:
    """Return the dotted name of the first secret in a tree of plain values, or None.

    A secret is an address with credentials, or a text whose key names a secret.
    """
    if isinstance(value, str):
        return name if holds_credentials(value) else None
    if isinstance(value, list):
        return next(filter(None, (find_credentials(item, name) for item in value)), None)
    if not isinstance(value, dict):
        return None
    for key, item in value.items():
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(item, str) and item and _KEY.search(str(key)):
            return inner
        if found := find_credentials(item, inner):
            return found
    return None
