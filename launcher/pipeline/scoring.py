"""Joining the answers of a split, scoring them, and printing the scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json
from data_shards.generated_texts import list_tasks
from data_shards.rationale_reader import read_rationales
from launcher.evaluation.agreement import agreement_lines, flat_agreement, read_agreements
from launcher.evaluation.predictions import score, write_predictions
from launcher.evaluation.tables import ceiling_rows, format_table, score_lines
from launcher.pipeline.attempt import Attempt
from launcher.stages.data_folder import DataFolder
from launcher.tracking.run_log import RunLog
from mmcot.texts.sample import Sample


def score_split(
    attempt: Attempt,
    folder: DataFolder,
    split: str,
    problems: dict[str, Sample],
    parts: Path,
    child: RunLog,
    *,
    predictions: Path,
    scores: Path,
) -> dict[str, Any]:
    """Join the answers of a split into a file of predictions, score them, and log both files.

    Args:
        parts: the folder of the answers, a file for each task.
        predictions: the file of predictions to write.
        scores: the file of scores to write.
    """
    settings, chain = attempt.settings, attempt.settings.chain
    reads = chain.stages[-1].reads
    lines = write_predictions(
        predictions,
        parts_dir=parts,
        tasks=list_tasks(folder.path, [split], task_samples=settings.generation.task_samples),
        problems=problems,
        chain=chain,
        format=settings.stage(chain.stages[-1].name).format,
        texts={
            text: read_rationales(attempt.run_dir.texts(text), split, field=chain.field_of(text))
            for text in chain.texts  # all texts before the answers, in the order of the chain
        },
        rationale_agreements=read_agreements(attempt.run_dir.texts(reads[-1]), split) if reads else {},
    )
    report = score(lines, problems, split=split, gold_reasons=settings.gold_reasons)
    commit_json(scores, report)
    child.log_artifact(predictions, "predictions")
    child.log_artifact(scores)
    return report


def show_scores(
    scores: dict[str, Any], problems: dict[str, Sample], folder: DataFolder, report: Callable[[str], None]
) -> None:
    """Print the scores of a split; those of test with the ceilings."""
    split = scores["split"]
    rows = {f"{split}, {scores['num_questions']:,}": scores["accuracy"]}
    rows |= ceiling_rows(problems, folder.ceilings) if split == "test" else {}
    report(f"\n{format_table(rows)}")
    for line in (*score_lines(scores), *agreement_lines(scores)):
        report(line)


def flat_scores(scores: dict[str, Any]) -> dict[str, float | None]:
    """Every score of a split by its name in MLflow, such as test_accuracy_AVG."""
    split = scores["split"]
    flat = {f"{split}_accuracy_{column}": value for column, value in scores["accuracy"].items()}
    flat |= {
        f"{split}_{name}": value for part in ("rationale", "answers") for name, value in scores.get(part, {}).items()
    }
    return flat | {f"{split}_parse_failure_rate": scores["parse_failure_rate"]} | flat_agreement(scores)
