"""What ``training.offload`` needs of a machine, checked before any work.

``offload=cpu`` needs nothing: the optimizer is torch's own fused AdamW, and DeepSpeed's, which would be compiled, is
not used. ``offload=nvme`` reads and writes through DeepSpeed's ``async_io``, which is compiled at its first use.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from launcher.config.settings import SettingsError, Training


def check_offload(
    training: Training,
    *,
    use_gpu: bool,
    missing_parts: Callable[[bool], list[str]] | None = None,
) -> None:
    """Check that DeepSpeed can compile what ``offload=nvme`` needs on this machine.

    Args:
        use_gpu: whether the training computes on GPUs.
        missing_parts: returns what is missing; None: ``find_missing``.

    Raises:
        SettingsError: a compiler, CUDA's toolkit or libaio is missing.
    """
    if training.offload != "nvme":
        return
    if missing := (missing_parts or find_missing)(use_gpu):
        raise SettingsError(
            f"training.offload=nvme compiles DeepSpeed's async_io, and this machine has no {', no '.join(missing)}; "
            "install them on every node, or use training.offload=cpu, which needs none"
        )


def find_missing(use_gpu: bool) -> list[str]:
    """What this machine lacks to compile ``async_io``; empty where DeepSpeed was installed with it."""
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get("async_io"):
        return []
    missing = [f"{tool} ({why})" for tool, why in _TOOLS.items() if shutil.which(tool) is None]
    if use_gpu:
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            missing.append("CUDA toolkit (nvcc, or CUDA_HOME)")
    if not any(tool.startswith("g++") for tool in missing):
        from deepspeed.ops import op_builder

        builders: Any = op_builder  # it adds its classes while it is imported
        if not builders.AsyncIOBuilder().has_function("io_submit", ("aio",)):
            missing.append("libaio with its headers (package libaio-dev or libaio-devel)")
    return missing


_TOOLS = {"g++": "a C++ compiler", "ninja": "the build tool"}
