"""Reading a data set saved by Hugging Face's ``save_to_disk``.

Columns are those of the tables (``tables.py``), such as in the hub's copies of ScienceQA:
question, choices, answer, hint, image, lecture, solution, ... Samples of other kinds have those of the tables too; a
picture in a document is a file name or, as in the column ``image``, the picture itself. A row without a qid gets its
split and position: ``train-17``. Rows are read in Arrow format: in other formats ``datasets``
would decode the pictures of every column itself, with any decoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data_shards.sources.columns import Columns
from data_shards.sources.csv_answers import WrittenAnswers
from data_shards.sources.folder_files import SPLIT_NAMES
from data_shards.sources.gathering import Gathering
from data_shards.sources.held_pictures import pictures_of, with_names
from data_shards.sources.question_set import Picture, QuestionSet
from data_shards.sources.row_samples import id_of_row, notes_on_other_kinds, sample_of_row, unused_fields
from data_shards.strict_json import read_json_file
from mmcot.errors import InputError
from mmcot.texts.sample import Sample, SampleError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 256  # read at a time, with their pictures
_LISTS = ("dataset_dict.json", "state.json", "dataset_info.json")


def recognizes(path: Path) -> bool:
    """Whether a path looks like this form."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def content_files(path: Path) -> list[Path]:
    """Return the files whose content determines the texts: the tables that the data set's own lists name."""
    folders = [path, *sorted(child.parent for child in path.glob("*/state.json"))]
    files = [folder / name for folder in folders for name in _LISTS if (folder / name).is_file()]
    for state in [file for file in files if file.name == "state.json"]:
        content = read_json_file(state)
        listed = content.get("_data_files") if isinstance(content, dict) else None
        if not isinstance(listed, list) or not all(isinstance(each, dict) and "filename" in each for each in listed):
            raise InputError("its list _data_files is no list of file names; save the data set again").at(state)
        names = [str(each["filename"]) for each in listed]
        if outside := [name for name in names if Path(name).name != name]:
            raise InputError(
                f"it names a file {outside[0][:200]!r}, expected one beside it such as "
                "data-00000-of-00001.arrow; save the data set again"
            ).at(state)
        files += [state.parent / name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0].name} does not exist, and its data set names it; save it again").at(missing[0])
    return sorted(files)


def read(path: Path, columns: Mapping[str, str] | None = None) -> QuestionSet:
    """Read a saved DatasetDict with train, validation and test, or a single Dataset as train.

    Args:
        columns: the columns of fields that have other names.

    Raises:
        InputError: the data set cannot be opened, a split is unknown, a column does not exist, or rows are not valid.
    """
    gathered, num_made, names = Gathering(), 0, Columns(columns)
    written, others = WrittenAnswers(), Counter[tuple[str, str]]()
    where: dict[str, tuple[Any, int]] = {}  # by qid: the split in Arrow format, and the row's number
    parts = _parts(path)
    is_single = "" in parts
    for name, part in parts.items():
        if is_single:
            name = "train"
        if (split := SPLIT_NAMES.get(str(name))) is None:
            raise InputError(f"split {str(name)!r} is unknown; expected {', '.join(SPLIT_NAMES)}").at(path)
        names_of_answers = _class_names(part.features.get(names.of(["answer"])[0]))
        part = part.with_format("arrow")
        names.see(part.column_names)
        used = [column for column in part.column_names if column in names.known] or part.column_names[:1]
        names.leave_out([column for column in part.column_names if column not in used], part.num_rows)
        part = part.select_columns(used)
        tables = cast("Iterator[pa.Table]", part.iter(_ROWS))
        for index, row in enumerate(row for rows in tables for row in rows.to_pylist()):
            place = (str(path), None, f"split {str(name)!r}, row {index}")
            try:
                row = names.take(row)
                if names_of_answers and isinstance(row.get("answer"), int) and row["answer"] >= 0:
                    row["answer"] = names_of_answers[row["answer"]]
                written.see(row.get("answer"), row.get("choices"), f"split {str(name)!r}, row {index}")
                sample = _sample(row, split, index, is_single=is_single)
                gathered.add(sample, place)
            except InputError as error:
                gathered.refuse(error, place)
                continue
            num_made += id_of_row(row) is None
            others.update(unused_fields(sample, row))
            where[sample.qid] = (part, index)

    def pictures(problem: Sample) -> list[Picture]:
        if not problem.images:
            return []
        part, index = where[problem.qid]
        return pictures_of(names.take(part[index].to_pylist()[0]), problem.images, path)

    names.require_found()
    try:
        written.require_one_meaning()
    except InputError as error:
        gathered.refuse(error, (str(path), None, None))
    notes = (
        [f"{num_made:,} rows without a qid got their split and position as one, such as train-0"] if num_made else []
    )
    return gathered.question_set(pictures, notes=[*notes, *names.notes(), *notes_on_other_kinds(others)])


def _parts(path: Path) -> dict[Any, Any]:
    import datasets

    content_files(path)
    try:
        loaded = datasets.load_from_disk(str(path))
        parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
        for part in parts.values():
            # Reading values at offsets of a damaged file would end the process. The table alone: each `data` is one.
            part.data.table.validate(full=True)
    except Exception as error:  # of pyarrow, datasets, json: each has its own types
        said = " ".join(str(error).split())[:200]
        raise InputError(f"the data set cannot be opened ({type(error).__name__}: {said}); save it again").at(
            path
        ) from error
    return parts


def _class_names(feature: Any) -> list[str] | None:
    """The names of a column of classes, where they are texts: their numbers are no indices of choices then."""
    names = getattr(feature, "names", None)
    return names if names and not all(name.isdigit() for name in names) else None


def _sample(row: dict[str, Any], split: str, index: int, *, is_single: bool = False) -> Sample:
    given = id_of_row(row)
    qid = f"{split}-{index}" if given is None else given
    own = row.get("split")
    if own not in (None, "") and SPLIT_NAMES.get(str(own)) != split:
        if not is_single or SPLIT_NAMES.get(str(own)) is None:
            raise SampleError(f"question {qid}: its split is {own!r}, expected {split!r}, as that of its part")
        split = SPLIT_NAMES[str(own)]
    return sample_of_row(qid, with_names(row) | {"split": split})
