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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.sources.csv_rows import read_csv
from data_shards.sources.question_set import SPLITS, QuestionSet
from data_shards.strict_json import parse_json, read_text
from mmcot.errors import InputError
from mmcot.texts.sample import TEXT_FIELDS, Sample, SampleError, choice_letter

SUFFIXES = (".jsonl", ".csv")
_TEXT_SUFFIXES = (*SUFFIXES, ".json", ".arrow")
_SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val"} | {split: split for split in SPLITS}
_OTHER_NAMES = {"context": "hint", "rationale": "solution"}
_MISTAKEN = {"picture": "image", "images": "image", "img": "image", "options": "choices", "option": "choices"}
_MISTAKEN |= {"label": "answer", "explanation": "rationale", "reason": "rationale", "cot": "rationale"}
OTHER_KINDS = ("document", "answers", "text")  # fields that tell the kind of a row without choices
FIELDS = {"qid", "id", "question", "choices", "answer", "image", "caption", *_OTHER_NAMES, *TEXT_FIELDS, *OTHER_KINDS}


def recognizes(path: Path) -> bool:
    """Whether a path looks like this form."""
    return bool(_files(path))


def content_files(path: Path) -> list[Path]:
    """Return the files whose content determines the texts: a table, or all files with text in a folder."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES)


def read(path: Path) -> QuestionSet:
    """Read a table, or a folder with one table per split.

    Raises:
        SampleError: a row is not valid; the message names file, line and field.
    """
    problems: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    num_divided, unknown, notes = 0, Counter[str](), []
    for file, split_of_file in _files(path):
        for line, row in read_rows(file, notes):
            unknown.update(row.keys() - FIELDS)
            try:
                problem, divided = _problem(row, split_of_file)
            except SampleError as error:
                raise SampleError(f"{file}, line {line}: {error}") from None
            problems[problem.split].append(problem)
            num_divided += divided
    folder = path if path.is_dir() else path.parent
    notes += [f"{num_divided:,} questions without a split were divided 80:10:10 by their ids"] if num_divided else []
    notes += [f"note: the field {name!r} of {_rows(times)} is not used{_near(name)}" for name, times in unknown.items()]
    return QuestionSet(
        problems, pictures=lambda problem: [folder / name for name in problem.images], notes=tuple(notes)
    )


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number > 1)}"


def _near(name: str) -> str:
    """Return "; did you mean X?" with a field of a similar name or meaning, or "" where there is none."""
    similar = difflib.get_close_matches(name.lower(), sorted(FIELDS), 1)
    nearest = _MISTAKEN.get(name.lower()) or (similar[0] if similar else None)
    return f"; did you mean {nearest!r}?" if nearest else ""


def read_rows(file: Path, notes: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (the line on which it begins, row) of a .jsonl or .csv file.

    Args:
        notes: a list to which sentences on what was recognised are added.

    Raises:
        SampleError: a row is no JSON object, or does not fit the header.
    """
    try:
        if file.suffix == ".csv":
            table = read_csv(file, FIELDS)
            if notes is not None:
                notes.extend(table.notes)
            for line, fields in table.rows:
                row: dict[str, Any] = dict(fields)
                for name in ("choices", "answers", "image"):
                    if name in row:
                        row[name] = [part.strip() for part in row[name].split("|")]
                yield line, row
            return
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if line.strip():
                yield number, _json_row(line, f"{file}, line {number}")
    except InputError as error:
        raise SampleError(str(error)) from None


def _json_row(line: str, place: str) -> dict[str, Any]:
    hint = "; a JSONL file has one object a line" if line.strip() in "[{" else ""
    try:
        row = parse_json(line, place)
    except InputError as error:
        raise InputError(f"{error}{hint}") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected an object, found {str(row)[:200]!r}{hint}")
    return row


def sample_of_row(qid: str, row: dict[str, Any], *, to_predict: bool = False) -> Sample:
    """Read a row, or a record of a shard, of any kind.

    Args:
        to_predict: the answer may be missing. A question without choices has a free one; pictures without a question
            are a pair whose text is unknown; a document that ends with a picture is continued by a text.

    Raises:
        SampleError: the row is no valid sample; the message names the qid and the field.
    """
    record = row_to_record(row, to_predict=to_predict)
    if record.get("choices") is not None:
        return Sample.from_scienceqa(qid, record)
    if not any(record.get(name) is not None for name in OTHER_KINDS):
        raise SampleError(
            f"question {qid}: the field 'choices' is missing; give choices and an answer, or a free answer "
            "('answers', or a text in 'answer'), or an image-text pair ('text' and 'image'), or a 'document'"
        )
    return Sample.from_record({**record, "qid": qid})


