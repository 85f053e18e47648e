"""How much main memory copies of a training's state may take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

KEPT_FREE_BYTES = 1_000_000_000  # of main memory, for everything else


# A container's limit and use, in the two versions of Linux' control groups.
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]


def free_bytes() -> int:
    """Bytes of main memory that a copy may take, of this machine or of the container."""
    import psutil

    available = psutil.virtual_memory().available
    return min([available, *(limit - used for limit, used in _limits())]) - KEPT_FREE_BYTES


def total_bytes() -> int:
    """Bytes of main memory, of this machine or of the container."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def _limits() -> list[tuple[int, int]]:
    """The container's limit and what it uses of it, where there is a limit."""
    found = []
    for names in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file
            limit, used = (int((_CGROUP / name).read_text()) for name in names)
            found.append((limit, used))
    return found


def may_hold(size_bytes: int) -> bool:
    """Whether files of this size may be held in memory by each rank of this machine before an engine is built.

    The engine takes about as much as the files of its state, and so do the tensors that it keeps of them.
    """
    return 3 * size_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= free_bytes()
