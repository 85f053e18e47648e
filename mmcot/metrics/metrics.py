"""Scores: the nine columns of ScienceQA's table, breakdowns, and the whole report.

A prediction is the index of a choice by question id, None where no answer could be parsed
(which counts as wrong):

    predictions = {"1": 0, "2": None}
    accuracy_table(problems, predictions)
    -> {"NAT": 84.06, "SOC": 92.35, ..., "G7-12": 84.44, "AVG": 85.31}

All scores are percentages rounded to two decimals, None where there is no question to
score. This module does not depend on models, files or runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from mmcot.errors import InputError
from mmcot.metrics.table import mean_scores
from mmcot.texts.answers import guess_answer, is_right
from mmcot.texts.sample import Sample

_CLASSES: Mapping[str, Callable[[Sample], bool]] = MappingProxyType(
    {
        "NAT": lambda problem: problem.subject == "natural science",
        "SOC": lambda problem: problem.subject == "social science",
        "LAN": lambda problem: problem.subject == "language science",
        "TXT": lambda problem: bool(problem.hint),
        "IMG": lambda problem: bool(problem.images),  # overlaps TXT
        "NO": lambda problem: not problem.hint and not problem.images,
        "G1-6": lambda problem: problem.grade in {f"grade{number}" for number in range(1, 7)},
        "G7-12": lambda problem: problem.grade in {f"grade{number}" for number in range(7, 13)},
        "AVG": lambda problem: True,
    }
)
COLUMNS = tuple(_CLASSES)
BREAKDOWN_FIELDS = ("subject", "topic", "category", "skill", "grade", "task")

# Published accuracy on the test split: Lu et al. 2022 (arXiv:2209.09513) for the first three
# rows, then arXiv:2302.00923 in its first and in its later version. The first version's
# answers come from a teacher-forced pass; compare with the later rows.
_PUBLISHED_ROWS = {
    "Human": (90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42, 88.40),
    "UnifiedQA CoT": (71.00, 76.04, 78.91, 66.42, 66.53, 81.81, 77.06, 68.82, 74.11),
    "GPT-3.5 QCM-ALE": (75.44, 70.87, 78.09, 74.68, 67.43, 79.93, 78.23, 69.68, 75.17),
    "MM-CoT base (v1)": (87.52, 77.17, 85.82, 87.88, 82.90, 86.83, 84.65, 85.37, 84.91),
    "MM-CoT large (v1)": (95.91, 82.00, 90.82, 95.26, 88.80, 92.89, 92.44, 90.31, 91.68),
    "MM-CoT base (later)": (84.06, 92.35, 82.18, 82.75, 82.75, 84.74, 85.79, 84.44, 85.31),
    "MM-CoT large (later)": (91.03, 93.70, 86.64, 90.13, 88.25, 89.48, 91.12, 89.26, 90.45),
}
PUBLISHED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {name: MappingProxyType(dict(zip(COLUMNS, row, strict=True))) for name, row in _PUBLISHED_ROWS.items()}
)

Samples = Mapping[str, Sample] | Iterable[Sample]


def columns_of(problem: Sample) -> tuple[str, ...]:
    """The columns of the table that include a question."""
    return tuple(name for name, test in _CLASSES.items() if test(problem))


def accuracy_table(problems: Samples, predictions: Mapping[str, int | str | None]) -> dict[str, float | None]:
    """Score predictions in ScienceQA's nine classes.

    ``IMG`` is every question that names a picture, whether or not the file exists.
    Predictions for questions that are not in ``problems`` are ignored.

    Args:
        problems: the questions to score, or a mapping of them.
        predictions: {qid: index of a choice, or None}.

    Raises:
        ValueError: a question has no prediction or no gold answer.
    """
    correct = _judge(_as_list(problems), predictions)
    return {name: _percent(right for problem, right in correct if test(problem)) for name, test in _CLASSES.items()}


def expected_accuracy_table(problems: Samples, probabilities: Mapping[str, float]) -> dict[str, float | None]:
    """The nine columns expected of answers that are right with known probabilities, {qid: p in 0..1}."""
    expected = [(problem, probabilities[problem.qid]) for problem in _as_list(problems)]
    return {name: _percent(p for problem, p in expected if test(problem)) for name, test in _CLASSES.items()}


def breakdown(
    problems: Samples, predictions: Mapping[str, int | str | None], field: str
) -> dict[str, dict[str, float | int | None]]:
    """Score each value of one field (``BREAKDOWN_FIELDS``) separately.

    Returns:
        {value: {"num_questions": int, "accuracy": percent}}, the values in natural order
        (grade2 before grade10).

    Raises:
        ValueError: the field is unknown, or as ``accuracy_table``.
    """
    if field not in BREAKDOWN_FIELDS:
        raise InputError(f"field {field!r} cannot be broken down; expected one of {', '.join(BREAKDOWN_FIELDS)}")
    groups: dict[str, list[bool]] = {}
    for problem, right in _judge(_as_list(problems), predictions):
        groups.setdefault(getattr(problem, field), []).append(right)
    return {
        value: {"num_questions": len(groups[value]), "accuracy": _percent(groups[value])}
        for value in sorted(groups, key=_reading_order)
    }


def rationale_scores(
    predictions: list[str], references: list[str], similarity_model: str | None = None
) -> dict[str, float | None]:
    """Score generated rationales against the gold ones, in percent.

    Args:
        predictions: generated texts.
        references: gold texts, in the same order.
        similarity_model: a local sentence-transformers folder (all-MiniLM-L6-v2 in the
            paper); without it the similarity is None.

    Returns:
        {"bleu1", "bleu4", "rougeL", "similarity"} and what ``METRICS`` has for rationales.
        As in ScienceQA's evaluation a pair without a reference text is left out of BLEU and ROUGE;
        None where no pair is left.

    Raises:
        ValueError: the lists differ in length.
    """
    from mmcot.metrics.rationale_metrics import SentenceSimilarity

    if len(predictions) != len(references):
        raise InputError(f"{len(predictions)} rationales but {len(references)} references; give one for each")
    pairs = [(ours, [gold]) for ours, gold in zip(predictions, references, strict=True) if gold.strip()]
    scores: dict[str, float | None] = {**mean_scores(pairs, of="rationale"), "similarity": None}
    if similarity_model is not None and predictions:
        columns = {"predictions": predictions, "references": references}
        found = SentenceSimilarity().compute(**columns, model=similarity_model) or {}
        scores |= {name: round(100 * value, 2) for name, value in found.items()}
    return scores


def score_report(
    problems: Samples,
    predictions: Mapping[str, int | str | None],
    *,
    split: str,
    rationales: Mapping[str, str] | None = None,
    references: Mapping[str, str] | None = None,
    similarity_model: str | None = None,
    guess_seed: int | None = None,
) -> dict:
    """Build the content of ``scores.json``.

    Args:
        problems: the questions to score, or a mapping of them.
        predictions: {qid: index of a choice, text of another kind's answer, or None}.
        split: the split's name in the report.
        rationales: {qid: generated text}; without them the rationale scores are None.
        references: {qid: gold text}, needed with ``rationales``.
        similarity_model: as in ``rationale_scores``.
        guess_seed: as in the published system, answers that cannot be parsed are guessed
            with this seed before scoring. They still count as parse failures.

    Returns:
        {"split", "num_questions", "accuracy", "rationale", "parse_failure_rate"}, and "answers" with the metrics of
        samples without choices, if there are any.

    Raises:
        ValueError: a question has no prediction, answer, rationale or reference.
    """
    problems = _as_list(problems)
    _require(problems, predictions, "prediction")
    failure_rate = _percent(predictions[problem.qid] is None for problem in problems)
    if guess_seed is not None:
        predictions = _with_guesses(problems, predictions, seed=guess_seed)
    texts, golds = [], []
    if rationales is not None:
        texts = _require(problems, rationales, "rationale")
        golds = _require(problems, references or {}, "reference rationale")
    texts_of = [(str(predictions[p.qid] or ""), p.accepted) for p in problems if p.kind != "choices"]
    return {
        "split": split,
        "num_questions": len(problems),
        "accuracy": accuracy_table(problems, predictions),
        "rationale": rationale_scores(texts, golds, similarity_model),
        "parse_failure_rate": failure_rate,
        **({"answers": mean_scores(texts_of, of="answer")} if texts_of else {}),
    }


def _as_list(problems: Samples) -> list[Sample]:
    return list(problems.values() if isinstance(problems, Mapping) else problems)


def _judge(problems: list[Sample], predictions: Mapping[str, int | str | None]) -> list[tuple[Sample, bool]]:
    _require(problems, predictions, "prediction")
    unanswered = [problem.qid for problem in problems if not problem.has_answer]
    if unanswered:
        raise InputError(
            f"{len(unanswered)} of {len(problems)} questions have no gold answer (first: {unanswered[0]}); "
            "only answered questions can be scored, leave the others out"
        )
    return [(problem, is_right(problem, predictions[problem.qid])) for problem in problems]


def _require(problems: list[Sample], values: Mapping, kind: str) -> list:
    missing = [problem.qid for problem in problems if problem.qid not in values]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(problems)} questions have no {kind} (first: {missing[0]}); "
            f"give every question one by its id"
        )
    return [values[problem.qid] for problem in problems]


def _with_guesses(
    problems: list[Sample], predictions: Mapping[str, int | str | None], *, seed: int
) -> dict[str, int | str | None]:
    filled = dict(predictions)
    for problem in problems:
        if filled[problem.qid] is None and problem.kind == "choices":
            filled[problem.qid] = guess_answer(problem.qid, len(problem.choices), seed)
    return filled


def _percent(outcomes: Iterable[float]) -> float | None:
    outcomes = list(outcomes)
    return round(100 * sum(outcomes) / len(outcomes), 2) if outcomes else None


def _reading_order(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", text)]
