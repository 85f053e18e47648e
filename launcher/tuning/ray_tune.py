"""What Ray Tune is given: the tuner with its search, scheduler and callback.

Ray Tune's saved state is pickled and names the place where it was written: the callback's folder, the storage of trials
and of the search that makes new ones, and the checkpoint that a trial got from another one. All of it is set to the
tuning's present folder when the state is read, so that a moved or copied tuning leaves the first place alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from data_shards.atomic_files import read_json
from launcher.config.settings import Settings
from launcher.runs.progress import Phase, describe_values
from launcher.runs.run_dir import RunDir, RunError
from launcher.training.launch import release_workers
from launcher.tuning.trial import OBJECTIVES, TrialJob, run_trial

TRIAL_MEMORY = 500_000_000  # bytes of the driver process of a trial


def run_trials(job: TrialJob, concurrent: int, report: Callable[[str], None]) -> Any:
    """Run the trials of a tuning to their ends, from where it was interrupted; returns Ray Tune's results."""
    from ray import tune

    # A trial that is ended frees its workers at once.
    os.environ.update(TUNE_FORCE_TRIAL_CLEANUP_S="3", TUNE_GLOBAL_CHECKPOINT_S="5")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # this package handles Ctrl-C and SIGTERM
    settings, storage = job.settings.tuning, Path(job.folder) / "tune"
    # No processor for the trial itself: its workers compute, and a fraction of one would leave too few for them.
    trainable = tune.with_resources(tune.with_parameters(run_trial, job=job), {"memory": TRIAL_MEMORY})
    path, folder = storage / "trials", RunDir(Path(job.folder))
    watch = _watch_trials(folder, report, is_saved_in=path)
    if tune.Tuner.can_restore(str(path)):
        with _saved_state_is_in(path, folder.identity()):
            try:
                tuner = tune.Tuner.restore(str(path), trainable, resume_unfinished=True, resume_errored=False)
            except (EOFError, pickle.UnpicklingError):
                raise RunError(
                    f"Ray Tune's state in {path} is cut off, as after a kill while it was written; delete {path} to "
                    "start this tuning again"
                ) from None
            cast(Any, tuner)._local_tuner.get_run_config().callbacks = [watch]  # the saved one watches the first place
            return tuner.fit()
    tuner = tune.Tuner(
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
            callbacks=[watch],
        ),
    )
    return tuner.fit()


@contextlib.contextmanager
def _saved_state_is_in(path: Path, run_id: str) -> Iterator[None]:
    """Within the block every storage that Ray Tune unpickles is the one in ``path``.

    Ray Tune itself moves the trials that exist, but not its search, which would make new trials at the first place. The
    name of its folder for files that are not copied yet is changed too: on one cluster a copy would share it.
    """
    from ray.train._internal.storage import StorageContext

    here = {"storage_fs_path": str(path.parent), "experiment_dir_name": path.name, "_timestamp": run_id}

    def unpickle(self: Any, state: dict[str, Any]) -> None:
        self.__dict__.update(state | here)

    StorageContext.__setstate__ = unpickle  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del StorageContext.__setstate__  # type: ignore[attr-defined]


def _checkpoints_are_in(path: Path, trials: list[Any]) -> None:
    """Look for the checkpoints of restored trials in ``path``; Ray Tune leaves one of another trial where it was."""
    from ray.tune import Checkpoint

    for trial in trials:
        manager = trial.run_metadata.checkpoint_manager
        for result in (*manager.best_checkpoint_results, manager.latest_checkpoint_result):
            if result is not None and result.checkpoint is not None:
                stored = Path(result.checkpoint.path)
                result.checkpoint = Checkpoint(str(path / stored.parent.name / stored.name))


def _watch_trials(tuning: RunDir, report: Callable[[str], None], *, is_saved_in: Path) -> Any:
    """A callback that prints every loss, hand-over and end, and releases the workers of trials that end or start again.

    Args:
        is_saved_in: the folder of Ray Tune's state.
    """
    from ray.tune import Callback

    trials_folder = tuning.path / "trials"

    def free(trial: Any) -> None:
        for folder in trials_folder.glob(f"{trial.trial_id}*"):
            release_workers(RunDir(folder))

    def handed_over() -> set[Path]:
        return {path for folder in trials_folder.glob("*-from-*") if (path := RunDir(folder).handed_over).exists()}

    class Watch(Callback):
        def __init__(self) -> None:
            self.has_begun = False
            self.said = handed_over()

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if not self.has_begun:
                _checkpoints_are_in(is_saved_in, trials)
            self.has_begun = True

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            for path in sorted(handed_over() - self.said):
                report(f"  {read_json(path)['note']}")
                self.said.add(path)

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
