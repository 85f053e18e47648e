"""Reading a user's own questions, image-text pairs and documents from JSONL or CSV.

A line of JSONL, or a row of CSV with the same column names:

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

The split
is the ``split`` column, or the file's name where a folder contains train.jsonl, val.jsonl
and test.jsonl. Without either, questions are divided 80:10:10 by a hash of their ids.
"""

from __future__ import annotations

import difflib
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_shards.sources.csv_answers import with_indices
from data_shards.sources.folder_files import SPLIT_NAMES, ignored_files, split_files, split_of
from data_shards.sources.gathering import Gathering
from data_shards.sources.question_set import QuestionSet
from data_shards.sources.row_samples import FIELDS, id_of_row, sample_of_row
from data_shards.sources.table_rows import SUFFIXES, read_rows
from mmcot.errors import InputError
from mmcot.texts.sample import Sample, SampleError

_MISTAKEN = {"picture": "image", "images": "image", "img": "image", "options": "choices", "option": "choices"}
_MISTAKEN |= {"label": "answer", "explanation": "rationale", "reason": "rationale", "cot": "rationale"}


def recognizes(path: Path) -> bool:
    """Whether a path looks like this form."""
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    return any(split_of(file, SUFFIXES) for file in path.iterdir())


def content_files(path: Path) -> list[Path]:
    """Return the files whose content determines the texts: those that are read."""
    return [file for file, _ in _files(path)]


def read(path: Path) -> QuestionSet:
    """Read a table, or a folder with one table, or one set of tables, per split.

    Raises:
        InputError: rows are not valid; the message names file, line and field of each.
    """
    gathered = Gathering()
    num_divided, unknown, notes = 0, Counter[str](), []
    for file, split_of_file in _files(path):
        name = str(file)
        try:
            rows = _decided_rows(file, gathered, notes)
            for line, row in rows:
                unknown.update(row.keys() - FIELDS)
                place = (name, line, None)
                try:
                    sample, divided = _sample(row, split_of_file)
                    gathered.add(sample, place)
                    num_divided += divided
                except InputError as error:
                    gathered.refuse(error, place)
        except InputError as error:  # the rest of the file cannot be read
            gathered.refuse(error, (name, None, None))
    folder = path if path.is_dir() else path.parent
    notes += [f"{num_divided:,} questions without a split were divided 80:10:10 by their ids"] if num_divided else []
    notes += notes_on_fields(unknown)
    notes += _notes_on_other_tables(path)
    return gathered.question_set(
        pictures=lambda problem: [folder / name for name in problem.images],
        notes=notes,
    )


def _decided_rows(file: Path, gathered: Gathering, notes: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """The rows of a file; in CSV the column decides what an answer means."""
    rows = read_rows(file, notes, refuse=gathered.faults.add)
    if file.suffix.lower() != ".csv":
        return rows
    rows = list(rows)
    try:
        rows, reading = with_indices(rows)
    except InputError as error:
        gathered.refuse(error, (str(file), error.line, None))
        return rows
    notes.extend([f"{file}: answers are read as {reading}"] if reading else [])
    return rows


def _notes_on_other_tables(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    others = [file for file, _ in ignored_files(path, content_files(path)) if file.suffix.lower() in SUFFIXES]
    return [
        f"note: {file.name} is not read, its name is none of a split: train, val or test"
        for file in others
        if file.is_file() and not file.name.startswith(".")
    ]


def notes_on_fields(unknown: Counter[str]) -> list[str]:
    """Sentences on fields that are not used, by the number of rows that have them."""
    return [f"note: the field {name!r} of {_rows(times)} is not used{_near(name)}" for name, times in unknown.items()]


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number > 1)}"


def _near(name: str) -> str:
    """Return "; did you mean X?" with a field of a similar name or meaning, or "" where there is none."""
    similar = difflib.get_close_matches(name.lower(), sorted(FIELDS), 1)
    nearest = _MISTAKEN.get(name.lower()) or (similar[0] if similar else None)
    return f"; did you mean {nearest!r}?" if nearest else ""


def _files(path: Path) -> list[tuple[Path, str | None]]:
    if path.is_file():
        return [(path, None)] if path.suffix.lower() in SUFFIXES else []
    return [*split_files(path, SUFFIXES)]


def _sample(row: dict[str, Any], split_of_file: str | None) -> tuple[Sample, bool]:
    if (qid := id_of_row(row)) is None:
        raise SampleError("the field 'qid' is missing; every question needs a unique id")
    given = row.get("split") or split_of_file
    if given is not None and (not isinstance(given, str) or given not in SPLIT_NAMES):
        raise SampleError(f"question {qid}: split {given!r} is unknown; expected train, val or test")
    return sample_of_row(qid, row | {"split": SPLIT_NAMES[given] if given else _divide(qid)}), given is None


def _divide(qid: str) -> str:
    bucket = zlib.crc32(qid.encode()) % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"
