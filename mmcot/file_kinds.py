"""What a file is that cannot be opened as what it should be, and what to do about it.

    describe_unreadable("vit.pth", "a tensor of torch")
    # vit.pth is a Git LFS pointer (it stands for 1,141,234 bytes), expected a tensor of torch; run `git lfs pull` ...

Only the start of a file and its size are read, and the whole of a JSON file. Nothing in it is ever run.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path

_START = 4096  # bytes, of which the kind is told
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how such a file starts
_AGAIN = "download it again, or make it again"
_PACKED = {  # by their first bytes; how each is unpacked
    b"\x1f\x8b": ("a gzip file", "unpack it with gunzip"),
    b"BZh": ("a bzip2 file", "unpack it with bunzip2"),
    b"\xfd7zXZ\x00": ("an xz file", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it with unzstd"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "unpack it"),
    b"Rar!": ("a RAR archive", "unpack it"),
    b"PK\x03\x04": (
        "a zip archive (.npz files and torch's files are such too)",
        "unpack it, or give it its own ending",
    ),
    b"PK\x05\x06": ("an empty zip archive", _AGAIN),
}
_ENDINGS_OF_ZIPS = (".pth", ".pt", ".bin", ".npz", ".zip")
_ENDINGS_OF_TORCH = (".pth", ".pt", ".bin")
_MAGIC_OF_TORCH = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # of its form before version 1.6, behind the start of a pickle


def describe_unreadable(path: str | Path, expected: str) -> str:
    """Return a sentence on a file that could not be read as ``expected``: what it is, and what to do."""
    path = Path(path)
    if (fault := fault_of(path, expected)) is not None:
        return fault
    start = _start_of(path)
    what = f"cannot be read ({path.stat().st_size:,} bytes that start with {start[:12]!r})"
    return f"{path} {what}, expected {expected}; {_AGAIN}"


def fault_of(path: str | Path, expected: str = "the file itself") -> str | None:
    """Return a sentence on a file that is not of the kind that its ending says, or cut off; None for any other."""
    path = Path(path)
    size, start = path.stat().st_size, _start_of(path)
    if (found := _stand_in(path, size, start)) is None:
        found = _of_another_kind(path, start) or _cut_off(path, size, start)
    if found is None:
        return None
    what, remedy = found
    return f"{path} {what}, expected {expected}; {remedy}"


def is_stand_in(path: str | Path) -> bool:
    """Whether a file is empty, a Git LFS pointer or a page that was saved in its place."""
    return _stand_in(Path(path), Path(path).stat().st_size, _start_of(Path(path))) is not None


def _start_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_START)


def _stand_in(path: Path, size: int, start: bytes) -> tuple[str, str] | None:
    if not size:
        return "is empty (0 bytes)", _AGAIN
    if start.startswith(LFS_POINTER):
        size_line = re.search(rb"^size (\d+)", start, re.MULTILINE)
        stands_for = f" (it stands for {int(size_line[1]):,} bytes)" if size_line else ""
        return (
            f"is a Git LFS pointer{stands_for}",
            "run `git lfs pull` in its repository (install git-lfs first), or download the file itself",
        )
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:2].startswith((b"<!", b"<?", b"<h", b"<H")):
        return (
            f"is an HTML or XML page of {size:,} bytes",
            "download the file again: a login or error page was saved instead of it, so look at the address",
        )
    return None


def _of_another_kind(path: Path, start: bytes) -> tuple[str, str] | None:
    ending = path.suffix.lower()
    for magic, (what, remedy) in _PACKED.items():
        if start.startswith(magic) and not (magic.startswith(b"PK\x03") and ending in _ENDINGS_OF_ZIPS):
            return f"is {what}", remedy
    if start[257:262] == b"ustar":
        return "is a tar archive", "unpack it"
    if start.startswith(b"\x93NUMPY") and ending != ".npy":
        return "is an array of numpy", "give it the ending .npy"
    if start.startswith(b"\x89HDF"):
        return "is an HDF5 file, such as TensorFlow's weights", "download the weights for PyTorch"
    is_pickle = len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5
    if is_pickle and (ending not in _ENDINGS_OF_TORCH or _MAGIC_OF_TORCH not in start[:40]):
        return "is a pickle of Python, which is never loaded", "save the values alone in the expected form"
    if ending == ".json":
        return _no_json(path)
    if _is_safetensors(start) and ending != ".safetensors":
        return "is a safetensors file", "give it the ending .safetensors"
    if ending in (".txt", ".model") or not start.isascii() or re.search(rb"[\x00-\x08\x0e-\x1f]", start):
        return None
    kind = "a JSON file" if start.lstrip()[:1] in (b"{", b"[") else "a text file"
    return f"is {kind} that starts with {start[:40].decode()!r}", _AGAIN


def _no_json(path: Path) -> tuple[str, str] | None:
    try:
        json.loads(path.read_bytes())
    except RecursionError:
        return "is JSON that is nested too deeply", _AGAIN
    except UnicodeDecodeError:
        return "is no text and so no JSON", _AGAIN
    except ValueError as error:
        place = f" at line {error.lineno}, character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return f"is no valid JSON{place} (of {path.stat().st_size:,} bytes; it may be cut off)", _AGAIN
    return None


def _is_safetensors(start: bytes) -> bool:
    return len(start) > 10 and start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 32


def _cut_off(path: Path, size: int, start: bytes) -> tuple[str, str] | None:
    ending = path.suffix.lower()
    if ending == ".safetensors":
        expected = _size_of_safetensors(path, size)
        if expected is None:
            return f"of {size:,} bytes does not start as a safetensors file does", _AGAIN
        if expected != size:
            state = "is cut off" if size < expected else "has bytes behind its end"
            return f"{state}: {size:,} bytes, its header says {expected:,}", _AGAIN
    if ending in _ENDINGS_OF_ZIPS and start.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            return f"is cut off: {size:,} bytes of a zip archive without its end, which lists its files", _AGAIN
        if ending in _ENDINGS_OF_TORCH and not _is_of_torch(path):
            return "is a zip archive that torch.save did not write", "give the file that it did write"
    return None


def _is_of_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError):
        return True  # a damaged one, as torch will say
    return any(name.rpartition("/")[2] in ("data.pkl", "constants.pkl") for name in names)


def _size_of_safetensors(path: Path, size: int) -> int | None:
    """The size that the header tells; None where there is no header."""
    with open(path, "rb") as file:
        first = file.read(8)
        if len(first) < 8:
            return None
        (length,) = struct.unpack("<Q", first)
        if length > 100_000_000:  # the format's own limit
            return None
        if 8 + length > size:
            return 8 + length if file.read(1) == b"{" else None
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None
    return 8 + length + max(ends, default=0) if all(isinstance(end, int) for end in ends) else None
