"""Scripts on a stand-in for CUDA: launches, copies, waits and memory are real, values and times are not.

MMCOT_FAKE_CUDA_DIR names its build, MMCOT_FAKE_CUDA_TOOLS the folder of its ``run``. Without them tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "fake_gpu" / "scripts"


def run_on_fake_gpu(script: str, *arguments: str, gpus: int = 1, gigabytes: int = 80) -> Any:
    """Run a script of tests/fake_gpu/scripts; returns the JSON of its last line."""
    result = run_file_on_fake_gpu(SCRIPTS / script, *arguments, gpus=gpus, gigabytes=gigabytes)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def run_file_on_fake_gpu(
    path: Path, *arguments: str, gpus: int = 1, gigabytes: int = 80, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a Python file in the repository; the caller checks its status."""
    build, tools = os.environ.get("MMCOT_FAKE_CUDA_DIR"), os.environ.get("MMCOT_FAKE_CUDA_TOOLS")
    if not build or not tools:
        pytest.skip("MMCOT_FAKE_CUDA_DIR and MMCOT_FAKE_CUDA_TOOLS are not set: there is no stand-in for a GPU here")
    repository = Path(__file__).parents[2]
    environment = {**os.environ, "FAKE_GPUS": str(gpus), "FAKE_GB": str(gigabytes)}
    return subprocess.run(
        [f"{tools}/run", build, sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=repository,
        timeout=timeout_s,
    )
