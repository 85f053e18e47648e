"""The run tree in MLflow: a parent run a pipeline, a child a step.

    with open_tracker(settings.tracking, run_dir, settings) as tracker:
        with tracker.step("train-rationale") as child:
            child.follow(run_dir.journal("rationale"))     # points are sent as they are written

Points come from journals and are sent in batches by a thread of the driver. The first
value of a (key, step) stands: what MLflow has already is not sent again, so a restart
continues the same runs and histories never step back. Run ids are kept in the run's
folder, with a key that finds a run whose creator was killed before it could keep the id, and
whether the last attempt left the parent as FINISHED.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_shards.storage import clear_unfinished, commit_json, committing, exclusive, read_json
from launcher.config import Settings, setting_names
from launcher.journal import JournalReader
from launcher.run_dir import RunDir, Stopped

_LOG = logging.getLogger("mmcot.tracking")
_MAX_METRICS_PER_CALL = 900  # MLflow takes at most 1,000


def tracking_uri(settings: Settings) -> str:
    """The setting, else MLFLOW_TRACKING_URI, else mlflow.db in the folder that holds the runs."""
    default = f"sqlite:///{(settings.run_dir.absolute().parent / 'mlflow.db')}"
    return settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


@dataclasses.dataclass
class ChildRun:
    """One MLflow run, for a step of the pipeline."""

    client: Any
    run_id: str
    send_every_s: float

    def log_params(self, params: dict[str, Any]) -> None:
        """Log parameters once; MLflow refuses to change them later."""
        standing = self.client.get_run(self.run_id).data.params
        for key, value in params.items():
            if key not in standing:
                self.client.log_param(self.run_id, key, str(value)[:6000])

    def log_scores(self, scores: dict[str, float | None]) -> None:
        """Log final values, once."""
        standing = self.client.get_run(self.run_id).data.metrics
        for key, value in scores.items():
            if value is not None and key not in standing:
                self.client.log_metric(self.run_id, key, value)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file into the run's artifacts."""
        self.client.log_artifact(self.run_id, str(path), folder)

    @contextlib.contextmanager
    def follow(
        self, journal: Path, on_point: Callable[[dict[str, Any]], None] = lambda point: None
    ) -> Iterator[None]:
        """Send a journal's points while the block lasts, and the rest at its end."""
        stopped = threading.Event()
        sender = threading.Thread(target=self._send_until, args=(journal, on_point, stopped), daemon=True)
        sender.start()
        try:
            yield
        finally:
            stopped.set()
            sender.join()

    def _send_until(self, journal: Path, on_point: Callable, stopped: threading.Event) -> None:
        reader, sent, waiting = JournalReader(journal), self._sent_points(), []
        while True:
            last_look = stopped.wait(self.send_every_s)
            for point in reader.read():
                on_point(point)
                waiting += [(key, point["step"], value, point["time_ms"]) for key, value in point["metrics"].items()]
            sent = self._sent_points() if sent is None else sent
            if sent is not None:
                first = {(key, step): (key, step, value, time_ms) for key, step, value, time_ms in reversed(waiting)}
                waiting = self._send([point for (key, step), point in reversed(first.items()) if (key, step) not in sent])
                sent |= first.keys() - {(key, step) for key, step, *_ in waiting}
            if last_look:
                if waiting:
                    _LOG.warning("%d points of %s did not reach MLflow; they stand in the file", len(waiting), journal)
                return

    def _sent_points(self) -> set[tuple[str, int]] | None:
        """(key, step) of everything the run has already; None while MLflow does not answer."""
        try:
            keys = self.client.get_run(self.run_id).data.metrics
            return {(key, m.step) for key in keys for m in self.client.get_metric_history(self.run_id, key)}
        except Exception as error:  # tracking never stops training
            _LOG.warning("MLflow did not answer, trying again: %s", error)
            return None

    def _send(self, points: list[tuple]) -> list[tuple]:
        """Send what can be sent; returns what is left for the next time."""
        from mlflow.entities import Metric

        while points:
            batch = [Metric(key, value, time_ms, step) for key, step, value, time_ms in points[:_MAX_METRICS_PER_CALL]]
            try:
                self.client.log_batch(self.run_id, metrics=batch)
            except Exception as error:  # tracking never stops training
                _LOG.warning("MLflow did not take %d points, trying again: %s", len(batch), error)
                return points
            points = points[_MAX_METRICS_PER_CALL:]
        return []


