"""Reading files of torch (.pth, .pt, .bin) as plain values: never as pickles that could run code."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcot.errors import InputError
from mmcot.file_kinds import describe_unreadable, fault_of


class TorchFileError(InputError):
    """A file of torch cannot be read; the message names it."""


def read_torch_file(path: str | Path, expected: str) -> Any:
    """Read what ``torch.save`` wrote, of its zip form (mapped into memory) or of the form before version 1.6.

    Args:
        expected: what the file should hold, for messages.

    Raises:
        TorchFileError: it is another file, is cut off, or holds more than tensors and plain values.
    """
    import torch

    path = Path(path)
    if (fault := fault_of(path, expected)) is not None:
        raise TorchFileError(fault)
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip and (altered := _altered_member(path)):  # torch does not compare the checksums
            raise TorchFileError(f"{path}: the bytes of {altered} were altered; download it again, or make it again")
        return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except (OSError, MemoryError, TorchFileError):
        raise
    except Exception as error:  # damaged pickles raise any
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise TorchFileError(_why(path, str(error), expected)) from None


def _altered_member(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip()
    except Exception:  # a damaged zip raises any; what can be read of it is torch's to say
        return None


def _why(path: Path, message: str, expected: str) -> str:
    if "TorchScript" in message:
        return f"{path} is a TorchScript program, which is never run, expected {expected}; save that with torch.save"
    if missing := re.search(r"expected (\d+) more bytes", message):
        size = path.stat().st_size
        return (
            f"{path} is cut off: {size:,} bytes, expected {size + int(missing[1]):,} at least; download it again, or "
            "make it again"
        )
    named = re.search(r"GLOBAL ([\w.]+)", message)
    if "weights_only" in message.lower() and "GLOBAL" in message:
        what = f", such as {named[1]}," if named else ""
        return (
            f"{path} holds Python objects{what} that are no plain tensors, which are never loaded, expected "
            f"{expected}; save tensors alone, without arrays of numpy or modules"
        )
    return describe_unreadable(path, expected)


def describe_value(value: Any) -> str:
    """Name what a file holds: ``a dict of 3 (keys 'a', 'b', 'c')``, ``a list of 2 (Tensor, int)``."""
    name = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {name} of {len(value)} (keys {_first([repr(key) for key in value])})"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"a {name} of {len(value)} ({_first([type(part).__name__ for part in value])})"
    return f"a {name}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
