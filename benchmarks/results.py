"""What all benchmarks share: the data set they measure on, summaries of rounds, and their numbers as one JSON file.

A file has the program's own numbers and ``conditions``: commit, versions, cores, threads. It names no host and no path.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from data_shards.mini_sqa.generate import write_mini_sqa

DATA_VARIABLE = "MMCOT_SCIENCEQA_DIR"
LIBRARIES = ("torch", "transformers", "deepspeed", "ray", "webdataset", "numpy", "litdata")
ROOT = Path(__file__).parents[1]
CODE = ("mmcot", "data_shards", "launcher", "benchmarks/*.py", "pyproject.toml")


@contextlib.contextmanager
def data_set(path: str | Path | None) -> Iterator[tuple[Path, str]]:
    """The data set to measure on and its name: ``path``, else the one of MMCOT_SCIENCEQA_DIR, else a drawn MiniSQA."""
    chosen = path or os.environ.get(DATA_VARIABLE)
    if chosen:
        name = "ScienceQA" if (Path(chosen) / "pid_splits.json").exists() else "own data"
        yield Path(chosen).absolute(), name
        return
    print(
        f"no data set is named (as an argument or by {DATA_VARIABLE}): these are generated texts (MiniSQA)", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        write_mini_sqa(folder, num_train=512, num_val=32, num_test=64)
        yield Path(folder), "generated (MiniSQA)"


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest of the rounds, and each of them."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "each": [float(f"{value:.6g}") for value in values],
    }


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """The summary of ``values`` over ``base``, round by round."""
    return summary([value / other for value, other in zip(values, base, strict=True)])


def spread(numbers: dict[str, Any], form: str = ".2f") -> str:
    """A summary as text: median (lowest to highest)."""
    return f"{numbers['median']:{form}} ({numbers['low']:{form}} to {numbers['high']:{form}})"


def write_results(folder: Path | None, name: str, numbers: dict[str, Any]) -> None:
    """Write ``<name>.json`` with the numbers and the conditions; nothing without a folder."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (path := folder / f"{name}.json").write_text(json.dumps({"conditions": conditions(), **numbers}, indent=1) + "\n")
    print(f"written: {path}", flush=True)


def conditions() -> dict[str, Any]:
    """Commit, versions and machine."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *CODE)),
        "versions": versions,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "load_average": round(os.getloadavg()[0], 1),
        "program_took_s": round(time.time() - psutil.Process().create_time()),
    }


def _git(*arguments: str) -> str:
    """What git prints; empty without git or a checkout."""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
