"""Writing a rank's part of a checkpoint behind the training.

The training stops only until its state is copied to main memory. A thread writes the copies and hashes the files. The
memory of the copies is used again for the next checkpoint: to get it from the system takes longer than to copy. For the
first one a thread gets it ahead (``reserve``).

    copies = HostCopies(engine.checkpoint_engine)   # DeepSpeed saves into it
    engine.checkpoint_engine = copies
    copies.reserve(lambda: engine.save_checkpoint(...))   # nothing is copied or written
    engine.save_checkpoint(...)
    writer = copies.write()                         # in a thread
    writer.is_done, writer.result()
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from launcher.training.background import Background
from launcher.training.held_files import HeldFiles
from launcher.training.host_memory import free_bytes


class HostCopies:
    """A checkpoint engine of DeepSpeed that copies what it is to save, and loads files that are held in memory.

    Everything else is the inner engine's.
    """

    def __init__(self, inner: Any) -> None:
        self._inner, self._states = inner, []
        self._used: list[Any] = []  # tensors of the states
        self._free: dict[Any, list[Any]] = defaultdict(list)  # by shape and type
        self._wanted: list[Any] | None = None  # shapes and types, while ``reserve`` collects them
        self._reserving: Background[None] | None = None
        self._held: HeldFiles | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def preserves_storage_sharing(self) -> bool:
        """False: DeepSpeed need not copy tensors that share memory with larger ones, because the copies are compact."""
        return False

    def reserve(self, save: Callable[[], Any]) -> None:
        """Get memory for the copies of a first checkpoint in a thread, where main memory has room for them.

        Args:
            save: saves a state by this engine as a checkpoint does; nothing is copied or written.
        """
        self._wanted = []
        try:
            save()
        finally:
            wanted, self._wanted = self._wanted, None
        self._reserving = Background(lambda: self._get_memory(wanted), name="checkpoint-memory", daemon=True)

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the state; the file is written later, or at once where there is no memory for the copy."""
        if self._wanted is not None:
            copy_to_host(state_dict, {}, self._want)
            return
        self.wait_for_memory()
        if not self._has_room_for(state_dict):
            self._inner.save(state_dict, path)
            return
        copied: dict[Any, Any] = {}
        self._states.append((Path(path), copy_to_host(state_dict, copied, self._take)))
        self._used += copied.values()

    def wait_for_memory(self) -> None:
        """Wait until the memory that ``reserve`` asked for is there.

        Raises:
            BaseException: what kept the thread from getting it.
        """
        if self._reserving is not None:
            reserving, self._reserving = self._reserving, None
            reserving.result()

    @contextlib.contextmanager
    def holding(self, files: HeldFiles) -> Iterator[None]:
        """Load these files from memory in the block, which needs less than reading them again."""
        self._held = files
        try:
            yield
        finally:
            self._held = None

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file; one that was verified while it was read into memory is loaded from there."""
        if self._held is not None and path in self._held:
            return self._held.load(path, lambda place: self._inner.load(place, map_location))
        return self._inner.load(path, map_location)

    def write(self) -> FileWriter:
        """Begin to write what was copied since the last call."""
        states, used = self._states, self._used
        self._states, self._used = [], []
        return FileWriter(states, at_end=lambda: self._give_back(used))

    def _has_room_for(self, state: Any) -> bool:
        free = sum(tensor.nbytes for tensors in self._free.values() for tensor in tensors)
        return num_bytes(state) <= free + free_bytes()

    def _want(self, tensor: Any) -> Any:
        import torch

        assert self._wanted is not None
        self._wanted.append((tensor.shape, tensor.dtype))
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def _get_memory(self, wanted: list[Any]) -> None:
        """Allocate tensors and touch their pages, all or none."""
        import torch

        if sum(shape.numel() * dtype.itemsize for shape, dtype in wanted) > free_bytes():
            return
        tensors = []
        for shape, dtype in wanted:
            if shape.numel() * dtype.itemsize > free_bytes():  # others take memory at the same time
                return
            tensors.append(torch.empty(shape, dtype=dtype).zero_())
        self._give_back(tensors)

    def _take(self, tensor: Any) -> Any:
        """Memory for a copy of a tensor, of an earlier checkpoint where there is any."""
        import torch

        free = self._free[tensor.shape, tensor.dtype]
        return free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)

    def _give_back(self, used: list[Any]) -> None:
        for tensor in used:
            self._free[tensor.shape, tensor.dtype].append(tensor)


class FileWriter(Background[dict[Path, dict[str, Any]]]):
    """Writes and hashes files in a thread; its result is the size and sha256 of every file.

    Args:
        states: what to write, each with its path.
        at_end: called when the states are not used any more.
    """

    def __init__(self, states: list[tuple[Path, Any]], *, at_end: Callable[[], None] = lambda: None) -> None:
        # Not a daemon: a process that ends by itself first writes what it has begun.
        super().__init__(lambda: _write(states, at_end), name="checkpoint-writer")


def _write(states: list[tuple[Path, Any]], at_end: Callable[[], None]) -> dict[Path, dict[str, Any]]:
    files = {}
    try:
        for path, state in states:
            files[path] = save_hashed(state, path)
    finally:
        states.clear()
        at_end()
    return files


def save_hashed(state: Any, path: Path) -> dict[str, Any]:
    """Write a state; returns the size and sha256 of what was written, whatever happens to the file afterwards."""
    import torch

    with open(path, "wb") as file:
        torch.save(state, hashed := _Hashed(file))  # pyright: ignore[reportArgumentType] (it only writes)
        file.flush()
        os.fsync(file.fileno())
    return {"size_bytes": hashed.size_bytes, "sha256": hashed.digest.hexdigest()}


class _Hashed:
    """A file to write to from its beginning to its end, and the sha256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.size_bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write bytes."""
        self.digest.update(data)
        self.size_bytes += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._file.flush()


def num_bytes(state: Any) -> int:
    """Bytes of the tensors of a state, at most: one that occurs twice counts twice."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(num_bytes, state.values()))
    return sum(map(num_bytes, state)) if type(state) in (list, tuple) else 0


def copy_to_host(value: Any, copied: dict[Any, Any], take: Callable[[Any], Any]) -> Any:
    """A copy of a state of nested dicts, lists and tuples, its tensors in main memory; a tensor is copied once.

    Args:
        copied: the copies so far; further ones are added.
        take: returns memory for the copy of a tensor.
    """
    import torch

    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() == 0 or key not in copied:
            copied[key] = take(value).copy_(value.detach())
        return copied[key]
    if type(value) in (dict, OrderedDict):
        return type(value)((name, copy_to_host(each, copied, take)) for name, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(copy_to_host(each, copied, take) for each in value)
    return value
