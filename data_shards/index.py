"""The index of a tar: the offset, size and checksum of every member.

``text/train-000012.tar`` has ``text/train-000012.parquet``, one row per member in tar order:

    qid    extension  offset  size  crc32
    "10"   "json"     1536    812   3053104128

``offset`` and ``size`` (bytes) are those of the member's data, so that a sample is one
read. Any plain webdataset tar can be indexed, local or remote; the tar is never rewritten.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.atomic_files import committing
from data_shards.errors import ShardError
from data_shards.tars import FILE, FOLDER, TarFormatError, TarMember, walk_tar
from mmcot.file_kinds import describe_unreadable, is_stand_in

PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
ALLOWED_EXTENSIONS = ("json", "txt", "npy", "safetensors", *PICTURE_EXTENSIONS)
_SCHEMA = pa.schema(
    [
        ("qid", pa.string()),
        ("extension", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
    ]
)


def build_index(
    tar_path: str | Path, *, name: str | Path | None = None, report: Callable[[str], None] | None = None
) -> pa.Table:
    """List the members of a tar, which is read to its end.

    Args:
        name: the tar's name in messages, where ``tar_path`` is a copy.
        report: called with a line on a file that contains several concatenated archives.

    Raises:
        ShardError: the tar is damaged or truncated, or contains something other than plain files of
            the allowed extensions (pickles are never read).
    """
    name = name or tar_path
    rows: list[tuple] = []
    seen: set[tuple[str, str]] = set()
    twice: set[tuple[str, str]] = set()
    num_archives = 1
    try:
        with open(tar_path, "rb") as file:
            for member in walk_tar(file):
                num_archives = member.archive + 1
                if member.kind != FOLDER:
                    rows.append(row := _row(member, name))
                    twice |= {row[:2]} & seen
                    seen.add(row[:2])
    except TarFormatError as error:
        if os.path.getsize(tar_path) and is_stand_in(tar_path):
            raise ShardError(describe_unreadable(tar_path, "a tar")) from error
        raise ShardError(f"{name} is not a readable tar: {error}; write or fetch the shard again") from error
    # Of a question that is there twice the reader of questions tells both places.
    if lost := sorted(key for key in twice if (key[0], "json") not in twice):
        raise ShardError(
            f"{name}: the question {lost[0][0]!r} has two members ending in .{lost[0][1]}, of which one would be lost "
            "(folders in a tar do not count); rename one, or write the shard again without it"
        )
    if num_archives > 1 and report is not None:
        report(f"{name} contains {num_archives} concatenated archives; all of them are read")
    columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
    return pa.Table.from_arrays(
        [pa.array(list(column), field.type) for column, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def _row(member: TarMember, tar: str | Path) -> tuple[str, str, int, int, int]:
    qid, _, extension = Path(member.name).name.partition(".")
    allowed = extension.lower() in ALLOWED_EXTENSIONS or is_picture(extension.lower())
    if member.kind != FILE or not allowed:
        raise ShardError(
            f"{tar}: member {member.name!r} is not of an allowed kind ({member.kind}); expected plain files ending in "
            f"{', '.join('.' + e for e in ALLOWED_EXTENSIONS)}: write the shard again without it"
        )
    # Bytes that are not UTF-8 are decoded to lone surrogates, which an index cannot store.
    if any("\ud800" <= letter <= "\udfff" for letter in qid):
        raise ShardError(
            f"{tar}: the name of member {member.name!r} is no UTF-8; expected letters, digits, '_' and '-' up to the "
            "first dot"
        )
    return qid, extension.lower(), member.offset, member.size, member.crc32


def is_picture(extension: str) -> bool:
    """Whether members with this extension are pictures: ``png``, or ``0.png`` of a question with several."""
    number, _, kind = extension.rpartition(".")
    return kind in PICTURE_EXTENSIONS and (not number or (number.isascii() and number.isdigit()))


def picture_order(extension: str) -> tuple[int, int]:
    """A key to sort extensions of pictures by: those without a number first, then by number."""
    number, _, kind = extension.rpartition(".")
    return (int(number) if number else -1, PICTURE_EXTENSIONS.index(kind))


def write_index(
    tar_path: str | Path,
    index_file: str | Path,
    *,
    name: str | Path | None = None,
    report: Callable[[str], None] | None = None,
) -> pa.Table:
    """Build the index of a tar and commit it; ``name`` and ``report`` as for ``build_index``."""
    table = build_index(tar_path, name=name, report=report)
    with committing(index_file) as temporary:
        pq.write_table(table, temporary)
    return table


def read_index(index_file: str | Path, *, sha256: str | None = None) -> pa.Table:
    """Read the index of a tar.

    Args:
        sha256: of the file; None: not known.

    Raises:
        ShardError: the index is missing, was altered, or has another form.
    """
    remedy = "build it again with `mmcot data shard` or `mmcot data index`"
    try:
        data = Path(index_file).read_bytes()
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise ShardError(
                f"{index_file} is not the index that was written: its sha256 is {found[:12]}..., the manifest has "
                f"{sha256[:12]}...; restore it, or {remedy}"
            )
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            table = file.read(use_threads=False)  # takes 0.1 ms; read_table takes five times as long
        table.validate(full=True)
    except FileNotFoundError as error:
        raise ShardError(f"index {index_file} is missing; {remedy}") from error
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise ShardError(f"{index_file} is not a readable index ({error}); {remedy}") from error
    if table.schema.names != _SCHEMA.names:
        raise ShardError(f"{index_file} has the columns {table.schema.names}, expected {_SCHEMA.names}; {remedy}")
    if not table.schema.equals(_SCHEMA) or any(column.null_count for column in table.columns):
        raise ShardError(
            f"{index_file} has columns of types {table.schema.types} or empty cells in them, expected {_SCHEMA.types} "
            f"without empty cells; {remedy}"
        )
    return table


def read_member(descriptor: int, *, offset: int, size: int, crc32: int, name: tuple[str | Path, str]) -> bytes:
    """Read one member's bytes from an open tar and verify their checksum.

    Raises:
        ShardError: the size or the checksum differs from the index.
    """
    data = os.pread(descriptor, size, offset)
    check_member(data, size=size, crc32=crc32, name=name)
    return data


def check_member(data: bytes, *, size: int, crc32: int, name: tuple[str | Path, str]) -> None:
    """Verify a member's bytes against its index.

    Args:
        name: the tar and the question.

    Raises:
        ShardError: the size or the checksum differs from the index.
    """
    if len(data) != size or zlib.crc32(data) != crc32:
        raise ShardError(
            f"{name[0]}, question {name[1]}: the bytes are not those that were indexed (size {len(data)} of {size}, "
            f"crc32 {zlib.crc32(data):08x} instead of {crc32:08x}); the shard was cut off or altered: write or fetch "
            "it again"
        )


def rows_of_extension(table: pa.Table, extension: str) -> dict[str, np.ndarray]:
    """Return the columns of all members with one extension, in tar order, as numpy arrays."""
    equals = pc.equal(table["extension"], extension)  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    chosen = table.filter(equals)
    return {name: chosen[name].to_numpy(zero_copy_only=False) for name in ("qid", "offset", "size", "crc32")}
