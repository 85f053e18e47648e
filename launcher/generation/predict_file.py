"""Answering a file of questions, to a file that can be continued or line by line to the console."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_shards.atomic_files import sha256_of_file
from launcher.generation.predict_output import check_output, open_answers
from launcher.generation.predict_rows import Questions, Row, describe_error, read_questions
from mmcot.errors import InputError
from mmcot.texts.sample import Sample, SampleError

if TYPE_CHECKING:
    from launcher.generation.predictor import RunPredictor

BULK_SIZE = 64  # rows that are answered together, always the same ones; what a kill loses at most


class Progress(Protocol):
    """What a user sees meanwhile."""

    def say(self, line: str) -> None:
        """Show a sentence."""
        ...

    def counting(self, num_done: int, num_total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Yield the function that gets the number of rows done so far."""
        ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The numbers of rows, and of those that have an error in place of an answer."""

    num_rows: int
    num_errors: int


def predict_file(
    predictor: RunPredictor,
    input: Path,
    output: Path | None,
    *,
    strict: bool,
    show: Callable[[dict[str, Any]], None],
    progress: Progress,
) -> Outcome:
    """Answer the rows of a file in their order; a row that cannot be answered has an error in place of the answer.

    The rows are checked before any model is opened. Where ``output`` holds answers of the same command, they are kept
    and the remaining rows are answered. Rows are answered in bulks of the same rows as in an undisturbed command, so
    that its bytes are the same too.

    Args:
        output: the file for the answers; None: ``show`` gets them.
        strict: refuse the file if a row cannot be answered.

    Raises:
        InputError: the input cannot be read, with ``strict`` a row has a fault, or ``output`` has other lines.
    """
    if output is not None:
        check_output(output, input)
    questions = _checked(predictor, input, strict=strict, progress=progress)
    rows = questions.rows
    if output is None:
        errors: list[bool] = []
        for answers in _answer(predictor, rows, input.parent, 0, progress):
            for answer in answers:
                show(answer)
            errors += ["error" in answer for answer in answers]
        return Outcome(len(rows), sum(errors))
    made_by = predictor.identity() | {"input": sha256_of_file(input), "rows": len(rows)}
    with open_answers(output, made_by, rows, names=_other_names(predictor), report=progress.say) as file:
        for answers in _answer(predictor, rows, input.parent, file.num_kept, progress):
            file.append(answers)
        return Outcome(len(rows), file.num_errors)


def _checked(predictor: RunPredictor, input: Path, *, strict: bool, progress: Progress) -> Questions:
    answers_with_letters = predictor.answers_with_letters

    def check(sample: Sample) -> None:
        if sample.kind == "free" and answers_with_letters:
            raise SampleError(f"question {sample.qid} has no choices, and the run was trained on choices; give them")
        predictor.check_pictures(sample, input.parent, read=strict)

    questions = read_questions(input, check)
    for note in questions.notes:
        progress.say(note)
    if not questions.rows:
        progress.say(f"{input}: 0 questions")
    unseen = sum(row.sample is not None and bool(row.sample.images) for row in questions.rows)
    if unseen and predictor.settings.data.features is None:
        progress.say(f"note: {unseen:,} rows have pictures, and this run was trained without; they are not read")
    faults = questions.faults
    if strict:
        faults.raise_any()
    for fault in faults.first:
        progress.say(str(fault))
    if faults.total > len(faults.first):
        progress.say(f"{faults.total:,} rows have an error, {faults.total - len(faults.first):,} are not shown")
    return questions


def _answer(
    predictor: RunPredictor, rows: Sequence[Row], folder: Path, num_kept: int, progress: Progress
) -> Iterator[list[dict[str, Any]]]:
    """Yield the answers of each bulk that are not kept from an earlier command."""
    if num_kept == len(rows):
        return
    with progress.counting(num_kept, len(rows)) as count:
        for start in range(0, len(rows), BULK_SIZE):
            bulk = rows[start : start + BULK_SIZE]
            if start + len(bulk) > num_kept:
                yield _answer_bulk(predictor, bulk, folder)[max(0, num_kept - start) :]
                count(start + len(bulk))


def _answer_bulk(predictor: RunPredictor, rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    answers = iter(predictor.answer_or_errors([row.sample for row in rows if row.sample is not None], folder))
    return [_line(row, next(answers) if row.sample is not None else InputError(row.error)) for row in rows]


def _line(row: Row, answer: dict[str, Any] | InputError) -> dict[str, Any]:
    if isinstance(answer, InputError):
        return {"qid": row.qid, "line": row.line, "error": describe_error(str(answer))}
    return answer


def _other_names(predictor: RunPredictor) -> list[str]:
    """The names of the texts that ``other_texts`` puts beside the rationale."""
    from launcher.evaluation.predictions import other_texts

    chain = predictor.settings.chain
    return list(other_texts(chain, dict.fromkeys(chain.texts, "")).get("texts", {}))
