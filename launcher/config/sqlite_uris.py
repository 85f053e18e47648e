"""Addresses of SQLite databases, as SQLAlchemy reads them: ``%`` escapes a character and ``?`` begins options."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

SQLITE = "sqlite:///"


def sqlite_uri(path: Path) -> str:
    """The address of a database file."""
    return f"{SQLITE}{str(path).replace('%', '%25').replace('?', '%3F')}"


def sqlite_path(uri: str) -> Path:
    """The file of a database's address."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))
