"""Scoring a file of predictions of this or another system.

Three forms are known:

    {"qid": "10", "rationale": "...", "answer_text": "...", "prediction": 1}     ours, one line per question
    {"num_fail": 3, "scores": {...}, "preds": ["The answer is (B).", ...], "labels": [...]}   the published system's
    {"acc": 75.17, "results": {"10": 1, ...}, ...}                                ScienceQA's own result file

A prediction is the index of a choice; of a sample without choices it is the answer's text. Lines with an "error" in
place of a prediction, as ``mmcot predict`` writes them, are left out and counted.
The published system's files contain no ids. They are aligned to ``pid_splits[split]``; it is an
error if the counts differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_shards.sources.forms import read_questions
from data_shards.strict_json import NotJsonError, parse_json, read_text
from launcher.evaluation.tables import format_table
from mmcot.errors import InputError, MissingFileError
from mmcot.metrics.metrics import PUBLISHED, breakdown, score_report
from mmcot.metrics.table import METRICS
from mmcot.texts.answers import parse_prediction
from mmcot.texts.prompts import gold_rationale
from mmcot.texts.sample import Sample


class PredictionsError(InputError):
    """A file of predictions that cannot be scored; the message names it."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The content of a file: index, text or None by qid; ``has_texts`` if parse failures can be counted.

    Rationales are those of some questions, if a file has any; ``notes`` are sentences on what was left out.
    """

    choices: dict[str, int | str | None]
    rationales: dict[str, str]
    has_texts: bool
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores in the form of scores.json, their questions, and the counts of what was left out."""

    report: dict[str, Any]
    problems: dict[str, Sample]
    predictions: dict[str, int | str | None]
    num_predictions_left_out: int
    num_questions_left_out: int
    notes: tuple[str, ...] = ()

    @property
    def left_out(self) -> list[str]:
        """Sentences on what the scores are not of."""
        return [
            f"left out: {self.num_predictions_left_out:,} predictions for other questions, "
            f"{self.num_questions_left_out:,} questions without a prediction",
            *self.notes,
        ]


def score_file(
    path: Path,
    data: Path,
    *,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    rationale_format: str = "QCM-E",
    similarity_model: str | None = None,
    guess_seed: int | None = None,
) -> Scored:
    """Score a file on the questions that are in both the file and the data set's split.

    Args:
        columns: the data set's columns of fields that have other names.
        rationale_format: the format of the gold targets that rationales are compared with.
        similarity_model: local sentence model; None: no similarity.
        guess_seed: guess answers that cannot be parsed with this seed, as the published system does.

    Raises:
        PredictionsError: the file is empty, has no known form, contains a qid twice, an index out of range or a
            prediction of another kind than its sample, or has no question of the split.
    """
    problems = {problem.qid: problem for problem in read_questions(data, columns=columns).problems[split]}
    predictions = read_predictions(path, problems)
    common = {qid: problem for qid, problem in problems.items() if qid in predictions.choices}
    if not common:
        raise PredictionsError(
            f"{path} and split {split!r} of {data} share no question ({len(predictions.choices):,} predictions"
            f"{_such_as(predictions.choices)}, {len(problems):,} questions{_such_as(problems)}); give the data set and "
            "split the predictions are of"
        )
    for qid, problem in common.items():
        _require_fits(predictions.choices[qid], problem, path)
    choices = {qid: predictions.choices[qid] for qid in common}
    rationales, notes = _rationales_of(common, predictions)
    report = score_report(
        common,
        choices,
        split=split,
        rationales=rationales,
        references={qid: gold_rationale(p, rationale_format) for qid, p in common.items()},
        similarity_model=similarity_model,
        guess_seed=guess_seed,
    )
    if not predictions.has_texts:
        report["parse_failure_rate"] = None
    num_other, num_missing = len(predictions.choices) - len(common), len(problems) - len(common)
    return Scored(report, common, choices, num_other, num_missing, (*predictions.notes, *notes))


def _such_as(qids: Iterable[str]) -> str:
    first = next(iter(qids), None)
    return "" if first is None else f", such as {first!r}"


def _rationales_of(
    problems: Mapping[str, Sample], predictions: Predictions
) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """The rationales if every question has one, else None; and a sentence if some have one."""
    found = {qid: predictions.rationales[qid] for qid in problems if qid in predictions.rationales}
    if len(found) == len(problems):
        return found, ()
    note = f"rationales are not scored: {len(problems) - len(found):,} of {len(problems):,} predictions have none"
    return None, (note,) if found else ()


def read_predictions(path: Path, problems: dict[str, Sample]) -> Predictions:
    """Read a file of any known form; files without ids take those of ``problems``, the split."""
    if not path.is_file():
        raise MissingFileError(f"predictions {path} do not exist; give a predictions.jsonl or a result file")
    try:
        return _read_known(path, problems)
    except InputError as error:
        raise PredictionsError(str(error)) from None


def _read_known(path: Path, problems: dict[str, Sample]) -> Predictions:
    if path.suffix == ".csv":
        raise PredictionsError(f"{path} is a CSV, whose fields have no types; give a .jsonl, as `mmcot predict` writes")
    text = read_text(path)
    if not text.strip():
        raise PredictionsError(f"{path} is empty; write the predictions again")
    content = _one_value(text, path)
    if isinstance(content, dict) and "results" in content:
        return _from_results(content["results"], path)
    if isinstance(content, dict) and "preds" in content:
        return _from_texts(content["preds"], problems, path)
    if isinstance(content, dict) and "qid" in content:
        return _from_rows([(str(path), content)], path)
    if content is None:
        return _from_rows(_rows(text, path), path)
    raise PredictionsError(
        f"{path} is of no known form; expected lines with 'qid', or an object with 'results' or 'preds'"
    )


