"""Where every member of a tar lies: the index beside it.

``text/train-000012.tar`` has ``text/train-000012.parquet``, a row a member in tar order:

    qid    extension  offset  size  crc32
    "10"   "json"     1536    812   3053104128

``offset`` and ``size`` (bytes) are those of the member's data, so that a sample is one
read. The index is made from any plain webdataset tar, wherever it lies; the tar is never
rewritten.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_shards.storage import committing

ALLOWED_EXTENSIONS = ("json", "txt", "npy", "safetensors", "png", "jpg", "jpeg", "webp")
_SCHEMA = pa.schema(
    [("qid", pa.string()), ("extension", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("crc32", pa.uint32())]
)  # fmt: skip


class ShardError(RuntimeError):
    """A shard or its index cannot be trusted; the message names the file."""


def build_index(tar_path: str | Path) -> pa.Table:
    """List the members of a tar.

    Raises:
        ShardError: the tar is damaged, or holds something other than plain files of the
            allowed extensions (pickles are never read).
    """
    rows: dict[str, list] = {name: [] for name in _SCHEMA.names}
    try:
        with tarfile.open(tar_path, "r:") as tar:  # of a compressed one the offsets would be none of the file's
            for member in tar:
                if member.isdir():
                    continue
                qid, _, extension = Path(member.name).name.partition(".")
                if not member.isfile() or member.issparse() or extension.lower() not in ALLOWED_EXTENSIONS:
                    raise ShardError(
                        f"{tar_path}: member {member.name!r} is not of an allowed kind; "
                        f"expected plain files ending in {', '.join('.' + e for e in ALLOWED_EXTENSIONS)}"
                    )
                data = tar.extractfile(member).read()
                if len(data) != member.size:
                    raise ShardError(f"{tar_path}: member {member.name!r} is cut off; write or fetch the shard again")
                row = (qid, extension.lower(), member.offset_data, member.size, zlib.crc32(data))
                for column, value in zip(rows.values(), row, strict=True):
                    column.append(value)
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{tar_path} is not a readable tar ({error}); write or fetch the shard again") from error
    return pa.Table.from_pydict(rows, schema=_SCHEMA)


def write_index(tar_path: str | Path, index_file: str | Path) -> pa.Table:
    """Build the index of a tar and commit it."""
    table = build_index(tar_path)
    with committing(index_file) as temporary:
        pq.write_table(table, temporary)
    return table


def read_index(index_file: str | Path) -> pa.Table:
    """Read the index of a tar.

    Raises:
        ShardError: there is none, or it is of another form.
    """
    remedy = "make it again with `mmcot data shard` or `mmcot data index`"
    try:
        with pq.ParquetFile(index_file) as file:
            table = file.read(use_threads=False)  # a tenth of a millisecond's work: read_table takes five times as long
    except FileNotFoundError as error:
        raise ShardError(f"index {index_file} is missing; {remedy}") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ShardError(f"{index_file} is not a readable index ({error}); {remedy}") from error
    if table.schema.names != _SCHEMA.names:
        raise ShardError(f"{index_file} has the columns {table.schema.names}, expected {_SCHEMA.names}; {remedy}")
    return table


def read_member(descriptor: int, *, offset: int, size: int, crc32: int, name: tuple[str | Path, str]) -> bytes:
    """Read one member's bytes from an open tar and hold them against their checksum.

    Raises:
        ShardError: fewer bytes than the index says, or other ones.
    """
    data = os.pread(descriptor, size, offset)
    check_member(data, size=size, crc32=crc32, name=name)
    return data


def check_member(data: bytes, *, size: int, crc32: int, name: tuple[str | Path, str]) -> None:
    """Hold a member's bytes against its index; ``name`` is the tar and the question.

    Raises:
        ShardError: fewer bytes than the index says, or other ones.
    """
    if len(data) != size or zlib.crc32(data) != crc32:
        raise ShardError(
            f"{name[0]}, question {name[1]}: the bytes are not those that were indexed (size {len(data)} of {size}, crc32 {zlib.crc32(data):08x} "
            f"instead of {crc32:08x}); the shard was cut off or altered: write or fetch it again"
        )


def rows_of_extension(table: pa.Table, extension: str) -> dict[str, np.ndarray]:
    """The columns of all members with one extension, in tar order, as numpy arrays."""
    chosen = table.filter(pc.equal(table["extension"], extension))
    return {name: chosen[name].to_numpy(zero_copy_only=False) for name in ("qid", "offset", "size", "crc32")}
