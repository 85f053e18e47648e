"""Tables of accuracy for the console and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcot.metrics.metrics import COLUMNS, expected_accuracy_table
from mmcot.metrics.table import METRICS
from mmcot.texts.sample import Sample

_FIRST = ("rougeL", "bleu4")  # of the console's line
_NOT_PRINTED = ("bleu1",)


def ceiling_rows(problems: Mapping[str, Sample], ceilings: dict[str, Any] | None) -> dict[str, dict[str, float | None]]:
    """Bayes-optimal accuracy from the text alone, by arm and column; empty where it is unknown for a sample."""
    per_skill = ceilings["per_skill"] if ceilings else {}
    if ceilings is None or any(problem.skill not in per_skill for problem in problems.values()):
        return {}
    names = {"direct_text": "ceiling, text alone, answer at once", "chain_text": "ceiling, text alone, greedy chain"}
    return {
        name: expected_accuracy_table(problems, {qid: per_skill[p.skill][arm] for qid, p in problems.items()})
        for arm, name in names.items()
    }


def format_table(rows: dict[str, dict[str, float | None]]) -> str:
    """Format a plain-text table: one row per name, with the nine columns."""
    width = max(len(name) for name in rows)
    head = " " * width + "".join(f"{column:>8}" for column in COLUMNS)
    body = [
        f"{name:<{width}}" + "".join(f"{'-' if row[c] is None else format(row[c], '.2f'):>8}" for c in COLUMNS)
        for name, row in rows.items()
    ]
    return "\n".join([head, *body])


def score_lines(scores: dict[str, Any]) -> list[str]:
    """The metrics of a split's texts by their labels, and the share of answers that could not be read."""
    values = scores["rationale"] | scores.get("answers", {})
    names = dict.fromkeys([*_FIRST, *(name for name in values if name in METRICS and name not in _NOT_PRINTED)])
    found = {METRICS[name].label: values[name] for name in names if values.get(name) is not None}
    texts = "".join(f"{label} {value:.2f}   " for label, value in found.items())
    return [f"{texts}answers that could not be read {scores['parse_failure_rate']:.2f}%"]