def row_to_record(row: dict[str, Any], *, to_predict: bool = False) -> dict[str, Any]:
    """Return a row as a record of ``Sample.from_record``: ScienceQA's field names and the answer as an index.

    Where a row has choices, columns of the other kinds are ignored. Without choices, a text in ``answer`` is the
    accepted answer.

    Raises:
        SampleError: the answer is no index, letter or text of the choices, or the row mixes kinds.
    """
    record = {_OTHER_NAMES.get(name, name): value for name, value in row.items()}
    choices, answer = record.get("choices"), record.get("answer")
    given = [name for name in OTHER_KINDS if record.get(name) not in (None, "", [])]
    if isinstance(choices, str) and choices:
        raise SampleError(f'the field \'choices\' is the text {choices!r}; give a list, such as ["sun", "moon"]')
    if choices or (choices is not None and not given):
        if isinstance(choices, list) and answer is not None:
            record["answer"] = parse_answer_column(answer, tuple(map(str, choices)))
        if to_predict:
            record.setdefault("answer", None)
        return {name: value for name, value in record.items() if name not in OTHER_KINDS}
    record = {name: value for name, value in record.items() if name not in ("choices", "answer")}
    if answer is not None and "answers" not in given:
        given.append("answer")
    if len(given) > 1:
        raise SampleError(
            f"the fields {' and '.join(map(repr, given))} are of different kinds of samples; give one of them"
        )
    if isinstance(record.get("document"), str):
        raise SampleError("the field 'document' is a text; a document is a JSON list of parts: give it in a .jsonl")
    has_text = "text" in record  # of a pair to predict; empty fields of other kinds are left out
    record = {name: value for name, value in record.items() if name not in OTHER_KINDS or name in given}
    if given == ["answer"]:
        if not isinstance(answer, str):
            raise SampleError(
                f"the field 'choices' is missing, and the answer {answer!r} is no text; give choices, or a free answer "
                f'as a text, such as "{answer}"'
            )
        record["answers"] = [answer]
    elif to_predict and not given:
        is_pair = record.get("image") and (not record.get("question") or has_text)
        record |= {"text": ""} if is_pair else {"answers": []}
    if to_predict and isinstance(document := record.get("document"), list) and _is_picture(document[-1:]):
        record["document"] = [*document, {"text": ""}]
    return record


def _is_picture(parts: list[Any]) -> bool:
    return any(isinstance(part, dict) and part.get("image") for part in parts)


def parse_answer_column(value: Any, choices: tuple[str, ...]) -> int:
    """Return the index of a choice given as an index, a letter or its text.

    Raises:
        SampleError: the value is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip()
    for written in (value, text):
        if written in choices:
            return choices.index(written)
    if text.isascii() and text.isdigit():
        return int(text)
    letters = [choice_letter(index) for index in range(len(choices))]
    if text.strip("()").upper() in letters:
        return letters.index(text.strip("()").upper())
    raise SampleError(f"answer {value!r} is no index, letter or text of the choices {list(choices)}")


def _files(path: Path) -> list[tuple[Path, str | None]]:
    if path.is_file():
        return [(path, None)] if path.suffix in SUFFIXES else []
    found = [(file, _SPLIT_NAMES.get(file.stem)) for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    return [(file, split) for file, split in found if split]


def _problem(row: dict[str, Any], split_of_file: str | None) -> tuple[Sample, bool]:
    if (qid := id_of_row(row)) is None:
        raise SampleError("the field 'qid' is missing; every question needs a unique id")
    given = row.get("split") or split_of_file
    if given is not None and (not isinstance(given, str) or given not in _SPLIT_NAMES):
        raise SampleError(f"question {qid}: split {given!r} is unknown; expected train, val or test")
    return sample_of_row(qid, row | {"split": _SPLIT_NAMES[given] if given else _divide(qid)}), given is None


def id_of_row(row: dict[str, Any]) -> str | None:
    """Return a row's id as it is written, 0 as "0"; None where it has neither ``qid`` nor ``id``.

    Raises:
        SampleError: the id is no text and no integer.
    """
    name = "qid" if "qid" in row else "id"
    if name not in row or row[name] == "":
        return None
    qid = row[name]
    if isinstance(qid, bool) or not isinstance(qid, str | int):
        raise SampleError(f"the field {name!r} is {qid!r}; expected a text or an integer, another for every question")
    return str(qid)


def _divide(qid: str) -> str:
    bucket = zlib.crc32(qid.encode()) % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"