def _one_value(text: str, path: Path) -> Any:
    """The file's one value of JSON; None if it has lines instead, each a value."""
    try:
        return parse_json(text, str(path)) or {}
    except NotJsonError:
        return None
    except InputError:
        if path.suffix == ".jsonl":  # to be refused with its line
            return None
        raise


def format_scores(scored: Scored, *, path: Path, against_paper: bool) -> list[str]:
    """The scores in human-readable lines: table, rationale metrics, breakdowns, what was left out."""
    report = scored.report
    rows = {f"{path.name}, {report['num_questions']:,} questions": report["accuracy"]}
    if against_paper:
        rows |= {f"published: {name}": row for name, row in PUBLISHED.items()}
    lines = [format_table(rows), ""]
    shown = {name: value for name, value in report["rationale"].items() if value is not None}
    lines += [f"rationales: {'   '.join(f'{name} {value:.2f}' for name, value in shown.items())}"] if shown else []
    shown = {METRICS[name].label: value for name, value in report.get("answers", {}).items() if value is not None}
    lines += [f"answers: {'   '.join(f'{label} {value:.2f}' for label, value in shown.items())}"] if shown else []
    failures = report["parse_failure_rate"]
    lines.append(
        "answers that could not be read: "
        + ("unknown for this kind of file" if failures is None else f"{failures:.2f}%")
    )
    lines += scored.left_out
    for field in ("topic", "grade", "skill"):
        lines.append(f"\nby {field}")
        parts = breakdown(scored.problems, scored.predictions, field)
        lines += [
            f"  {name or '(none)':<60}{part['num_questions']:>6,}{part['accuracy']:>8.2f}"
            for name, part in parts.items()
        ]
    return lines


def _rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", parse_json(line, f"{path}, line {number}")


def _from_rows(rows: Iterable[tuple[str, Any]], path: Path) -> Predictions:
    choices: dict[str, int | str | None] = {}
    rationales: dict[str, str] = {}
    num_errors = 0
    for place, row in rows:
        if not isinstance(row, dict):
            raise PredictionsError(f"{place} is {str(row)[:200]!r}; expected an object with 'qid' and 'prediction'")
        if "error" in row and "prediction" not in row:
            num_errors += 1
            continue
        qid = _qid(row, place)
        if qid in choices:
            raise PredictionsError(f"{place}: question {qid} is predicted a second time; keep one line a question")
        choices[qid] = _prediction(row["prediction"], qid, place)
        if (rationale := row.get("rationale")) is not None:
            if not isinstance(rationale, str):
                raise PredictionsError(f"{place}: the rationale is {rationale!r}; expected a text, or null")
            rationales[qid] = rationale
    notes = (f"lines with an error in place of a prediction: {num_errors:,}",) if num_errors else ()
    return Predictions(choices, rationales, True, notes)


def _qid(row: dict[str, Any], place: str) -> str:
    if missing := [name for name in ("qid", "prediction") if name not in row]:
        raise PredictionsError(
            f"{place}: the key {missing[0]!r} is missing; expected an object with 'qid' and 'prediction'"
        )
    qid = row["qid"]
    if isinstance(qid, bool) or not isinstance(qid, str | int):
        raise PredictionsError(f"{place}: the qid is {qid!r}; expected a text or an integer")
    return str(qid)


def _from_texts(texts: Any, problems: dict[str, Sample], path: Path) -> Predictions:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PredictionsError(
            f"{path}: 'preds' is {_shown(texts)}; expected a list of the texts that were written, one for each question"
        )
    if len(texts) != len(problems):
        raise PredictionsError(
            f"{path} holds {len(texts):,} predictions without ids, the split has {len(problems):,} questions; they can "
            "only be aligned where the counts agree: give the data set and split they were made on"
        )
    choices = {
        qid: parse_prediction(problem, text) for (qid, problem), text in zip(problems.items(), texts, strict=True)
    }
    return Predictions(choices, {}, has_texts=True)


def _from_results(results: Any, path: Path) -> Predictions:
    if not isinstance(results, dict) or not results:
        raise PredictionsError(f"{path}: 'results' is empty or no object; expected {{qid: index}}")
    choices = {qid: _prediction(value, qid, str(path)) for qid, value in results.items()}
    return Predictions(choices, {}, has_texts=False)


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return repr(value)[:200]
    number, item = next((number, item) for number, item in enumerate(value) if not isinstance(item, str))
    return f"a list whose item {number} is {item!r}"[:200]


def _prediction(value: Any, qid: str, place: str) -> int | str | None:
    if value is None or (isinstance(value, (int, str)) and not isinstance(value, bool)):
        return value
    raise PredictionsError(
        f"{place}: question {qid} has prediction {value!r}; expected the index of a choice, a text, or null"
    )


def _require_fits(prediction: int | str | None, problem: Sample, path: Path) -> None:
    place = f"{path}: question {problem.qid} has prediction {prediction!r}"
    if prediction is None:
        return
    if problem.kind != "choices":
        if isinstance(prediction, int):
            raise PredictionsError(f"{place}; it has no choices: expected the answer's text, or null")
    elif isinstance(prediction, str):
        raise PredictionsError(f"{place}; expected the index of a choice, or null")
    elif not 0 <= prediction < len(problem.choices):
        raise PredictionsError(f"{place}, its choices are 0 to {len(problem.choices) - 1}; correct it")
