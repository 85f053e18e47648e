"""Writing a rank's part of a checkpoint behind the training.

The training stops only until its state is copied to main memory. A thread writes the copies and hashes the files. The
memory of the copies is used again for the next checkpoint: to get it from the system takes longer than to copy.

    copies = HostCopies(engine.checkpoint_engine)   # DeepSpeed saves into it
    engine.checkpoint_engine = copies
    engine.save_checkpoint(...)
    writer = copies.write()                         # in a thread
    writer.is_done, writer.result()
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.atomic_files import sha256_of_file

KEPT_FREE_BYTES = 1_000_000_000  # of main memory, when a state is copied


class HostCopies:
    """A checkpoint engine of DeepSpeed that copies what it is to save; everything else is the inner one's."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._states = inner, []
        self._used: list[Any] = []  # tensors of the states
        self._free: dict[Any, list[Any]] = defaultdict(list)  # by shape and type

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def preserves_storage_sharing(self) -> bool:
        """False: DeepSpeed need not copy tensors that share memory with larger ones, because the copies are compact."""
        return False

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the state; the file is written later, or at once where there is no memory for the copy."""
        if not self._has_room_for(state_dict):
            self._inner.save(state_dict, path)
            return
        copied: dict[Any, Any] = {}
        self._states.append((Path(path), copy_to_host(state_dict, copied, self._take)))
        self._used += copied.values()

    def _has_room_for(self, state: Any) -> bool:
        import psutil

        free = sum(tensor.nbytes for tensors in self._free.values() for tensor in tensors)
        return num_bytes(state) <= free + psutil.virtual_memory().available - KEPT_FREE_BYTES

    def write(self) -> FileWriter:
        """Begin to write what was copied since the last call."""
        states, used = self._states, self._used
        self._states, self._used = [], []
        return FileWriter(states, at_end=lambda: self._give_back(used))

    def _take(self, tensor: Any) -> Any:
        """Memory for a copy of a tensor, of an earlier checkpoint where there is any."""
        import torch

        free = self._free[tensor.shape, tensor.dtype]
        return free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)

    def _give_back(self, used: list[Any]) -> None:
        for tensor in used:
            self._free[tensor.shape, tensor.dtype].append(tensor)


class FileWriter:
    """Writes and hashes files in a thread.

    Args:
        states: what to write, each with its path.
        at_end: called when the states are not used any more.
    """

    def __init__(self, states: list[tuple[Path, Any]], *, at_end: Callable[[], None] = lambda: None) -> None:
        self._states, self._at_end = states, at_end
        self._error: BaseException | None = None
        self._files: dict[Path, dict[str, Any]] = {}
        # Not a daemon: a process that ends by itself first writes what it has begun.
        self._thread = threading.Thread(target=self._write, name="checkpoint-writer")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether ``result`` returns at once."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def result(self) -> dict[Path, dict[str, Any]]:
        """Wait for the end; returns size and sha256 of every file.

        Raises:
            BaseException: what kept a file from being written.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        return self._files

    def _write(self) -> None:
        import torch

        try:
            for path, state in self._states:
                with open(path, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                self._files[path] = {"size_bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        except BaseException as error:  # whatever it is, the checkpoint is not whole
            self._error = error
        finally:
            self._states = []
            self._at_end()


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
