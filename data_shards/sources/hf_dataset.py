"""Reading a data set saved by Hugging Face's ``save_to_disk``.

Columns are those of the tables (``tables.py``), such as in the hub's copies of ScienceQA:
question, choices, answer, hint, image, lecture, solution, ... Samples of other kinds have those of the tables too; a
picture in a document is a file name or, as in the column ``image``, the picture itself. A row without a qid gets its
split and position: ``train-17``. Rows are read in Arrow format: in other formats ``datasets``
would decode the pictures of every column itself, with any decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data_shards.sources.question_set import SPLITS, Picture, QuestionSet
from data_shards.sources.tables import id_of_row, sample_of_row
from mmcot.texts.sample import Sample, SampleError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 256  # read at a time, with their pictures
_SPLIT_NAMES = {"train": "train", "validation": "val", "val": "val", "test": "test"}


def recognizes(path: Path) -> bool:
    """Whether a path looks like this form."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def read(path: Path) -> QuestionSet:
    """Read a saved DatasetDict with train, validation and test, or a single Dataset as train.

    Raises:
        SampleError: a split is unknown, or a row is not valid.
    """
    import datasets

    loaded = datasets.load_from_disk(str(path))
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    problems: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    num_made = 0
    where: dict[str, tuple[Any, int]] = {}  # by qid: the split in Arrow format, and the row's number
    for name, part in parts.items():
        if (split := _SPLIT_NAMES.get(str(name))) is None:
            raise SampleError(f"{path}: split {str(name)!r} is unknown; expected {', '.join(_SPLIT_NAMES)}")
        part = part.with_format("arrow")
        tables = cast("Iterator[pa.Table]", part.iter(_ROWS))
        for index, row in enumerate(row for rows in tables for row in rows.to_pylist()):
            problem = _problem(row, split, index)
            num_made += "qid" not in row and "id" not in row
            problems[problem.split].append(problem)
            where[problem.qid] = (part, index)

    def pictures(problem: Sample) -> list[Picture]:
        part, index = where[problem.qid]
        images = _images(part[index].to_pylist()[0]) if problem.images else []
        held = [image.get("bytes") if isinstance(image, dict) else None for image in images]
        return [data or path / name for data, name in zip(held, problem.images, strict=True)]

    notes = (
        [f"{num_made:,} rows without a qid got their split and position as one, such as train-0"] if num_made else []
    )
    return QuestionSet(problems, pictures, notes=tuple(notes))


def _problem(row: dict[str, Any], split: str, index: int) -> Sample:
    try:
        given = id_of_row(row)
    except SampleError as error:
        raise SampleError(f"split {split!r}, row {index}: {error}") from None
    qid = f"{split}-{index}" if given is None else given
    if row.get("document") and not row.get("choices"):
        row = {**row, "document": [_part(part) for part in row["document"]]}
    elif row.get("image") is not None:
        row = {**row, "image": [_picture_name(image) for image in _as_list(row["image"])]}
    return sample_of_row(qid, row | {"split": split})


def _part(part: Any) -> Any:
    """Return a part of a document without the fields that Arrow fills with null, and its picture by name."""
    if not isinstance(part, dict):
        return part
    return {name: _picture_name(value) for name, value in part.items() if value not in (None, "")}


def _images(row: dict[str, Any]) -> list[Any]:
    """Return a row's pictures, those of a document in the order of its parts."""
    if row.get("document") and not row.get("choices"):
        return [part["image"] for part in row["document"] if part.get("image") not in (None, "")]
    return _as_list(row["image"])


def _as_list(image: Any) -> list[Any]:
    """Return a row's pictures as a list, without empty values."""
    return [each for each in (image if isinstance(image, list) else [image]) if each not in (None, "")]


def _picture_name(image: Any) -> Any:
    if not isinstance(image, dict):
        return image
    name = image.get("path") or "no-picture"
    return Path(name).name if image.get("bytes") else name  # a path is opened, so all of it is checked
