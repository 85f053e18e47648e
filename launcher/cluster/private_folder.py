"""The folder of a local Ray, which no other user of the machine can enter."""

from __future__ import annotations

import os
import stat
import tempfile

_MAX_BYTES = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")  # the kernel's limit


def private_ray_folder() -> str:
    """Return the folder for a local Ray's sockets and logs: below RAY_TMPDIR, TMPDIR or /tmp, for this user alone.

    Ray opens its own folder, and its sockets in it, to every user of the machine. So its folder lies in one of mode
    0700. Below a place whose path is too long for sockets, or in which others could exchange folders, /tmp is used.
    """
    given = os.path.abspath(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    os.makedirs(given, exist_ok=True)
    place = next(filter(_is_suitable, (given, os.path.realpath(given))), os.path.realpath("/tmp"))
    folder = _of_user(place)
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():  # another user took the name
            folder = tempfile.mkdtemp(prefix="mmcot-", dir=place)
    if os.stat(folder).st_mode & 0o077:
        os.chmod(folder, 0o700)
    return os.path.join(folder, "r")


def _of_user(place: str) -> str:
    return os.path.join(place, f"mmcot-{os.getuid()}")


def _is_suitable(place: str) -> bool:
    mode = os.stat(place).st_mode
    others_may_rename = mode & 0o022 and not mode & stat.S_ISVTX
    return not others_may_rename and len(os.fsencode(os.path.join(_of_user(place), "r"))) <= _MAX_BYTES
