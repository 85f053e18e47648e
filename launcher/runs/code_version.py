"""Which code computes a step: the version and a hash of the sources, from its beginning to its end.

logs/code-<step>.json        {"began": "0.2.0 3f0a9c1d2b4e", "last": "0.2.0 3f0a9c1d2b4e"}
"""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from data_shards.atomic_files import commit_json
from launcher.runs.records import read_code
from launcher.runs.run_dir import RunDir

_PACKAGES = ("data_shards", "launcher", "mmcot")


@functools.cache
def code_version() -> str:
    """The package's version and 12 hex digits of a hash of all its modules, as they were at the first call."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = find_spec(package)
        root = Path((spec and spec.origin) or package).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return f"{version('mmcot')} {digest.hexdigest()[:12]}"


def begin_with_code(run_dir: RunDir, step: str) -> str | None:
    """Store which code begins or continues a step; returns a note where it is not the code that did so last."""
    path, now = _path(run_dir, step), code_version()
    known = read_code(path) if path.exists() else {"began": now, "last": None}
    if known["last"] != now:
        commit_json(path, {**known, "last": now})
    if known["last"] in (None, now):
        return None
    return (
        f"note: step {step!r} was begun by version {known['began']} of this program and is continued by {now}; its "
        "result is of both"
    )


def code_of_step(run_dir: RunDir, step: str) -> dict[str, str]:
    """The versions that began and that end a step, for its marker."""
    path, now = _path(run_dir, step), code_version()
    return {"began": read_code(path)["began"] if path.exists() else now, "ended": now}


def _path(run_dir: RunDir, step: str) -> Path:
    return run_dir.logs / f"code-{step}.json"
