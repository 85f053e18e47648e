"""How much main memory copies of a training's state may take."""

from __future__ import annotations

import os

KEPT_FREE_BYTES = 1_000_000_000  # of main memory, for everything else


def free_bytes() -> int:
    """Bytes of this machine's main memory that a copy may take."""
    import psutil

    return psutil.virtual_memory().available - KEPT_FREE_BYTES


def may_hold(size_bytes: int) -> bool:
    """Whether files of this size may be held in memory by each rank of this machine before an engine is built.

    The engine takes about as much as the files of its state, and so do the tensors that it keeps of them.
    """
    return 3 * size_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= free_bytes()
