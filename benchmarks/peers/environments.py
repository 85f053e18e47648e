"""Virtual environments of the programs that are measured beside ours: one each, from a pinned requirement file.

``ctranslate2.txt`` is the requirement file of CTranslate2 and ``ctranslate2.py`` the program that runs in its
environment. An environment is made once, and again where its file or Python changes. Packages come from the index
that pip is configured with.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CACHE_VARIABLE = "MMCOT_BENCHMARK_CACHE"
DEFAULT_CACHE = "~/.cache/mmcot/benchmarks"


class PeerError(RuntimeError):
    """A program beside ours cannot be measured: ``reason`` in a few words without a path, ``details`` for a person."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(f"{reason}\n{details}".strip())
        self.reason = reason


def names() -> list[str]:
    """Those with a requirement file, in the order of the alphabet."""
    return sorted(path.stem for path in HERE.glob("*.txt"))


def cache_folder() -> Path:
    """Where environments, converted models and the trained model are kept; MMCOT_BENCHMARK_CACHE names another."""
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()


def requirements(name: str) -> dict[str, str]:
    """The pinned packages of a requirement file and their versions.

    Raises:
        PeerError: there is no such file, or one of its lines pins no version.
    """
    path = HERE / f"{name}.txt"
    if not path.exists():
        raise PeerError(f"there is no requirement file of {name}", f"expected one of {', '.join(names())}")
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    if loose := [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)]:
        raise PeerError(f"{path.name} has lines without a pinned version", f"{loose}; write name==version")
    return dict(line.split("==") for line in lines)


def make(name: str) -> Path:
    """Make the environment of a name, unless it was made from the same requirement file; returns its Python.

    Raises:
        PeerError: a package cannot be installed.
    """
    requirements(name)
    path = HERE / f"{name}.txt"
    version = ".".join(map(str, sys.version_info[:3]))
    key = hashlib.sha256(f"{version}\n{path.read_text()}".encode()).hexdigest()
    folder = cache_folder() / "environments" / name
    python, stamp = folder / "bin" / "python", folder / "made-from"
    if stamp.exists() and stamp.read_text() == key:
        return python
    print(f"making the environment of {name} in {folder}: minutes, once", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", str(folder), name=name)
    _run(str(python), "-m", "pip", "install", "--quiet", "--requirement", str(path), name=name)
    stamp.write_text(key)
    return python


def _run(*command: str, name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"the environment of {name} cannot be made", (done.stdout + done.stderr)[-2000:])