@dataclasses.dataclass
class Tracker:
    """The parent run of a pipeline and its children."""

    client: Any
    experiment_id: str
    parent: ChildRun
    run_dir: RunDir
    settings: Settings

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[ChildRun]:
        """The child run of a step, continued if it exists."""
        run_id = _continue_or_create(
            self.client, self.experiment_id, self.run_dir, name, run_name=name,
            tags={"mlflow.parentRunId": self.parent.run_id, "mmcot.step": name},
        )  # fmt: skip
        with _status(self.client, run_id):
            yield ChildRun(self.client, run_id, self.settings.tracking.send_every_s)


@contextlib.contextmanager
def open_tracker(settings: Settings, run_dir: RunDir) -> Iterator[Tracker]:
    """Open (or continue) the parent run of a run's folder."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    uri = tracking_uri(settings)
    _create_store(uri)
    client = MlflowClient(tracking_uri=uri)
    experiment_id = _experiment(client, settings, uri)
    run_id = _continue_or_create(
        client, experiment_id, run_dir, "pipeline", run_name=settings.run.name, tags={"mmcot.run_dir": str(run_dir.path)}
    )
    _keep(run_dir, parent_finished=False)
    with _status(client, run_id):
        parent = ChildRun(client, run_id, settings.tracking.send_every_s)
        flat = {name: _get(settings, name) for name in setting_names()}
        parent.log_params(flat)
        parent.log_artifact(run_dir.path / "run.yaml")
        yield Tracker(client, experiment_id, parent, run_dir, settings)
    _keep(run_dir, parent_finished=True)


def is_parent_finished(run_dir: RunDir) -> bool:
    """Whether the last attempt that opened the parent run lived to mark it FINISHED."""
    return _kept(run_dir).get("parent_finished", True)


def _create_store(uri: str) -> None:
    """Make an SQLite store whole or not at all: one whose migrations were killed half-way never opens again."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with exclusive(path.parent):
        if path.exists():  # another run made it meanwhile
            return
        clear_unfinished(path.parent, f"{path.name}*")  # with its journal
        with committing(path) as temporary:
            SqlAlchemyStore(f"sqlite:///{temporary}", (path.parent / "mlartifacts").absolute().as_uri()).engine.dispose()


def _experiment(client: Any, settings: Settings, uri: str) -> str:
    name = settings.tracking.experiment
    standing = client.get_experiment_by_name(name)
    if standing is not None:
        return standing.experiment_id
    artifacts = None
    if uri.startswith("sqlite:"):
        artifacts = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").absolute().as_uri()
    return client.create_experiment(name, artifact_location=artifacts)


def _continue_or_create(
    client: Any, experiment_id: str, run_dir: RunDir, name: str, *, run_name: str, tags: dict[str, str]
) -> str:
    """The run id kept for ``name``, or not kept in time; a new one where there is none (or MLflow lost it)."""
    kept = _kept(run_dir)
    if name in kept:
        with contextlib.suppress(Exception):
            return client.get_run(kept[name]).info.run_id
    if "key" not in kept:
        _keep(run_dir, key=uuid.uuid4().hex)
    tags = {**tags, "mmcot.key": f"{_kept(run_dir)['key']}-{name}"}
    created = client.search_runs([experiment_id], f"tags.`mmcot.key` = '{tags['mmcot.key']}'", max_results=1)
    run = created[0] if created else client.create_run(experiment_id, run_name=run_name, tags=tags, start_time=int(time.time() * 1000))
    _keep(run_dir, **{name: run.info.run_id})
    return run.info.run_id


def _kept(run_dir: RunDir) -> dict[str, Any]:
    path = run_dir.path / "mlflow.json"
    return read_json(path) if path.exists() else {}


def _keep(run_dir: RunDir, **values: Any) -> None:
    commit_json(run_dir.path / "mlflow.json", {**_kept(run_dir), **values})


@contextlib.contextmanager
def _status(client: Any, run_id: str) -> Iterator[None]:
    client.update_run(run_id, status="RUNNING")
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # the error that ended the step is the one to show
            client.set_terminated(run_id, status="FAILED" if isinstance(error, Exception) and not isinstance(error, Stopped) else "KILLED")
        raise
    client.set_terminated(run_id, status="FINISHED")


def _get(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value
