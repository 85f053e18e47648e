"""The environment of a run as tags: revision, versions, hardware, command line."""

from __future__ import annotations

import getpass
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from importlib import metadata

import psutil

from data_shards.credentials import hide_credentials

_PACKAGES = ("mmcot", "torch", "deepspeed", "transformers", "ray", "mlflow", "webdataset", "numpy")


def describe_environment() -> dict[str, str]:
    """Tags of this process's environment, with MLflow's own names where it has them."""
    tags = {
        "mlflow.source.name": hide_credentials(shlex.join(sys.argv)),
        "mlflow.source.type": "LOCAL",
        "mmcot.host": socket.gethostname(),
        "mmcot.hardware": f"{psutil.cpu_count()} processors, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"{platform.machine()}",
        "mmcot.python": platform.python_version(),
        "mmcot.versions": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = "unknown"
    if commit := _output("git", "rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["mmcot.git_is_clean"] = str(not _output("git", "status", "--porcelain", "--untracked-files=no"))
    if gpus := _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"):
        tags["mmcot.gpus"] = gpus.replace("\n", "; ")
    return tags


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _output(program: str, *arguments: str) -> str:
    """The output of a program; empty if it is missing or fails."""
    if shutil.which(program) is None:
        return ""
    try:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return ""
