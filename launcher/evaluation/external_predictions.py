"""Scoring a file of predictions of this or another system.

Three forms are known:

    {"qid": "10", "rationale": "...", "answer_text": "...", "prediction": 1}     ours, one line per question
    {"num_fail": 3, "scores": {...}, "preds": ["The answer is (B).", ...], "labels": [...]}   the published system's
    {"acc": 75.17, "results": {"10": 1, ...}, ...}                                ScienceQA's own result file

A prediction is the index of a choice; of a sample without choices it is the answer's text.
The published system's files contain no ids. They are aligned to ``pid_splits[split]``; it is an
error if the counts differ.
"""

from __future__ import annotations

import dataclasses
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
    """The content of a file: index, text or None by qid; ``has_texts`` if parse failures can be counted."""

    choices: dict[str, int | str | None]
    rationales: dict[str, str] | None
    has_texts: bool


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores in the form of scores.json, their questions, and the counts of what was left out."""

    report: dict[str, Any]
    problems: dict[str, Sample]
    predictions: dict[str, int | str | None]
    num_predictions_left_out: int
    num_questions_left_out: int


def score_file(
    path: Path,
    data: Path,
    *,
    split: str = "test",
    rationale_format: str = "QCM-E",
    similarity_model: str | None = None,
    guess_seed: int | None = None,
) -> Scored:
    """Score a file on the questions that are in both the file and the data set's split.

    Args:
        rationale_format: the format of the gold targets that rationales are compared with.
        similarity_model: local sentence model; None: no similarity.
        guess_seed: guess answers that cannot be parsed with this seed, as the published system does.

    Raises:
        PredictionsError: the file is empty, has no known form, contains a qid twice, an index out of range or a
            prediction of another kind than its sample, or has no question of the split.
    """
    problems = {problem.qid: problem for problem in read_questions(data).problems[split]}
    predictions = read_predictions(path, problems)
    common = {qid: problem for qid, problem in problems.items() if qid in predictions.choices}
    if not common:
        raise PredictionsError(
            f"{path} and split {split!r} of {data} share no question ({len(predictions.choices):,} predictions, "
            f"{len(problems):,} questions); give the data set and split the predictions are of"
        )
    for qid, problem in common.items():
        _require_fits(predictions.choices[qid], problem, path)
    rationales = predictions.rationales and {qid: predictions.rationales[qid] for qid in common}
    report = score_report(
        common,
        {qid: predictions.choices[qid] for qid in common},
        split=split,
        rationales=rationales,
        references={qid: gold_rationale(p, rationale_format) for qid, p in common.items()},
        similarity_model=similarity_model,
        guess_seed=guess_seed,
    )
    if not predictions.has_texts:
        report["parse_failure_rate"] = None
    return Scored(
        report,
        common,
        {qid: predictions.choices[qid] for qid in common},
        len(predictions.choices) - len(common),
        len(problems) - len(common),
    )


def read_predictions(path: Path, problems: dict[str, Sample]) -> Predictions:
    """Read a file of any known form; files without ids take those of ``problems``, the split."""
    if not path.is_file():
        raise MissingFileError(f"predictions {path} do not exist; give a predictions.jsonl or a result file")
    try:
        return _read_known(path, problems)
    except InputError as error:
        raise PredictionsError(str(error)) from None


def _read_known(path: Path, problems: dict[str, Sample]) -> Predictions:
    text = read_text(path)
    if not text.strip():
        raise PredictionsError(f"{path} is empty; write the predictions again")
    try:
        content = parse_json(text, str(path))
    except NotJsonError:
        content = None  # more than one JSON value: lines
    if isinstance(content, dict) and "results" in content:
        return _from_results(content["results"], path)
    if isinstance(content, dict) and "preds" in content:
        return _from_texts(content["preds"], problems, path)
    if content is None or (isinstance(content, dict) and "qid" in content):
        return _from_lines(text, path)
    raise PredictionsError(
        f"{path} is of no known form; expected lines with 'qid', or an object with 'results' or 'preds'"
    )


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
    lines.append(
        f"left out: {scored.num_predictions_left_out:,} predictions for other questions, "
        f"{scored.num_questions_left_out:,} questions without a prediction"
    )
    for field in ("topic", "grade", "skill"):
        lines.append(f"\nby {field}")
        parts = breakdown(scored.problems, scored.predictions, field)
        lines += [
            f"  {name or '(none)':<60}{part['num_questions']:>6,}{part['accuracy']:>8.2f}"
            for name, part in parts.items()
        ]
    return lines


def _from_lines(text: str, path: Path) -> Predictions:
    choices: dict[str, int | str | None] = {}
    rationales: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        try:
            qid, choice = str(row["qid"]), row["prediction"]
        except (KeyError, TypeError) as error:
            raise PredictionsError(
                f"{path}, line {number} is no object with 'qid' and 'prediction' ({error!r})"
            ) from None
        if qid in choices:
            raise PredictionsError(
                f"{path}, line {number}: question {qid} is predicted a second time; keep one line a question"
            )
        choices[qid] = _prediction(choice, qid, path)
        if isinstance(row.get("rationale"), str):
            rationales[qid] = row["rationale"]
    return Predictions(choices, rationales if len(rationales) == len(choices) else None, has_texts=True)


def _from_texts(texts: Any, problems: dict[str, Sample], path: Path) -> Predictions:
    if not isinstance(texts, list) or len(texts) != len(problems):
        raise PredictionsError(
            f"{path} holds {len(texts):,} predictions without ids, the split has {len(problems):,} questions; they can "
            "only be aligned where the counts agree: give the data set and split they were made on"
        )
    choices = {
        qid: parse_prediction(problem, str(text)) for (qid, problem), text in zip(problems.items(), texts, strict=True)
    }
    return Predictions(choices, None, has_texts=True)


def _from_results(results: Any, path: Path) -> Predictions:
    if not isinstance(results, dict) or not results:
        raise PredictionsError(f"{path}: 'results' is empty or no object; expected {{qid: index}}")
    choices = {str(qid): _prediction(value, qid, path) for qid, value in results.items()}
    return Predictions(choices, None, has_texts=False)


def _prediction(value: Any, qid: str, path: Path) -> int | str | None:
    if value is None or (isinstance(value, (int, str)) and not isinstance(value, bool)):
        return value
    raise PredictionsError(
        f"{path}: question {qid} has prediction {value!r}; expected the index of a choice, a text, or null"
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
        raise PredictionsError(f"{place}, its choices are 0 to {len(problem.choices) - 1}")
