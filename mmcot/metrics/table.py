"""All metrics of texts in one table, which scores, MLflow, the console and the report read.

    METRICS["rougeL"].per_pair("Ice is cold.", ["Ice is cold."])     # 1.0

A metric is one entry. This module imports no metric's library before a pair is scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from mmcot.errors import InputError
from mmcot.metrics.free_answers import anls, exact_match, rouge_l, vqa_accuracy


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a text.

    Attributes:
        label: its human-readable name.
        per_pair: maps a text and the accepted texts to a number, from 0 to 1 where it is shown in percent.
        better: "higher" or "lower".
        of: the texts that it judges, "rationale" or "answer" (a free answer, a caption, the end of a document).
    """

    label: str
    per_pair: Callable[[str, Sequence[str]], float]
    better: str = "higher"
    of: str = "answer"

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower") or self.of not in ("rationale", "answer"):
            raise InputError(
                f"metric {self.label!r}: better is {self.better!r} and of is {self.of!r}; expected higher or "
                "lower, and rationale or answer"
            )


def _bleu(max_order: int) -> Callable[[str, Sequence[str]], float]:
    def per_pair(text: str, references: Sequence[str]) -> float:
        from mmcot.metrics.rationale_metrics import sentence_bleu

        return max((sentence_bleu(text, reference, max_order) for reference in references), default=0.0)

    return per_pair


# By name; a plain dict, to which extensions add theirs. A name is used in scores.json and MLflow.
METRICS: dict[str, Metric] = {
    "bleu1": Metric("BLEU-1", _bleu(1), of="rationale"),
    "bleu4": Metric("BLEU-4", _bleu(4), of="rationale"),
    "rougeL": Metric("ROUGE-L", rouge_l, of="rationale"),
    "exact_match": Metric("exact match", exact_match),
    "vqa_accuracy": Metric("VQA accuracy", vqa_accuracy),
    "anls": Metric("ANLS", anls),
    "answer_rougeL": Metric("ROUGE-L of answers", rouge_l),
}


def mean_scores(pairs: Iterable[tuple[str, Sequence[str]]], *, of: str) -> dict[str, float | None]:
    """The mean of every metric of one kind of texts, in percent with two decimals; None without a pair."""
    pairs = list(pairs)
    scores: dict[str, float | None] = {}
    for name, metric in METRICS.items():
        if metric.of == of:
            values = [metric.per_pair(text, references) for text, references in pairs]
            scores[name] = round(100 * sum(values) / len(values), 2) if values else None
    return scores
