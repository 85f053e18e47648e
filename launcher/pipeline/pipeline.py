"""The whole job, step by step: the data, the stages of the chain, the evaluation.

A step is done if its marker exists and its inputs are the same; running again resumes at the
first step that is not done. The first step that needs Ray or MLflow opens it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from data_shards.leftovers import describe_leftovers, remove_leftovers
from data_shards.sources.question_set import SPLITS
from launcher.cluster.gpus import check_gpus_free, with_device
from launcher.config.loading import merge_override, parse_settings, tracking_uri
from launcher.config.settings import Settings, SettingsError
from launcher.pipeline.attempt import Attempt, Report
from launcher.pipeline.full_disk import full_disk_explained
from launcher.pipeline.preflight import check_machine, check_settings
from launcher.pipeline.steps import Steps, WriteJob
from launcher.runs.adoption import continue_here, copied_from
from launcher.runs.ownership import owned
from launcher.runs.progress import Phase
from launcher.runs.run_dir import RunDir, RunError
from launcher.runs.run_settings import (
    has_begun,
    keep_name,
    keep_zero_stage,
    settings_of,
    with_present_places,
    write_first_settings,
    write_or_verify_settings,
)
from launcher.runs.signals import sigterm_stops
from launcher.runs.status import describe_start
from launcher.stages.hub import fetch_pretrained
from launcher.tracking.sending import is_everything_logged


def run_pipeline(
    settings: Settings,
    *,
    until: str | None = None,
    report: Report = print,
    write_job: Path | None = None,
    parent_key: str | None = None,
    arm: str | None = None,
    adopt: bool = False,
    take_over: bool = False,
) -> RunDir:
    """Run all steps up to ``until`` that are not done yet; None: all steps.

    Args:
        parent_key: key of the parent run in MLflow, where this run is a child.
        arm: the tuning's arm, where this run is a trial of it.
        adopt: make a copied folder a run of its own first (``launcher/runs/adoption.py``).
        take_over: from an owner that seems alive.
        write_job: write the training step ``until`` into this file, for torchrun, instead of running it.

    Raises:
        SettingsError: the folder holds a run of other settings, or the chain has no such step.
        RunError: another process runs it, it is a copy, or a finished step's inputs have changed.
        Stopped: a stop was requested (SIGTERM, Ctrl-C, SIGHUP); the same command resumes.
    """
    names = settings.chain.steps
    until = names[-1] if until is None else until
    if until not in names:
        raise SettingsError(f"run.chain {settings.run.chain!r} has no step {until!r}; it has {', '.join(names)}")
    run_dir = RunDir(settings.run_dir)
    settings = with_present_places(run_dir, settings, keep=True)
    check_settings(settings)
    check_machine(settings)
    tracking_uri(settings)  # a URI that is not allowed is refused before any work
    if settings.model.pretrained:
        fetch_pretrained(settings.model.pretrained)
    run_dir.path.mkdir(parents=True, exist_ok=True)
    if begun := has_begun(run_dir):
        settings = _same_settings(run_dir, settings, report)
    ownership = owned(run_dir, take_over=take_over, report=report)
    explained = full_disk_explained(run_dir, settings)
    with explained, sigterm_stops(), ownership as number, contextlib.ExitStack() as resources:
        if not begun:
            settings = _same_settings(run_dir, settings, report)  # it may have begun while this process waited
        # After --take-over the former owner may be alive, and its folders in use.
        for line in describe_leftovers(*remove_leftovers(run_dir.path, staging=not take_over)):
            report(line)
        continue_here(run_dir, adopt=adopt, report=report)
        requested = settings.cluster.use_gpu
        if not write_job or requested == "auto":
            settings = with_device(settings, run_dir, report, keep=not write_job)
        wanted = names[: names.index(until) + 1]
        if not write_job and any(run_dir.marker(name) is None for name in wanted):
            check_gpus_free(settings.cluster, report)
        for line in describe_start(settings, run_dir):
            report(line)
        attempt = Attempt(settings, run_dir, number, report, resources, parent_key=parent_key, arm=arm)
        steps = Steps(attempt, WriteJob(until, write_job, requested) if write_job else None)
        for name in wanted:
            steps.run(name)
        if until == names[-1] and (attempt.num_run or not is_everything_logged(run_dir)):
            attempt.write_report()  # also if the last attempt ended after the last marker
        elif attempt.num_run == 0 and not is_everything_logged(run_dir):
            _ = attempt.tracker  # its end is FINISHED: the last attempt ended after this marker
        if attempt.num_run:
            report(Phase("  sending the rest to MLflow, ending Ray"))
        else:
            report(f"{run_dir.path} is finished up to step {until!r}; there is nothing to do")
    return run_dir


def _same_settings(run_dir: RunDir, settings: Settings, report: Report) -> Settings:
    """Verify that the run's settings are these, and return them with what an earlier start has decided."""
    if has_begun(run_dir):
        settings = keep_zero_stage(run_dir, keep_name(run_dir, settings))
        notes = write_or_verify_settings(run_dir, settings)
    else:
        notes = write_first_settings(run_dir, settings)
    for note in notes:
        report(note)
    return settings


def evaluate_run(folder: Path, split: str, *, overrides: Sequence[str] = (), report: Report = print) -> Path:
    """Answer and score a split with the models and texts of a finished run; an interrupted one is continued.

    Args:
        split: train, val or test.
        overrides: settings that no result depends on, such as ``cluster.num_workers=4``.

    Returns:
        the folder of the results, ``evaluations/<split>`` in the run's: predictions.jsonl, scores.json and parts/.

    Raises:
        RunError: the folder holds no finished run, or none whose chain answers.
        SettingsError: a setting would change the results.
        Stopped: a stop was requested (SIGTERM, Ctrl-C, SIGHUP); the same command continues.
    """
    run_dir = RunDir(folder)
    values = settings_of(run_dir).model_dump()
    for override in overrides:
        values = merge_override(values, override)
    settings = parse_settings(values)
    if settings.run_dir != folder:
        raise SettingsError(f"run.dir {settings.run_dir} is not {folder}; give the folder as RUN alone")
    if split not in SPLITS:
        raise SettingsError(f"--split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    if settings.chain.answering is None:
        raise RunError(f"the chain of {folder} has no stage that answers; give a run of another chain")
    needed = settings.chain.steps[:-1]
    if missing := [step for step in needed if run_dir.marker(step) is None]:
        raise RunError(f"{folder} is not finished: step {missing[0]!r} is to do; run `mmcot run` to its end first")
    write_or_verify_settings(run_dir, settings)
    check_machine(settings)
    source = copied_from(run_dir)
    ownership, explained = owned(run_dir, report=report), full_disk_explained(run_dir, settings)
    with explained, sigterm_stops(), ownership as number, contextlib.ExitStack() as resources:
        if source is None:
            continue_here(run_dir, report=report)
        else:
            report(f"{folder} is a copy of {source}, so MLflow is sent nothing of this evaluation")
        settings = with_device(settings, run_dir, report, keep=False)
        check_gpus_free(settings.cluster, report)
        steps = Steps(Attempt(settings, run_dir, number, report, resources, sends=source is None))
        for step in needed:
            steps.run(step)
        results = run_dir.evaluation(split)
        steps.evaluate_split(split, results)
    return results
