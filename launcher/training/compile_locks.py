"""Stale locks of compiled extensions, which a killed compilation leaves."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

COMPILE_LOCK_STALE_S = 600.0  # the longest of DeepSpeed's extensions takes some three minutes


def clear_compile_locks(cache: Path | None = None) -> list[Path]:
    """Remove what a killed compilation left, on which every later one would wait for ever, in silence.

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
