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
from launcher.runs.journal import Journal, JournalReader, LineFile
from launcher.runs.ownership import owned
from launcher.runs.run_dir import PARENT, TUNING, RunDir
from launcher.runs.run_settings import write_or_verify_settings
from launcher.runs.signals import sigterm_stops
from launcher.tracking.run_log import RunLog, Tracker, open_tracker
from launcher.tracking.sending import sync_run
from launcher.training.launch import release_workers
from launcher.tuning.plots import plot_trials
from launcher.tuning.space import check_space, with_values
from launcher.tuning.trial import OBJECTIVES, TrialJob, run_trial

TRIAL_MEMORY = 500_000_000  # bytes of the driver process of a trial
Report = Callable[[str], None]
Finish = Callable[[Settings, RunDir, list[dict[str, Any]], Tracker, Report], None]


def run_tuning(
    settings: Settings, *, kind: str = "tune", report: Report = print, finish: Finish | None = None
) -> RunDir:
    """Run the trials of ``settings.tuning`` that are not finished; write the results.

    Args:
        kind: the end of the folder's default name.
        finish: writes the results, given settings, folder, trials, tracker and report; default: best settings, plots.

    Raises:
        SettingsError: the space does not fit the schema, or the folder holds another tuning.
        RunError: another process runs it.
    """
    check_space(settings)
    if settings.tuning.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise SettingsError(
            "tuning.search optuna needs a package: pip install 'mmcot[optuna]', or use tuning.search=random"
        )
    settings = in_own_folder(settings, kind)
    check_settings(settings)
    check_machine(settings)
    run_dir = RunDir(settings.run_dir.absolute())
    run_dir.path.mkdir(parents=True, exist_ok=True)
    write_or_verify_settings(run_dir, settings)
    with sigterm_stops(), owned(run_dir), contextlib.ExitStack() as resources:
        settings = with_device(settings, run_dir, report)
        # Once for all trials; a trial's data settings may still differ.
        folder = standing_mini_sqa(settings, run_dir.data_marker()) or prepare_data(settings, report)
        resources.enter_context(ray_session(settings.cluster))
        concurrent = count_concurrent(settings, report)
        tracker = resources.enter_context(open_tracker(settings, run_dir, report=report))
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
        results = _tuner(job, concurrent, report).fit()
        end_trials(base, run_dir)
        (finish or _finish)(settings, run_dir, _describe_trials(results, settings), tracker, report)
    return run_dir


def in_own_folder(settings: Settings, kind: str) -> Settings:
    """A tuning's settings with a name, and so a default folder, that no run of the same settings has.

    A tuning that an earlier version started in the run's own folder keeps that folder.
    """
    if settings.run.dir is not None or (settings.run_dir / "trials").is_dir():
        return settings
    return settings.model_copy(update={"run": settings.run.model_copy(update={"name": f"{settings.run.name}-{kind}"})})


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
    report(f"{min(fits, wanted)} trials at a time: one takes {sums}")
    return min(fits, wanted)


def _tuner(job: TrialJob, concurrent: int, report: Report) -> Any:
    from ray import tune

    # A trial that is ended frees its workers at once.
    os.environ.update(TUNE_FORCE_TRIAL_CLEANUP_S="3", TUNE_GLOBAL_CHECKPOINT_S="5")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # this package handles Ctrl-C and SIGTERM
    settings, storage = job.settings.tuning, Path(job.folder) / "tune"
    # No processor for the trial itself: its workers compute, and a fraction of one would leave too few for them.
    trainable = tune.with_resources(tune.with_parameters(run_trial, job=job), {"memory": TRIAL_MEMORY})
    path = storage / "trials"
    if tune.Tuner.can_restore(str(path)):
        return tune.Tuner.restore(str(path), trainable, resume_unfinished=True, resume_errored=False)
    return tune.Tuner(
        trainable,
        param_space=_param_space(job.settings),
        tune_config=tune.TuneConfig(
            metric=settings.objective,
            mode=OBJECTIVES[settings.objective],
            num_samples=settings.num_samples,
            time_budget_s=settings.time_budget_s,
            search_alg=_search(settings, job.settings.run.seed, concurrent),
            scheduler=_scheduler(job.settings),
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            verbose=0,
            callbacks=[_watch_trials(Path(job.folder) / "trials", report)],
        ),
    )


