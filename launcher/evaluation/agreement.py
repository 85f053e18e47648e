"""How far the candidates of a question agree, and how accuracy grows with it.

    agreement_report(lines, problems, key="agreement")
    {"mean": 0.83, "bins": [{"up_to": 0.25, "num_questions": 12, "num_right": 5, "accuracy": 41.67}, ...]}

Agreement is a share from 0 to 1. A bin holds the questions of a quarter of it, its upper end included; accuracy is in
percent, None in a bin without questions. In arXiv:2203.11171 accuracy grows with agreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_shards.generated_texts import verified_files
from data_shards.json_shapes import Between
from data_shards.text_lines import read_lines
from mmcot.texts.answers import is_right
from mmcot.texts.sample import Sample

AGREEMENT = Between(0, 1)
ANSWERS, RATIONALES = "agreement", "rationale_agreement"  # keys of a prediction, and sections of the scores
_BINS = (0.25, 0.5, 0.75, 1.0)


def read_agreements(output_dir: str | Path, split: str) -> dict[str, float]:
    """The agreement of every question of a split whose text was voted on, from a complete output of texts."""
    names = [name for name in verified_files(output_dir) if name.startswith(f"{split}/")]
    shape = {"qid": str, "agreement?": AGREEMENT}
    lines = (line for name in names for line in read_lines(Path(output_dir) / name, shape))
    return {line["qid"]: line["agreement"] for line in lines if "agreement" in line}


def agreement_report(
    lines: Iterable[Mapping[str, Any]], problems: Mapping[str, Sample], *, key: str
) -> dict[str, Any] | None:
    """The mean agreement, and the accuracy of the answers by it; None where no line has the key.

    Args:
        lines: of a file of predictions.
        key: ``ANSWERS`` or ``RATIONALES``.
    """
    judged = [(line[key], is_right(problems[line["qid"]], line["prediction"])) for line in lines if key in line]
    if not judged:
        return None
    bins = []
    for low, high in zip((-1.0, *_BINS), _BINS, strict=False):  # the first one includes 0
        rights = [right for agreement, right in judged if low < agreement <= high]
        accuracy = round(100 * sum(rights) / len(rights), 2) if rights else None
        bins.append({"up_to": high, "num_questions": len(rights), "num_right": sum(rights), "accuracy": accuracy})
    return {"mean": round(math.fsum(agreement for agreement, _ in judged) / len(judged), 4), "bins": bins}


def flat_agreement(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """The agreements of a split's scores by their names in MLflow, such as test_accuracy_at_agreement_100."""
    flat: dict[str, float | None] = {}
    for key in (ANSWERS, RATIONALES):
        if section := scores.get(key):
            flat[f"{scores['split']}_{key}"] = section["mean"]
            for part in section["bins"]:
                flat[f"{scores['split']}_accuracy_at_{key}_{round(100 * part['up_to'])}"] = part["accuracy"]
    return flat


def agreement_lines(scores: Mapping[str, Any]) -> list[str]:
    """Mean agreement and accuracy by it (with numbers of questions): a line of answers, one of rationales."""
    lines = []
    for key, name in ((ANSWERS, "answers"), (RATIONALES, "rationales")):
        if section := scores.get(key):
            parts = [part for part in section["bins"] if part["num_questions"]]
            by_bin = [f"{part['up_to']:g}: {part['accuracy']:.1f} ({part['num_questions']:,})" for part in parts]
            lines.append(f"agreement of {name} {section['mean']:.2f}; accuracy up to {', '.join(by_bin)}")
    return lines
