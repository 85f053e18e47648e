"""What is said of an error that is no error of ours: a bug, whose traceback goes to a file."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path

from data_shards.credentials import hide_credentials

BUG_STATUS = 70  # EX_SOFTWARE of sysexits.h: the program itself failed
DEBUG = "MMCOT_DEBUG"  # environment: show every traceback; set by `mmcot --debug`


def describe_bug(error: BaseException) -> str:
    """Write the traceback to a file that only this user can read; returns a sentence that names it."""
    lines = traceback.format_exception(error)
    text = f"mmcot {version('mmcot')}, Python {sys.version}\n$ {' '.join(sys.argv)}\n\n{''.join(lines)}"
    said = " ".join(str(error).split())[:300] or "without a message"
    sentence = f"this is a bug in mmcot: {type(error).__name__}: {said}"
    path = Path(tempfile.gettempdir()) / f"mmcot-bug-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(hide_credentials(text))
    except OSError as failure:
        sys.stderr.write(hide_credentials(text))
        return hide_credentials(f"{sentence}; its traceback is above ({path}: {failure.strerror}); please report it")
    return f"{hide_credentials(sentence)}; its traceback is in {path}: please report it, with that file"


def describe_system_error(error: OSError) -> str | None:
    """The sentence on what the system refused, such as access to a file; None where it names no file."""
    if isinstance(error, ConnectionError) and error.filename is None:
        return f"a connection failed: {error}; see that the other side runs and can be reached, and run again"
    if error.filename is None or error.strerror is None:
        return None
    return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}{_ADVICE.get(type(error), '')}"


_ADVICE = {
    PermissionError: "; give this user access to it, or name another",
    IsADirectoryError: "; a file is needed there",
    NotADirectoryError: "; a folder is needed there",
    FileNotFoundError: "; give the name of one that exists",
    FileExistsError: "; remove it, or name another",
}
