"""Strict reading of tars: every member, in one pass from the file's first byte to its last.

Python's ``tarfile`` stops without an error at the first block that it cannot read, so that
questions of a truncated or changed tar would be lost silently. This module checks every block
of 512 bytes:

    header      its checksum must be right; extended headers (pax, GNU's long names) may precede it
    data        the number of bytes in the header, padded to a multiple of 512
    ...
    end mark    two blocks of zeros; then zeros up to the end of the file, or at a multiple of 10,240 bytes
                the header of another archive, which is read too (``cat a.tar b.tar``)

Anything else is an error. Some changes cannot be detected from the tar alone: the bytes of
members, and of names in extended headers, have no checksum in a tar (the index has one), and
a header's checksum is a sum, which two changed bytes may leave equal.
"""

from __future__ import annotations

import dataclasses
import re
import tarfile
import zlib
from collections.abc import Generator, Iterator
from typing import BinaryIO

BLOCK_BYTES = 512
RECORD_BYTES = 10_240  # tar writes whole records, so an appended archive starts at a record
MAX_EXTENDED_BYTES = 1 << 20  # of an extended header: names and times, in practice some hundred bytes
FILE, FOLDER = "a file", "a folder"

_ZEROS = bytes(BLOCK_BYTES)
_PIECE_BYTES = 4 << 20
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_KINDS = {
    tarfile.REGTYPE: FILE,
    tarfile.AREGTYPE: FILE,
    tarfile.CONTTYPE: FILE,
    tarfile.DIRTYPE: FOLDER,
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
# POSIX reserves keywords without a dot; any other such keyword is one of these with an altered letter.
_PAX_KEYWORDS = frozenset(
    b"atime charset comment ctime dev devmajor devminor gid gname hdrcharset ino linkpath mode mtime nlink path size "
    b"uid uname".split()
)
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class TarFormatError(ValueError):
    """A file is not a complete tar; the message names the byte or the member."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A member: the place of its data in the file, and its kind (``FILE``, ``FOLDER`` or another kind in words).

    ``archive`` is the number of its archive in the file, from 0.
    """

    name: str
    kind: str
    offset: int
    size: int
    crc32: int
    archive: int


def walk_tar(file: BinaryIO) -> Iterator[TarMember]:
    """Yield every member of a tar in order; after the last one the file has been read to its end.

    Args:
        file: opened for reading in binary mode, at its start; may be buffered.

    Raises:
        TarFormatError: the file is damaged, truncated, compressed or not a tar.
    """
    tar = _Tar(file, size_bytes=file.seek(0, 2))
    file.seek(0)
    start_bytes = file.read(BLOCK_BYTES)
    file.seek(0)
    if not start_bytes:
        raise TarFormatError("it is empty")
    for magic, packer in _COMPRESSIONS.items():
        if start_bytes.startswith(magic):
            raise TarFormatError(
                f"it is compressed ({packer}); decompress it, because samples are read by their offset in the file"
            )
    number, start = 0, 0
    while start is not None:
        yield from _walk_archive(tar, number, start)
        number, start = number + 1, tar.find_next_archive()


class _Tar:
    """A file read block by block; ``position`` is the start of the next block."""

    def __init__(self, file: BinaryIO, *, size_bytes: int) -> None:
        self._file, self.size_bytes, self.position = file, size_bytes, 0

    def read_block(self) -> bytes:
        """Read the next 512 bytes."""
        block = self._file.read(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise TarFormatError(
                f"it ends at byte {self.position + len(block):,} without the end mark of two blocks of zeros: it was "
                "cut off"
            )
        self.position += BLOCK_BYTES
        return block

    def read_content(self, size: int, what: str) -> Iterator[bytes]:
        """Yield the next ``size`` bytes in pieces, and skip the rest of their last block."""
        padded = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if size < 0 or self.position + padded > self.size_bytes:
            raise TarFormatError(
                f"{what} has a size of {size:,} bytes from byte {self.position:,} on, the file ends at byte "
                f"{self.size_bytes:,}: it was cut off or altered"
            )
        end = self.position + padded
        while self.position < end:
            piece = self._file.read(min(_PIECE_BYTES, end - self.position))
            if not piece:
                raise TarFormatError(f"it ends at byte {self.position:,}, within {what}: it was cut off")
            yield piece[:size]
            size -= min(size, len(piece))
            self.position += len(piece)

    def find_next_archive(self) -> int | None:
        """Move to the archive after the zeros that follow an end mark.

        Returns:
            The byte at which the archive starts, or None at the end of the file.
        """
        mark = self.position
        while piece := self._file.read(_PIECE_BYTES):
            if piece.count(0) < len(piece):
                other = self.position + len(piece) - len(piece.lstrip(b"\x00"))
                self.position = other - other % BLOCK_BYTES
                if self.position % RECORD_BYTES:
                    raise TarFormatError(
                        f"zeros end it at byte {mark:,} and byte {other:,} is none: a hole in the file, or something "
                        f"was added to it (another archive may follow at a multiple of {RECORD_BYTES:,} bytes only)"
                    )
                self._file.seek(self.position)
                return self.position
            self.position += len(piece)
        return None


def _walk_archive(tar: _Tar, number: int, start: int) -> Generator[TarMember, None, None]:
    """Yield the members of one archive, up to its end mark."""
    shared: dict[str, str] = {}  # pax records for all following members
    extended: dict[str, str] = {}  # records of extended headers for the next member
    while True:
        at, block = tar.position, tar.read_block()
        if block == _ZEROS:
            _check_end(tar, extended)
            return
        header = _parse_header(block, at, is_first=at == start)
        if header.type in (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            target = shared if header.type == tarfile.XGLTYPE else extended
            target |= _read_extended(tar, header, at)
            continue
        facts = {**shared, **extended}
        extended = {}
        yield _read_member(tar, header, facts, at, number)


def _read_member(tar: _Tar, header: tarfile.TarInfo, facts: dict[str, str], at: int, number: int) -> TarMember:
    name = facts.get("path", header.name)
    kind = _KINDS.get(header.type, f"of type {header.type!r}")
    if any(key.startswith("GNU.sparse.") for key in facts):
        kind = _KINDS[tarfile.GNUTYPE_SPARSE]
    offset, size, crc32 = tar.position, header.size, 0
    if "size" in facts:
        if not re.fullmatch(r"[0-9]{1,19}", facts["size"]):
            raise TarFormatError(
                f"member {name!r} at byte {at:,} has the size {facts['size'][:40]!r} in its extended header, no "
                "number of bytes"
            )
        size = int(facts["size"])
    if kind == FILE:
        for piece in tar.read_content(size, f"member {name!r}"):
            crc32 = zlib.crc32(piece, crc32)
    return TarMember(name, kind, offset, size if kind == FILE else 0, crc32, number)


def _parse_header(block: bytes, at: int, *, is_first: bool) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if is_first and at:
            raise TarFormatError(
                f"behind an archive, at byte {at:,}, there are neither zeros nor the header of another one ({error})"
            ) from None
        raise TarFormatError(f"at byte {at:,} there is no valid header of a member ({error})") from None


def _check_end(tar: _Tar, extended: dict[str, str]) -> None:
    """Check, after the first block of zeros, that the second follows and that no header lacks its member."""
    at = tar.position - BLOCK_BYTES
    if extended:
        raise TarFormatError(
            f"at byte {at:,} there are zeros in place of the member that the extended header before them describes"
        )
    if tar.position < tar.size_bytes and tar.read_block() == _ZEROS:
        return
    raise TarFormatError(
        f"there is one block of zeros at byte {at:,}, the end mark has two: it was cut off, or has a hole of zeros"
    )


def _read_extended(tar: _Tar, header: tarfile.TarInfo, at: int) -> dict[str, str]:
    """Read an extended header's records on members: path, size and others by pax's keywords."""
    what = f"the extended header at byte {at:,}"
    if not 0 < header.size <= MAX_EXTENDED_BYTES:
        raise TarFormatError(f"{what} has {header.size:,} bytes, expected 1 to {MAX_EXTENDED_BYTES:,}")
    data = b"".join(tar.read_content(header.size, what))
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": _text(data.rstrip(b"\x00"))}
    if header.type == tarfile.GNUTYPE_LONGNAME:
        name = data.rstrip(b"\x00")
        if not name or b"\x00" in name:
            raise TarFormatError(f"{what} holds {data[:80]!r}, expected a name")
        return {"path": _text(name)}
    return _parse_pax(data, what)


def _parse_pax(data: bytes, what: str) -> dict[str, str]:
    r"""Parse records such as ``27 path=a/long/name.json\n``; the number counts all bytes of its record."""
    facts, position = {}, 0
    while position < len(data):
        start = re.compile(rb"(\d{1,9}) ").match(data, position)
        end = position + int(start[1]) if start else position
        keyword, equals, value = data[start.end() if start else position : end - 1].partition(b"=")
        known = keyword in _PAX_KEYWORDS or b"." in keyword
        if not (start and equals and known and end <= len(data) and data[end - 1 : end] == b"\n"):
            raise TarFormatError(
                f"{what} holds {data[position : position + 80]!r}, expected a record of pax such as b'15 "
                "path=a.json\\n'"
            )
        facts[_text(keyword)] = _text(value)
        position = end
    return facts


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
