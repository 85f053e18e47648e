"""Whether /dev/shm has room for what loader processes hand over: a container often gives it 64 MB.

A loader process that finds none is killed by the kernel (SIGBUS), which looks like a lost worker.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from launcher.config.settings import SettingsError

SHARED = Path("/dev/shm")


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of a block's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_shared_memory(block_bytes: int, *, blocks_ahead: int) -> None:
    """Check that the blocks which this machine's loader processes have ready fit.

    Args:
        block_bytes: of the largest block.
        blocks_ahead: that the processes of one rank have ready at once.

    Raises:
        SettingsError: they do not.
    """
    if not SHARED.is_dir():
        return
    needed = block_bytes * blocks_ahead * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed > (free := shutil.disk_usage(SHARED).free):
        raise SettingsError(
            f"training.loader_processes hand {needed / 1e6:,.0f} MB of blocks over by {SHARED}, which has "
            f"{free / 1e6:,.0f} MB free; give the container more (docker run --shm-size=8g, in Kubernetes an emptyDir "
            f"of medium Memory at {SHARED}), or set training.loader_processes=0"
        )
