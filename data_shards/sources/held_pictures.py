"""Pictures in the rows of Arrow tables, as ``datasets`` and pandas write them: ``{"bytes": ..., "path": ...}``.

A picture is a file name, its encoded bytes, or a struct of both, in the column ``image``, alone or in a list, or in a
part of a document. A sample has names alone; ``images_of`` gives what a row holds, in the same order.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from data_shards.sources.columns import Columns
from data_shards.sources.parquet_rows import RowsByNumber
from data_shards.sources.question_set import Picture
from mmcot.texts.sample import Sample

_COLUMNS = ("image", "document", "choices")  # those that ``images_of`` needs
_OPEN_FILES = 4


class PicturesOfTables:
    """The pictures of samples of tables: files of a folder, or bytes in the rows of Parquet files, read when asked for.

    Attributes:
        whole: the samples of which the tables hold every picture.
    """

    def __init__(self, folder: Path, names: Columns) -> None:
        self.whole: set[str] = set()
        self._folder, self._names = folder, names
        self._rows: dict[str, tuple[Path, int]] = {}  # by qid, where the row holds a picture
        self._opened = functools.lru_cache(_OPEN_FILES)(lambda file: RowsByNumber(file, names.of(_COLUMNS)))

    @staticmethod
    def named(file: Path, row: dict[str, Any]) -> dict[str, Any]:
        """A row with names in place of the pictures that it holds; only Parquet can hold any."""
        return with_names(row) if file.suffix.lower() == ".parquet" else row

    def add(self, file: Path, number: int, row: dict[str, Any], sample: Sample) -> None:
        """Learn what a row holds."""
        if sample.images and file.suffix.lower() == ".parquet":
            held = [bytes_of(image) is not None for image in images_of(row)]
            if any(held):
                self._rows[sample.qid] = (file, number)
            if all(held):
                self.whole.add(sample.qid)

    def pictures(self, sample: Sample) -> list[Picture]:
        """The pictures of a sample."""
        if (place := self._rows.get(sample.qid)) is None:
            return [self._folder / name for name in sample.images]
        row = self._names.take(self._opened(place[0])[place[1]])
        return pictures_of(row, sample.images, self._folder)


def with_names(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose pictures are names, and a document's parts without the fields that Arrow fills with null."""
    if _is_document(row):
        return {**row, "document": [_part(part) for part in row["document"]]}
    if row.get("image") is not None:
        return {**row, "image": [_name(image) for image in _as_list(row["image"])]}
    return row


def images_of(row: dict[str, Any]) -> list[Any]:
    """Return a row's pictures, those of a document in the order of its parts."""
    if _is_document(row):
        return [part["image"] for part in row["document"] if part.get("image") not in (None, "")]
    return _as_list(row.get("image"))


def bytes_of(image: Any) -> bytes | None:
    """The encoded picture itself; None where there is only a name."""
    return (image.get("bytes") or None) if isinstance(image, dict) else image if isinstance(image, bytes) else None


def pictures_of(row: dict[str, Any], names: tuple[str, ...], folder: Path) -> list[Picture]:
    """Return the pictures of a row with these names: the bytes that it holds, or a file of the folder."""
    return [bytes_of(image) or folder / name for image, name in zip(images_of(row), names, strict=True)]


def _is_document(row: dict[str, Any]) -> bool:
    return bool(row.get("document") and not row.get("choices")) and isinstance(row["document"], list)


def _part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {name: _name(value) for name, value in part.items() if value not in (None, "")}


def _as_list(image: Any) -> list[Any]:
    """Return a row's pictures as a list, without empty values."""
    return [each for each in (image if isinstance(image, list) else [image]) if each not in (None, "")]


def _name(image: Any) -> Any:
    if isinstance(image, bytes):
        return "no-picture" if not image else "picture"
    if not isinstance(image, dict):
        return image
    name = image.get("path") or "no-picture"
    return Path(name).name if image.get("bytes") else name  # a path is opened, so all of it is checked
