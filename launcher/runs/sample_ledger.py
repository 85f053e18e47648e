"""The ledger: the questions of every training step, and its verification.

    {"step": 12, "steps_per_epoch": 250, "blocks": {"0": ["17", "3940"], "2": ["5", "88"]}}

Each rank records the blocks that it has read and trained on. A step that was trained twice
because of a restart must have the same questions both times.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launcher.runs.journal import JournalReader, LineFile
from launcher.runs.records import LEDGER_LINE
from launcher.runs.run_dir import RunDir
from mmcot.errors import OperationError


class LedgerError(OperationError):
    """The ledger is missing or inconsistent; the message names steps and questions."""


class Ledger:
    """Appends the steps of one rank to its file."""

    def __init__(self, path: Path, steps_per_epoch: int) -> None:
        self._lines = LineFile(path)
        self._steps_per_epoch = steps_per_epoch

    def record(self, step: int, blocks: Sequence[tuple[int, Sequence[str]]]) -> None:
        """Append one step: pairs of block index and question ids."""
        ids = {str(index): list(qids) for index, qids in blocks}
        self._lines.append({"step": step, "steps_per_epoch": self._steps_per_epoch, "blocks": ids})


def verify_ledger(run_dir: RunDir, stage: str, qids: Sequence[str]) -> list[str]:
    """Verify that each epoch of a stage used each question exactly once.

    Args:
        qids: all questions of the training split.

    Returns:
        one human-readable line per epoch.

    Raises:
        LedgerError: there is no ledger, a step is missing or was repeated with other
            questions, or a question was used twice or never in a whole epoch.
    """
    steps, steps_per_epoch = _read(run_dir, stage)
    if len(steps) != max(steps) + 1:
        missing = list(itertools.islice((step for step in range(max(steps)) if step not in steps), 10))
        raise LedgerError(
            f"{run_dir.logs}/{stage}-ledger-rank*.jsonl have no record of steps {missing}; restore the files, or train "
            "the stage again"
        )
    lines, everything = [], set(qids)
    for first in range(0, len(steps), steps_per_epoch):
        epoch, last = first // steps_per_epoch, min(first + steps_per_epoch, len(steps))
        used = Counter(qid for step in range(first, last) for block in steps[step].values() for qid in block)
        twice = sorted(qid for qid, count in used.items() if count > 1)
        unknown, never = sorted(set(used) - everything), sorted(everything - set(used))
        if twice or unknown or (never and last - first == steps_per_epoch):
            raise LedgerError(
                f"{run_dir.logs}/{stage}-ledger-rank*.jsonl, epoch {epoch}: questions used twice {twice[:10]}, never "
                f"{never[:10]}, not in the training split {unknown[:10]}; restore the files or the data, or train the "
                "stage again"
            )
        whole = "each exactly once" if not never else f"none twice, {len(never):,} not reached before the end"
        lines.append(f"{stage}, epoch {epoch}: steps {first:,} to {last - 1:,}, {len(used):,} questions, {whole}")
    return lines


def _read(run_dir: RunDir, stage: str) -> tuple[dict[int, dict[str, list[str]]], int]:
    paths = sorted(run_dir.logs.glob(f"{stage}-ledger-rank*.jsonl"))
    if not paths:
        raise LedgerError(f"{run_dir.path}: stage {stage!r} has no ledger; train with --set training.ledger=true")
    steps: dict[int, dict[str, list[str]]] = {}
    steps_per_epoch = 0
    for path in paths:
        # The reader skips a line that is incomplete after a kill: the restarted rank repeats the step.
        for line in JournalReader(path, shape=LEDGER_LINE).read():
            if steps_per_epoch not in (0, line["steps_per_epoch"]):
                raise LedgerError(
                    f"{path}: step {line['step']} is of epochs of {line['steps_per_epoch']:,} steps, others of "
                    f"{steps_per_epoch:,}; restore the file, or train the stage again"
                )
            steps_per_epoch = line["steps_per_epoch"]
            blocks = steps.setdefault(line["step"], {})
            for index, qids in line["blocks"].items():
                if blocks.setdefault(index, qids) != qids:
                    raise LedgerError(
                        f"{path}: step {line['step']}, block {index} was repeated with other questions; "
                        "restore the file, or train the stage again"
                    )
    if not steps:
        raise LedgerError(
            f"{run_dir.logs}/{stage}-ledger-rank*.jsonl record no step; restore the files, or train the stage again"
        )
    return steps, steps_per_epoch
