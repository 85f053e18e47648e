"""What Ray Tune is given: the tuner with its search, scheduler and callback."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.config.settings import Settings
from launcher.runs.progress import Phase, describe_values
from launcher.runs.run_dir import RunDir, RunError
from launcher.training.launch import release_workers
from launcher.tuning.trial import OBJECTIVES, TrialJob, run_trial

TRIAL_MEMORY = 500_000_000  # bytes of the driver process of a trial


def build_tuner(job: TrialJob, concurrent: int, report: Callable[[str], None]) -> Any:
    """The tuner of a tuning, restored where it was interrupted."""
    from ray import tune

    # A trial that is ended frees its workers at once.
    os.environ.update(TUNE_FORCE_TRIAL_CLEANUP_S="3", TUNE_GLOBAL_CHECKPOINT_S="5")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # this package handles Ctrl-C and SIGTERM
    settings, storage = job.settings.tuning, Path(job.folder) / "tune"
    # No processor for the trial itself: its workers compute, and a fraction of one would leave too few for them.
    trainable = tune.with_resources(tune.with_parameters(run_trial, job=job), {"memory": TRIAL_MEMORY})
    path = storage / "trials"
    if tune.Tuner.can_restore(str(path)):
        try:
            return tune.Tuner.restore(str(path), trainable, resume_unfinished=True, resume_errored=False)
        except (EOFError, pickle.UnpicklingError):
            raise RunError(
                f"Ray Tune's state in {path} is cut off, as after a kill while it was written; delete {path} to start "
                "this tuning again"
            ) from None
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


def _watch_trials(trials: Path, report: Callable[[str], None]) -> Any:
    """A callback that prints every loss and end, and releases the workers of trials that end or start again."""
    from ray.tune import Callback

    def free(trial: Any) -> None:
        for folder in trials.glob(f"{trial.trial_id}*"):
            release_workers(RunDir(folder))

    class Watch(Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            metrics = ", ".join(f"{name} {result[name]:.4f}" for name in OBJECTIVES if name in result)
            report(f"  {describe_values(trial.config)}, step {result.get('step', 0):,}: {metrics}")

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            free(trial)
            report(Phase(f"  {describe_values(trial.config)}: running"))

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            free(trial)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            free(trial)
            report(f"  {describe_values(trial.config)} (trial {trial.trial_id}) failed; the others continue")

    return Watch()


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
        num_steps = settings.stage(settings.watched_stage).num_steps
        assert num_steps is not None  # check_space refuses it
        return schedulers.ASHAScheduler(  # one step more than there are, so that the last trials can export their model
            time_attr="step",
            max_t=num_steps + 1,
            grace_period=tuning.grace_steps or min(every, num_steps),
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
