"""A tuning: trials under Ray Tune, each a separate run, all children of one MLflow run.

run_tuning(settings)     # `mmcot tune`; again: finished trials are kept, the others resume

runs/<name>-tune/        next to the run of that name, not in it; or run.dir
  run.yaml               settings with the space; other settings are refused
  trials/<id>/           a run folder per trial
  tune/                  Ray Tune's own state
  trials.json best.yaml  every trial with its values, state and reason; the best as settings
  best.png parallel.png importance.png
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_bytes, commit_json
from launcher.cluster.gpus import with_device
from launcher.cluster.ray_session import ray_session
from launcher.config.loading import dump_settings, tracking_uri
from launcher.config.settings import Settings, SettingsError
from launcher.data.build import prepare_data, standing_mini_sqa
from launcher.pipeline.preflight import check_machine, check_settings
from launcher.runs.adoption import continue_here
from launcher.runs.journal import JournalReader, LineFile
from launcher.runs.ownership import owned
from launcher.runs.progress import describe_values
from launcher.runs.records import read_trials, shape_of_tracking_line
from launcher.runs.run_dir import PARENT, RunDir
from launcher.runs.run_settings import (
    keep_name,
    keep_zero_stage,
    with_present_places,
    write_or_verify_settings,
)
from launcher.runs.signals import sigterm_stops
from launcher.tracking.descriptions import describe_tuning
from launcher.tracking.run_log import RunLog, Tracker, open_tracker
from launcher.tracking.sending import is_everything_logged, sync_run
from launcher.tuning.plots import plot_trials
from launcher.tuning.ray_tune import run_trials
from launcher.tuning.results import describe_trials, log_outcome, rank
from launcher.tuning.space import check_space, with_values
from launcher.tuning.trial import OBJECTIVES, TrialJob
from mmcot.errors import OperationError

Report = Callable[[str], None]
Finish = Callable[[Settings, RunDir, list[dict[str, Any]], Tracker, Report], None]


def run_tuning(
    settings: Settings,
    *,
    kind: str = "tune",
    report: Report = print,
    finish: Finish | None = None,
    adopt: bool = False,
) -> RunDir:
    """Run the trials of ``settings.tuning`` that are not finished; write the results.

    Args:
        kind: the end of the folder's default name.
        adopt: make a copied folder a tuning of its own first (``launcher/runs/adoption.py``).
        finish: writes the results, given settings, folder, trials, tracker and report; default: best settings, plots.

    Raises:
        SettingsError: the space does not fit the schema, or the folder holds another tuning.
        RunError: another process runs it, or it is a copy.
    """
    check_space(settings)
    if settings.tuning.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise SettingsError(
            "tuning.search optuna needs a package: pip install 'mmcot[optuna]', or use tuning.search=random"
        )
    started_as = _name_of(settings, kind)
    settings = in_own_folder(settings, kind)
    run_dir = RunDir(settings.run_dir.absolute())
    settings = with_present_places(run_dir, settings, keep=True)
    check_settings(settings)
    check_machine(settings)
    run_dir.path.mkdir(parents=True, exist_ok=True)
    settings = keep_zero_stage(run_dir, keep_name(run_dir, settings, started_as=started_as))
    for note in write_or_verify_settings(run_dir, settings):
        report(note)
    if is_finished(settings, run_dir) and not adopt:
        end_trials(settings, run_dir, send_all=False)
        report(f"{run_dir.path} is finished; there is nothing to do, `mmcot status {run_dir.path}` shows its trials")
        return run_dir
    (run_dir.path / "trials").mkdir(exist_ok=True)  # `mmcot status` knows a tuning by it
    with sigterm_stops(), owned(run_dir, report=report), contextlib.ExitStack() as resources:
        continue_here(run_dir, adopt=adopt, report=report)
        settings = with_device(settings, run_dir, report)
        # Once for all trials; a trial's data settings may still differ.
        folder = standing_mini_sqa(settings, run_dir.data_marker()) or prepare_data(settings, report, to_train=True)
        resources.enter_context(ray_session(settings.cluster))
        concurrent = count_concurrent(settings, report)
        tracker = resources.enter_context(open_tracker(settings, run_dir, report=report))
        tracker.parent.log_tags(describe_tuning(settings))
        shared = {  # the same paths for all trials, whatever their folder
            "data": settings.data.model_copy(update={"shards_dir": str(Path(folder.location).absolute())}),
            "tracking": settings.tracking.model_copy(update={"uri": tracking_uri(settings)}),
        }
        base = settings.model_copy(update=shared)
        job = TrialJob(
            settings=base,
            folder=str(run_dir.path),
            parent_key=f"{run_dir.identity()}/{PARENT}",
            working_dir=os.getcwd(),
        )
        results = run_trials(job, concurrent, report)
        end_trials(base, run_dir)
        (finish or _finish)(settings, run_dir, describe_trials(results, settings), tracker, report)
    return run_dir


def in_own_folder(settings: Settings, kind: str) -> Settings:
    """A tuning's settings with a name, and so a default folder, that no run of the same settings has.

    A tuning that an earlier version started in the run's own folder keeps that folder.
    """
    if settings.run.dir is not None or (settings.run_dir / "trials").is_dir():
        return settings
    return settings.model_copy(update={"run": settings.run.model_copy(update={"name": _name_of(settings, kind)})})


def _name_of(settings: Settings, kind: str) -> str:
    return f"{settings.run.name}-{kind}"


def is_finished(settings: Settings, run_dir: RunDir) -> bool:
    """Whether every trial has ended and nothing more is to be logged; a time budget may have left some out."""
    tuning, ended = settings.tuning, run_dir.path / "trials.json"
    if tuning.time_budget_s is not None or not ended.exists():
        return False
    grids = [len(values["grid"]) for values in tuning.space.values() if "grid" in values]
    planned = tuning.num_samples * math.prod(grids) * max(1, len(tuning.arms))
    return len(read_trials(ended, objective=tuning.objective)) >= planned and is_everything_logged(run_dir)


def count_concurrent(settings: Settings, report: Report) -> int:
    """The number of trials that fit at the same time.

    Raises:
        SettingsError: no trial fits; the message has the numbers.
    """
    import ray

    cluster, available = settings.cluster, ray.cluster_resources()
    needs = {"CPU": cluster.num_workers * cluster.cpus_per_worker} | (
        {"GPU": cluster.num_workers} if cluster.use_gpu else {}
    )
    fits = min(int(available.get(name, 0) // number) for name, number in needs.items())
    sums = ", ".join(f"{number} of {available.get(name, 0):g} {name}" for name, number in needs.items())
    if fits < 1:
        raise SettingsError(
            f"no trial fits: one needs {sums} (cluster.num_workers {cluster.num_workers} x {cluster.cpus_per_worker} "
            "processors); lower cluster.num_workers or cluster.cpus_per_worker, or join a larger cluster"
        )
    wanted = settings.tuning.max_concurrent or fits
    at_once = min(fits, wanted)
    report(f"{at_once} trial{'s' * (at_once > 1)} at a time: one takes {sums}")
    return min(fits, wanted)


def end_trials(settings: Settings, run_dir: RunDir, *, send_all: bool = True) -> None:
    """Log the end of trials that Tune ended, and send what they could not send.

    Args:
        send_all: send also the lines of trials to which no end was added here.
    """
    for folder in sorted((run_dir.path / "trials").iterdir()):
        trial = RunDir(folder)
        if trial.tracking.exists() and (_log_ends(trial, settings) or send_all):
            with contextlib.suppress(RuntimeError):  # MLflow is not reachable; `mmcot sync` of the trial sends it
                sync_run(trial, settings)


def _log_ends(trial: RunDir, settings: Settings) -> bool:
    """Log FINISHED for what a trial has done though it was killed after its marker, KILLED for what is open."""
    ends: dict[str, str | None] = {}
    for line in JournalReader(trial.tracking, shape=shape_of_tracking_line).read():
        if line["do"] in ("start", "end"):
            ends[line["run"]] = line.get("status")
    added = False
    with contextlib.closing(LineFile(trial.tracking)) as file:
        for name, status in reversed(ends.items()):
            is_done = trial.marker(settings.tuning.until if name == PARENT else name) is not None
            if status is None or (is_done and status == "KILLED"):
                RunLog(file, name, trial.path).end("FINISHED" if is_done else "KILLED")
                added = True
    return added


def _finish(
    settings: Settings, run_dir: RunDir, trials: list[dict[str, Any]], tracker: Tracker, report: Report
) -> None:
    """Write the table, the best settings and the plots; log them on the parent run."""
    objective = settings.tuning.objective
    commit_json(run_dir.path / "trials.json", trials)
    tracker.parent.log_artifact(run_dir.path / "trials.json")
    for trial in trials:
        value = "-" if trial[objective] is None else f"{trial[objective]:.4f}"
        error = f"  {trial['error']}" if trial["error"] else ""
        report(
            f"  {describe_values(trial['values'])}: {objective} {value}, step {trial['step']:,}, {trial['state']} "
            f"(trial {trial['trial']}){error}"
        )
    ranked = rank(trials, objective)
    if not ranked:
        raise OperationError(
            f"no trial reported {objective}; the reasons are above and in {run_dir.path / 'trials'}/*/logs/trial.log"
        )
    best = ranked[0]
    values = with_values(settings, best["values"])
    best_dir = None if settings.run.dir is None else f"{Path(settings.run.dir)}-best"
    values = values.model_copy(
        update={"run": values.run.model_copy(update={"dir": best_dir, "name": f"{settings.run.name}-best"})}
    )
    commit_bytes(run_dir.path / "best.yaml", dump_settings(values).encode())
    tracker.parent.log_artifact(run_dir.path / "best.yaml")
    log_outcome(run_dir, trials, {f"best_{objective}": best[objective]})
    tracker.parent.log_tags(
        {"best.trial": best["trial"], **{f"best.{name}": str(value) for name, value in best["values"].items()}}
    )
    # With a time budget the same command may find a better trial later, and a parameter cannot change.
    if settings.tuning.time_budget_s is None:
        tracker.parent.log_params({f"best.{name}": value for name, value in best["values"].items()})
    for path in plot_trials(trials, run_dir.path, objective=objective, mode=OBJECTIVES[objective]):
        tracker.parent.log_artifact(path)
    report(
        f"best: {describe_values(best['values'])}: {objective} {best[objective]:.4f}; "
        f"`mmcot run --config {run_dir.path / 'best.yaml'}`"
    )
