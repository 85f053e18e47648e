"""Tables of accuracy for the console and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcot.metrics.metrics import COLUMNS, expected_accuracy_table
from mmcot.metrics.table import METRICS
from mmcot.texts.sample import Sample

_FIRST = ("rougeL", "bleu4")  # of the console's line
_NOT_PRINTED = ("bleu1",)
WIDTH = 80  # of a terminal
MANY_UNREAD = 50.0  # percent
_CELL = 7  # a percentage with two decimals, and a space


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
    """Format a plain-text table of at most ``WIDTH`` columns: one row per name.

    A column in which no row has a value is left out; a name that is too long is a number, explained below.
    """
    columns = [column for column in COLUMNS if any(row[column] is not None for row in rows.values())]
    room = WIDTH - _CELL * len(columns)
    long = [name for name in rows if len(name) > room]
    labels = {name: f"[{long.index(name) + 1}]" if name in long else name for name in rows}
    width = max(len(label) for label in labels.values())
    head = " " * width + "".join(f"{column:>{_CELL}}" for column in columns)
    body = [
        f"{labels[name]:<{width}}"
        + "".join(f"{'-' if row[column] is None else format(row[column], '.2f'):>{_CELL}}" for column in columns)
        for name, row in rows.items()
    ]
    return "\n".join([head, *body, *(f"{labels[name]} {name}" for name in long)])


def score_lines(scores: dict[str, Any]) -> list[str]:
    """The metrics of a split's texts by their labels, and the share of answers that could not be read."""
    values = scores["rationale"] | scores.get("answers", {})
    names = dict.fromkeys([*_FIRST, *(name for name in values if name in METRICS and name not in _NOT_PRINTED)])
    found = {METRICS[name].label: values[name] for name in names if values.get(name) is not None}
    texts = "".join(f"{label} {value:.2f}   " for label, value in found.items())
    unread = scores["parse_failure_rate"]
    lines = [f"{texts}answers that could not be read {unread:.2f}%"]
    if unread >= MANY_UNREAD:
        lines.append(
            "note: most answers do not end in 'The answer is (A).' or another letter: the model has not learnt the "
            "form yet; train more steps, or on more questions"
        )
    return lines
