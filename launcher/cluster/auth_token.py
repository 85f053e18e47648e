"""The token of a local Ray, readable by its user alone."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def keep_token_private() -> None:
    """Have the token of a local Ray in a file that its user alone can read, or in the environment where no file can be.

    A local Ray listens on every interface and runs what it is sent by whoever has the token. It makes the
    token itself, in a file that every user of the machine could read.
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
            os.link(temporary, path)  # whole, and never in place of one that others use
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError:
        if not path.exists():  # a home that cannot be written to
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
