"""The token of a local Ray, readable by its user alone."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def keep_token_private() -> None:
    """Store the token of a local Ray in a file that only its user can read, or else in the environment.

    A local Ray listens on every interface and runs any code from a client that has the token. By default Ray
    creates the token in a file that every user of the machine can read.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
    except RuntimeError:  # a container's user may have no home
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return
    temporary = path.with_name(f".tmp-{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # atomic, and never replaces a token in use
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError:
        if not path.exists():  # the home folder is read-only
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
