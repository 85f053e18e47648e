"""What keeps a machine's GPUs from being used, in a sentence each, found before any work.

why_fewer(0, torch_version="2.13.0+cu130", torch_cuda="13.0")   # "its driver 550.54.15 knows 2, but supports ..."
check_free(visible_gpus(os.environ)[:2], report=print)          # raises "GPU 1 (...) has 0.9 of 80.0 GB free, ..."
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from launcher.config.settings import SettingsError
from launcher.runs.nvml import Gpu, NvmlError, all_gpus, driver_versions

_FULL = 0.1  # share of free memory below which a GPU cannot be used
_SHARED = 0.75  # below which another process is told


def num_installed() -> int:
    """The number of GPUs of this machine, whether or not torch can use them."""
    try:
        return len(all_gpus())
    except NvmlError:
        return 0


def why_fewer(found: int, *, torch_version: str, torch_cuda: str | None) -> str:
    """The reason why torch finds no GPU, or not all of this machine's; empty where none is known.

    Args:
        found: how many torch finds.
        torch_version: ``torch.__version__``.
        torch_cuda: ``torch.version.cuda``, the CUDA that torch was built for; None for a build without.
    """
    try:
        gpus, (driver, supported) = all_gpus(), driver_versions()
    except NvmlError as error:
        return "" if found else f"{error}; install NVIDIA's driver, and in a container give it the GPUs"
    if len(gpus) <= found:
        return "" if found else f"its driver {driver} knows none"
    present = f"its driver {driver} knows {len(gpus)}"
    variant = f"torch's build for CUDA {supported[0]} (the variant whose name begins with cu{supported[0]})"
    if torch_cuda is None:
        return f"{present}, but torch {torch_version} is a build without CUDA; install {variant}"
    # Within a major version of CUDA an older driver is enough.
    if supported[0] < int(torch_cuda.split(".")[0]):
        return (
            f"{present}, but supports CUDA up to {supported[0]}.{supported[1]}, and torch {torch_version} is built for "
            f"{torch_cuda}; update the driver, or install {variant}"
        )
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"{present}, and CUDA_VISIBLE_DEVICES={visible!r} hides the others"
    return f"{present}, which torch cannot open; `nvidia-smi` shows their state"


def _memory_of(gpu: Gpu) -> tuple[int, int] | None:
    """Bytes used and in all; None where the driver does not tell, as of a GPU that is split (MIG)."""
    try:
        return gpu.memory()
    except Exception:  # a class of NVML's for each of its errors
        return None


def check_free(gpus: Sequence[Gpu], *, others: Sequence[Gpu] = (), report: Callable[[str], None]) -> None:
    """Check that other processes have left the memory of GPUs to this run.

    Args:
        gpus: those that the run will use.
        others: further GPUs of the machine, of which the free ones are named.
        report: gets a sentence for a GPU of which a smaller part is in use.

    Raises:
        SettingsError: a GPU is full; the message names the processes that hold it.
    """
    for gpu in gpus:
        memory = _memory_of(gpu)
        if memory is None:
            continue
        used, total = memory
        share = (total - used) / max(1, total)
        if share >= _SHARED:
            continue
        holders = ", ".join(gpu.holders()) or "processes that are not visible from here"
        state = f"GPU {gpu.number} ({gpu.name}) has {(total - used) / 1e9:.1f} of {total / 1e9:.1f} GB free"
        if share >= _FULL:
            report(f"note: {state}, the rest is held by {holders}")
            continue
        free = [str(other.index) for other in others if (m := _memory_of(other)) and m[0] < (1 - _SHARED) * m[1]]
        advice = f", or take others: CUDA_VISIBLE_DEVICES={','.join(free)}" if free else ""
        raise SettingsError(f"{state}, held by {holders}; wait for them or end them{advice}")
