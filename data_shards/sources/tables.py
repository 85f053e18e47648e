"""Reading a user's own questions, image-text pairs and documents from JSONL, JSON, CSV or Parquet.

A line of JSONL, or an object of a JSON array, or a row of CSV or Parquet with the same column names:

    {"qid": "a1", "question": "Which is bigger?", "choices": ["sun", "moon"], "answer": "sun",
     "context": "", "image": "pictures/a1.png", "rationale": "The sun is far away ...", "split": "train"}

``answer`` is the choice's text, an index or a letter (a text that equals a choice is read as
that choice). ``context``, ``image`` (one file or several, in the table's folder),
``rationale`` and ``split`` may be left out, and any ScienceQA field may be given. In CSV,
choices, accepted answers and several images are separated by ``|``.

A row without ``choices`` is a sample of another kind, by the field it has:

    {"qid": "b1", "question": "How many magnets?", "answers": ["2", "two"], "image": "b1.png"}    a free answer
    {"qid": "b2", "question": "How many magnets?", "answer": "2", "image": "b1.png"}              the same, one text
    {"qid": "c1", "text": "Two red magnets.", "image": "c1.png"}                                  an image-text pair
    {"qid": "d1", "document": [{"image": "a.png"}, {"text": "a dax"}]}                            a document, not in CSV

The split is the ``split`` column, or the file's name where a folder contains train.jsonl, val.jsonl and test.jsonl.
Without either, questions are divided 80:10:10 by a hash of their ids. In Parquet values have the types of their
columns, a null is a missing field, a picture may be ``{"bytes", "path"}``, and a file without a column of ids gets
some, as a saved data set does: ``train-17``.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.sources.columns import Columns
from data_shards.sources.csv_answers import WrittenAnswers, with_indices
from data_shards.sources.folder_files import SPLIT_NAMES, ignored_files, split_files, split_of
from data_shards.sources.gathering import Gathering
from data_shards.sources.held_pictures import PicturesOfTables
from data_shards.sources.question_set import QuestionSet
from data_shards.sources.row_samples import id_of_row, notes_on_other_kinds, sample_of_row, unused_fields
from data_shards.sources.table_rows import SUFFIXES, Rows, place_of, read_rows
from mmcot.errors import InputError
from mmcot.texts.sample import Sample, SampleError

_ALWAYS_TABLES = (".jsonl", ".csv", ".parquet")  # whatever their names; many a .json is something else


def recognizes(path: Path) -> bool:
    """Whether a path looks like this form."""
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    return any(split_of(file, SUFFIXES) for file in path.iterdir())


def content_files(path: Path) -> list[Path]:
    """Return the files whose content determines the texts: those that are read."""
    return [file for file, _ in _files(path)]


def read(path: Path, columns: Mapping[str, str] | None = None) -> QuestionSet:
    """Read a table, or a folder with one table, or one set of tables, per split.

    Args:
        columns: the columns of fields that have other names.

    Raises:
        InputError: rows are not valid, the message names file, line and field of each; or a column does not exist.
    """
    names = Columns(columns)
    gathered, notes = Gathering(), []
    is_whole, others = True, Counter[tuple[str, str]]()
    ids, held = _Ids(names), PicturesOfTables(path if path.is_dir() else path.parent, names)
    for file, split_of_file in _files(path):
        written = WrittenAnswers()
        try:
            for number, row in _decided_rows(file, gathered, notes, names):
                place = place_of(file, number)
                written.see(row.get("answer"), row.get("choices"), place[2] or f"line {number}")
                try:
                    sample = ids.sample(number, held.named(file, row), split_of_file)
                    gathered.add(sample, place)
                    held.add(file, number, row, sample)
                    others.update(unused_fields(sample, row))
                except InputError as error:
                    gathered.refuse(error, place)
            ids.end_of_file(split_of_file)
            written.require_one_meaning()
        except InputError as error:  # the rest of the file cannot be read
            gathered.refuse(error, (str(file), None, None))
            is_whole = False
    if is_whole:
        names.require_found()  # before other faults, because every row lacks the field
    notes += notes_on_other_kinds(others)
    notes += [*ids.notes(), *names.notes(), *_notes_on_other_tables(path)]
    return gathered.question_set(held.pictures, notes=notes, held=held.whole)


def _decided_rows(file: Path, gathered: Gathering, notes: list[str], columns: Columns) -> Rows:
    """The rows of a file; in CSV the column decides what an answer means."""
    rows = read_rows(file, notes, refuse=gathered.faults.add, columns=columns)
    if file.suffix.lower() != ".csv":
        return rows
    rows = list(rows)
    try:
        rows, reading = with_indices(rows)
    except InputError as error:
        gathered.refuse(error, (str(file), error.line, None))
        return iter(rows)
    notes.extend([f"{file}: answers are read as {reading}"] if reading else [])
    return iter(rows)


def _notes_on_other_tables(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    others = [file for file, _ in ignored_files(path, content_files(path)) if file.suffix.lower() in _ALWAYS_TABLES]
    return [
        f"note: {file.name} is not read, its name is none of a split: train, val or test"
        for file in others
        if file.is_file() and not file.name.startswith(".")
    ]


def _files(path: Path) -> list[tuple[Path, str | None]]:
    if path.is_file():
        return [(path, None)] if path.suffix.lower() in SUFFIXES else []
    return [*split_files(path, SUFFIXES)]


class _Ids:
    """Makes samples of rows. Ids and splits that no row of a table can have are made, and counted."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._num_divided, self._num_made, self._num_rows = 0, 0, 0
        self._before = Counter[str | None]()  # rows of the earlier files of each split

    def sample(self, number: int, row: dict[str, Any], split_of_file: str | None) -> Sample:
        """Return the sample of a row.

        Raises:
            SampleError: it is none.
        """
        own, self._num_rows = row.get("split"), number + 1
        given = split_of_file if own in (None, "") else own
        qid = self._made(number, given, split_of_file) if self._columns.lack_ids else id_of_row(row)
        if qid is None:
            raise SampleError("the field 'qid' is missing; every question needs a unique id")
        if own and split_of_file and own != split_of_file and SPLIT_NAMES.get(str(own)) != split_of_file:
            raise SampleError(
                f"question {qid}: its split is {own!r}, and the file is of {split_of_file!r}; move it, or correct it"
            )
        if given is not None and (not isinstance(given, str) or given not in SPLIT_NAMES):
            raise SampleError(f"question {qid}: split {given!r} is unknown; expected train, val or test")
        split = SPLIT_NAMES[given] if given else _divide(qid)
        sample = sample_of_row(qid, row | {"split": split})
        self._num_divided += given is None
        self._num_made += self._columns.lack_ids
        return sample

    def _made(self, number: int, given: Any, split_of_file: str | None) -> str:
        split = SPLIT_NAMES.get(given) if isinstance(given, str) else None
        return f"{split or 'row'}-{self._before[split_of_file] + number}"

    def end_of_file(self, split_of_file: str | None) -> None:
        """Count the rows of a file that was read."""
        self._before[split_of_file] += self._num_rows
        self._num_rows = 0

    def notes(self) -> list[str]:
        """Sentences on what was made."""
        notes = []
        if self._num_made:
            notes.append(f"{self._num_made:,} rows without a qid got their split and position as one, such as train-0")
        if self._num_divided:
            notes.append(f"{self._num_divided:,} questions without a split were divided 80:10:10 by their ids")
        return notes


def _divide(qid: str) -> str:
    bucket = zlib.crc32(qid.encode()) % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"
