"""The run report: one HTML file with the results of a run, readable offline.

    write_report([Path("runs/demo")], Path("runs/demo/report.html"))

The file holds everything: data as JSON, pictures as data URIs, style and script from
``launcher/report/page/``. Its content security policy forbids everything else, and the
script puts data into the page only as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_bytes
from launcher.report.collect import collect

SCRIPTS = (
    "dom.js",
    "scores.js",
    "curves.js",
    "groups.js",
    "agreement.js",
    "examples.js",
    "detail.js",
    "looking.js",
    "page.js",
)


def write_report(run_dirs: Sequence[Path], out: Path, *, num_pictures: int = 200, num_looked_at: int = 24) -> Path:
    """Write the report of a run, finished or not, or the comparison of several.

    Args:
        num_pictures: pictures embedded of each split, wrong answers first; more where they are tiny.
        num_looked_at: questions with a picture whose attention is measured, wrong answers first.

    Raises:
        RunError: a folder holds no run.
    """
    commit_bytes(out, render(collect(run_dirs, num_pictures=num_pictures, num_looked_at=num_looked_at)).encode())
    return out


def render(data: Mapping[str, Any]) -> str:
    """The page around its data."""
    page = resources.files("launcher.report") / "page"
    script = '(() => {\n"use strict";\n' + "".join(_read(page / name) for name in SCRIPTS) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"STYLE": _read(page / "report.css"), "SCRIPT": script, "SCRIPT_SHA256": digest, "DATA": text}
    html = _read(page / "report.html")
    head, *rest = html.split("{{")
    pieces = [head]
    for piece in rest:  # one pass, so that "{{" in the data is never replaced
        name, _, after = piece.partition("}}")
        pieces += [parts[name], after]
    return "".join(pieces)


def _read(path: Any) -> str:
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")
