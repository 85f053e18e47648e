"""Reading arrays of floats in numpy's file format, of every version (1.0, 2.0, 3.0), order and byte order.

    parse_npy(data, name="t.tar, member a.npy")    # float16, float32 or float64, in C order
    open_npy("detr.npy")                           # mapped into memory

A header is compared with the size of the file before any array is made, so that a wrong one costs no memory. Arrays
of Python objects are pickles and are never read.
"""

from __future__ import annotations

import ast
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmcot.errors import InputError
from mmcot.file_kinds import LFS_POINTER

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}  # of the header's length, by format version
_MOST_HEADER = 10_000  # bytes; numpy's own limit
_MOST_AXES = 32


class NpyError(InputError):
    """An array cannot be read; the message names the file, or the tar and its member."""


@dataclass(frozen=True, slots=True)
class _Header:
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    start: int  # of the values, in bytes

    @property
    def order(self) -> str:
        return "F" if self.fortran_order else "C"


def parse_npy(data: bytes, *, name: str) -> np.ndarray:
    """Parse the bytes of an .npy file; without a copy where they are in C order and of this machine's byte order.

    Raises:
        NpyError: they are no array of floats, or more or fewer values than the header says.
    """
    header = _read_header(data, len(data), name)
    array = np.frombuffer(data, header.dtype, offset=header.start).reshape(header.shape, order=header.order)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return np.ascontiguousarray(array, header.dtype.newbyteorder("="))


def open_npy(path: str | Path) -> np.ndarray:
    """Map an .npy file into memory, to be read only.

    Raises:
        NpyError: as ``parse_npy``.
    """
    path = Path(path)
    with open(path, "rb") as file:
        header = _read_header(file.read(12 + _MOST_HEADER), path.stat().st_size, str(path))
    if not math.prod(header.shape):  # an empty file part cannot be mapped
        return np.zeros(header.shape, header.dtype)
    return np.memmap(path, header.dtype, "r", header.start, header.shape, order=header.order)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _read_header(start: bytes, size: int, name: str) -> _Header:
    if start.startswith(LFS_POINTER):
        raise NpyError(f"{name} is a Git LFS pointer, expected an array of numpy; run `git lfs pull` and make it again")
    num_bytes = _LENGTH_BYTES.get(tuple(start[6:8]))  # pyright: ignore[reportArgumentType]
    if not start.startswith(_MAGIC):
        raise NpyError(
            f"{name} is no array in numpy's format ({size:,} bytes that start with {start[:12]!r}); write it "
            "with np.save"
        )
    if num_bytes is None:
        version = ".".join(map(str, start[6:8]))
        raise NpyError(f"{name} is of npy format {version}, expected 1.0, 2.0 or 3.0; write it with np.save")
    end = 8 + num_bytes + int.from_bytes(start[8 : 8 + num_bytes], "little")
    if end > size:
        raise NpyError(
            f"{name} is cut off: {size:,} bytes, its header alone has {end:,}; download it again, or make it again"
        )
    if end - 8 - num_bytes > _MOST_HEADER:
        raise NpyError(
            f"{name} has a header of {end:,} bytes, expected at most {_MOST_HEADER:,}; make it again with np.save"
        )
    try:
        dtype, shape, fortran_order = _parse_header(start[8 + num_bytes : end])
    except NpyError as error:
        raise NpyError(f"{name} {error}") from None
    expected = end + math.prod(shape) * dtype.itemsize
    if expected != size:
        state = "is cut off" if size < expected else "has bytes behind its values"
        raise NpyError(
            f"{name} {state}: {size:,} bytes, its header says {expected:,} (shape {shape}, {dtype}); download it "
            "again, or make it again"
        )
    return _Header(dtype, shape, fortran_order, end)


@functools.lru_cache(256)
def _parse_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Read dtype, shape and order; errors have no file name, because equal headers are read once."""
    try:
        facts = ast.literal_eval(header.decode("utf-8").strip())
        descr, shape, fortran_order = facts["descr"], facts["shape"], facts["fortran_order"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise NpyError(f"has a header that is not valid ({header[:60]!r}); make it again with np.save") from None
    dtype = _dtype(descr)
    plain = isinstance(shape, tuple) and all(type(length) is int and length >= 0 for length in shape)
    if not plain or type(fortran_order) is not bool or len(shape) > _MOST_AXES:
        raise NpyError(
            f"has a header that is not valid (shape {str(shape)[:60]}, fortran_order {str(fortran_order)[:20]}); make "
            "it again with np.save"
        )
    if math.prod(length or 1 for length in shape) * dtype.itemsize >= 1 << 62:
        raise NpyError(f"has a header of an impossible shape {str(shape)[:60]}; make it again with np.save")
    return dtype, shape, fortran_order


def _dtype(descr: object) -> np.dtype:
    try:
        dtype = np.dtype(descr) if isinstance(descr, str) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is not None and dtype.hasobject:
        raise NpyError(
            "holds Python objects, which are pickles and never loaded, expected floats; save np.stack(rows) of arrays "
            "of one shape and type"
        )
    if dtype is None or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        name = str(dtype or descr)[:60]
        raise NpyError(f"holds values of type {name}, expected float16, float32 or float64; convert them with .astype")
    return dtype
