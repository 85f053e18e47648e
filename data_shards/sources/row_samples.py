"""From a row of a table, or a record of a shard, to a sample of any kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmcot.texts.sample import TEXT_FIELDS, Sample, SampleError, choice_letter

_OTHER_NAMES = {"context": "hint", "rationale": "solution"}
OTHER_KINDS = ("document", "answers", "text")  # fields that tell the kind of a row without choices
FIELDS = {"qid", "id", "question", "choices", "answer", "image", "caption", *_OTHER_NAMES, *TEXT_FIELDS, *OTHER_KINDS}


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
    for name, other in _OTHER_NAMES.items():
        if name in row and other in row:
            if row[name] and row[other] and row[name] != row[other]:
                raise SampleError(
                    f"the fields {name!r} and {other!r} are the same field with different texts; keep one"
                )
            row = {**row, name: row[name] or row[other], other: row[name] or row[other]}
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
            if choices.count(written) > 1:
                raise SampleError(f"the answer {written!r} is {choices.count(written)} of the choices {list(choices)}")
            return choices.index(written)
    if text.isascii() and text.isdigit():
        return int(text)
    letters = [choice_letter(index) for index in range(len(choices))]
    if text.strip("()").upper() in letters:
        return letters.index(text.strip("()").upper())
    raise SampleError(f"answer {value!r} is no index, letter or text of the choices {list(choices)}")


def unused_fields(sample: Sample, row: dict[str, Any]) -> list[tuple[str, str]]:
    """The fields of a row that are of another kind than its sample, each with the sample's kind."""
    kind = sample.kind
    if kind == "choices":
        names: tuple[str, ...] = OTHER_KINDS
    else:
        names = ("question", "image") if kind == "document" else ("answer",) if row.get("answers") else ()
    return [(name, kind) for name in names if row.get(name) not in (None, "", [])]


def notes_on_other_kinds(others: Counter[tuple[str, str]]) -> list[str]:
    """Sentences on what ``unused_fields`` found, by the number of rows."""
    return [
        f"note: the field {name!r} of {times:,} row{'s' * (times > 1)} is not used, it is none of a sample of the kind "
        f"{kind!r}"
        for (name, kind), times in others.items()
    ]


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
        shown = "null" if qid is None else repr(qid)
        raise SampleError(f"the field {name!r} is {shown}; expected a text or an integer, another for every question")
    return str(qid)
