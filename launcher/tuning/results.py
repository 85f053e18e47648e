"""What came out of the trials: their list, their rank, and what is logged of them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from data_shards.atomic_files import read_json
from launcher.config.settings import Settings
from launcher.runs.journal import Journal
from launcher.runs.run_dir import TUNING, RunDir
from launcher.tuning.trial import OBJECTIVES


def describe_trials(results: Any, settings: Settings) -> list[dict[str, Any]]:
    """Every trial: its values, steps, objective, and the reason if it failed."""
    tuning, trials = settings.tuning, []
    planned = settings.stage(tuning.stage).num_steps if tuning.stage != "pipeline" else None
    for result in results:
        metrics = result.metrics or {}
        step = metrics.get("step", 0)
        state = (
            "failed"
            if result.error
            else "stopped early"
            if planned and tuning.objective == "validation_loss" and step < planned
            else "finished"
        )
        trials.append(
            {
                "trial": Path(result.path).name,
                "values": _values_of(result),
                "state": state,
                "step": step,
                tuning.objective: metrics.get(tuning.objective),
                "error": str(result.error).strip().splitlines()[-1] if result.error else None,
            }
        )
    return trials


def _values_of(result: Any) -> dict[str, Any]:
    """The values of a trial; after a restart Ray Tune lacks them for a trial that failed before its first report."""
    return result.config or read_json(Path(result.path) / "params.json")


def log_outcome(run_dir: RunDir, trials: list[dict[str, Any]], values: dict[str, float | None]) -> None:
    """Log what the trials reached on the tuning's run, at the sum of their steps, so that later trials add points."""
    counts = {
        "num_trials": float(len(trials)),
        "num_failed": float(sum(trial["state"] == "failed" for trial in trials)),
    }
    with contextlib.closing(Journal(run_dir.journal_of(TUNING))) as journal:
        journal.log(
            sum(trial["step"] for trial in trials),
            {**counts, **{name: float(value) for name, value in values.items() if value is not None}},
        )


def rank(trials: list[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
    """Trials that reported the objective, the best first."""
    sign = 1 if OBJECTIVES[objective] == "min" else -1
    return sorted(
        (trial for trial in trials if trial[objective] is not None), key=lambda trial: sign * trial[objective]
    )