def _watch_trials(trials: Path, report: Report) -> Any:
    """A callback that prints every loss and end, and releases the workers of trials that end or start again."""
    from ray.tune import Callback

    def free(trial: Any) -> None:
        for folder in trials.glob(f"{trial.trial_id}*"):
            release_workers(RunDir(folder))

    class Watch(Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            metrics = ", ".join(f"{name} {result[name]:.4f}" for name in OBJECTIVES if name in result)
            report(f"  {trial.trial_id} step {result.get('step', 0):,}: {metrics}")

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            free(trial)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            free(trial)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            free(trial)
            report(f"  {trial.trial_id} failed; the others continue")

    return Watch()


def end_trials(settings: Settings, run_dir: RunDir) -> None:
    """Log the end of trials that Tune ended, and send what they could not send."""
    for folder in sorted((run_dir.path / "trials").iterdir()):
        trial = RunDir(folder)
        if not trial.tracking.exists():
            continue
        open_runs: dict[str, None] = {}
        for line in JournalReader(trial.tracking).read():
            if line["do"] == "start":
                open_runs[line["run"]] = None
            elif line["do"] == "end":
                open_runs.pop(line["run"], None)
        with contextlib.closing(LineFile(trial.tracking)) as file:
            for name in reversed(open_runs):
                RunLog(file, name).end("KILLED")
        with contextlib.suppress(RuntimeError):  # MLflow is not reachable; `mmcot sync` of the trial sends it
            sync_run(trial, settings)


def _param_space(settings: Settings) -> dict[str, Any]:
    from ray import tune

    make = {
        "loguniform": lambda values: tune.loguniform(*values),
        "uniform": lambda values: tune.uniform(*values),
        "randint": lambda values: tune.randint(*values),
        "choice": tune.choice,
        "grid": tune.grid_search,
    }
    space = {name: make[kind](values) for name, spec in settings.tuning.space.items() for kind, values in spec.items()}
    return space | ({"arm": tune.grid_search(list(settings.tuning.arms))} if settings.tuning.arms else {})


def _search(tuning: Any, seed: int, concurrent: int) -> Any:
    if tuning.search == "optuna":
        from ray.tune.search import ConcurrencyLimiter
        from ray.tune.search.optuna import OptunaSearch

        return ConcurrencyLimiter(OptunaSearch(seed=seed), max_concurrent=concurrent)
    from ray.tune.search import BasicVariantGenerator

    return BasicVariantGenerator(
        max_concurrent=concurrent, random_state=seed
    )  # TuneConfig's limit does not apply to it


def _scheduler(settings: Settings) -> Any:
    from ray.tune import schedulers

    tuning, every = settings.tuning, settings.training.validate_every
    if tuning.scheduler == "asha":
        stage = getattr(settings, tuning.stage)
        if stage.num_steps is None:
            raise SettingsError(f"scheduler asha counts steps; give {tuning.stage}.num_steps instead of num_epochs")
        return schedulers.ASHAScheduler(  # one step more than there are, so that the last trials can export their model
            time_attr="step",
            max_t=stage.num_steps + 1,
            grace_period=tuning.grace_steps or every,
            reduction_factor=tuning.reduction_factor,
        )
    if tuning.scheduler == "median":
        return schedulers.MedianStoppingRule(time_attr="step", grace_period=tuning.grace_steps or every)
    if tuning.scheduler == "pbt":
        mutations = {name: _param_space(settings)[name] for name, spec in tuning.space.items() if "grid" not in spec}
        return schedulers.PopulationBasedTraining(
            time_attr="step", perturbation_interval=tuning.grace_steps or every, hyperparam_mutations=mutations
        )
    return schedulers.FIFOScheduler()


def _describe_trials(results: Any, settings: Settings) -> list[dict[str, Any]]:
    """Every trial: its values, steps, objective, and the reason if it failed."""
    tuning, trials = settings.tuning, []
    planned = getattr(settings, tuning.stage).num_steps if tuning.stage != "pipeline" else None
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
                "values": result.config,
                "state": state,
                "step": step,
                tuning.objective: metrics.get(tuning.objective),
                "error": str(result.error).strip().splitlines()[-1] if result.error else None,
            }
        )
    return trials


def _finish(
    settings: Settings, run_dir: RunDir, trials: list[dict[str, Any]], tracker: Tracker, report: Report
) -> None:
    """Write the table, the best settings and the plots; log them on the parent run."""
    objective = settings.tuning.objective
    commit_json(run_dir.path / "trials.json", trials)
    tracker.parent.log_artifact(run_dir.path / "trials.json")
    for trial in trials:
        value = "-" if trial[objective] is None else f"{trial[objective]:.4f}"
        report(
            f"  {trial['trial']}  {objective} {value}  step {trial['step']:,}  {trial['state']}  {trial['error'] or ''}"
            f"  {trial['values']}"
        )
    ranked = rank(trials, objective)
    if not ranked:
        raise RuntimeError(
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
        f"best: {objective} {best[objective]:.4f} with {best['values']}; "
        f"`mmcot run --config {run_dir.path / 'best.yaml'}`"
    )


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
