"""Stale locks of compiled extensions, left by a killed compilation."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

COMPILE_LOCK_STALE_S = 600.0  # the longest of DeepSpeed's extensions takes some three minutes


def clear_compile_locks(cache: Path | None = None) -> list[Path]:
    """Remove stale locks: every later compilation would wait for them without end and without a message.

    Args:
        cache: torch's folder of compiled extensions; default TORCH_EXTENSIONS_DIR or torch's own.
    """
    cache = cache or Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    stale = []
    for path in cache.glob("**/lock"):
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            if path.stat().st_mtime < time.time() - COMPILE_LOCK_STALE_S:
                path.unlink()
                stale.append(path)
    return stale
