"""Files that are read once: hashed while they are read into main memory, and loaded from there.

A pickle may be opened only after its sha256 has matched. Read into memory, it is read from the disk once, and what is
opened is what was hashed, whatever happens to the file meanwhile.

    held = HeldFiles()
    found = held.read(Path("weights.pt"), hold=True)       # {"size_bytes": ..., "sha256": ...}
    if found == expected:
        state = held.load("weights.pt", torch.load)        # called with the path of the memory
    held.clear()
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PIECE_BYTES = 4 << 20
_ZIP = b"PK\x03\x04"


class HeldFiles:
    """Contents of files in memory, each with a path that libraries can open (Linux's ``memfd_create``)."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._states: dict[Path, Any] = {}

    def __contains__(self, path: str | Path) -> bool:
        return Path(path) in self._descriptors

    def read(self, path: Path, *, hold: bool) -> dict[str, Any]:
        """Read a file to its end; returns its size and sha256.

        Args:
            hold: whether its content is kept in memory.
        """
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(open(path, "rb", buffering=0))
            memory = None
            if hold:
                descriptor = self._descriptors[path] = os.memfd_create(path.name)
                memory = stack.enter_context(open(descriptor, "wb", closefd=False))
            while count := source.readinto(buffer):
                digest.update(buffer[:count])
                size += count
                if memory is not None:
                    memory.write(buffer[:count])
        return {"size_bytes": size, "sha256": digest.hexdigest()}

    def load(self, path: str | Path, load: Callable[[str], Any]) -> Any:
        """The state in a held file, by ``load`` of its path in memory; its tensors are views of that memory.

        A file that is asked for twice is loaded once.
        """
        import torch.utils.serialization.config as serialization

        path = Path(path)
        if path not in self._states:
            descriptor = self._descriptors[path]
            # Else torch.load would copy the tensors; it maps no file of its format before version 1.6, which is no zip.
            with serialization.patch({"load.mmap": os.pread(descriptor, 4, 0) == _ZIP}):  # pyright: ignore[reportAttributeAccessIssue]
                self._states[path] = load(f"/proc/self/fd/{descriptor}")
        return self._states[path]

    def clear(self) -> None:
        """Free the memory, except what tensors still use."""
        self._states.clear()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
