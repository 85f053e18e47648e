"""Applying a run's tracking file to MLflow, each line once.

    sync = MlflowSync(run_dir, uri="http://...", experiment="mmcot")
    sync.send()                             # applies all new lines and points, or raises

Each line of ``logs/tracking.jsonl`` may be applied twice without harm: runs are found again by
their key, parameters and scores by their name, and of points the first value of a (key, step)
is kept, so steps of a history only increase. The progress is stored in ``mlflow.json``, for one
MLflow at a time:

    {"uri": "http://...", "identity": "5f0c...", "experiment_id": "1", "runs": {"pipeline": "8f3c..."}, "applied": 41,
     "read": {"rationale-metrics.jsonl": 120311, "pipeline/rationale-metrics.jsonl": 120311}, "refused": []}
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from data_shards.atomic_files import commit_json, exclusive
from data_shards.credentials import hide_credentials
from launcher.config.chains import CHAINS
from launcher.config.sqlite_uris import SQLITE, sqlite_path
from launcher.runs.journal import JournalReader
from launcher.runs.places import file_of_run, uri_around
from launcher.runs.records import read_mlflow_state, shape_of_tracking_line
from launcher.runs.run_dir import PARENT, RunDir
from launcher.tracking.logged_models import find_logged_model, log_trained_model
from launcher.tracking.mlflow_store import create_store, find_experiment, follow_artifacts, remove_escaped_folder
from launcher.tracking.registry import register_model
from launcher.tracking.troubles import check_database, trouble_of
from mmcot.errors import InputError

_LOG = logging.getLogger("mmcot.tracking")
_MAX_METRICS_PER_CALL = 900  # MLflow takes at most 1,000
_MAX_PARAMS_PER_CALL = 100
_MAX_FAILURES = 3

Point = tuple[str, int, float, int]  # key, step, value, time in ms


class MlflowSync:
    """Applies a run's lines and points to one MLflow, each once."""

    def __init__(self, run_dir: RunDir, *, uri: str, experiment: str) -> None:
        self._run_dir, self._uri, self._experiment = run_dir, uri, experiment
        self._client: Any = None
        self._experiment_id = ""
        self._restart(self._read_state())

    def send(self) -> None:
        """Apply all new lines and points.

        Raises:
            Trouble: MLflow does not take it until a person does what the message says.
            Exception: any other exception of MLflow; the next call tries again what was not applied.
        """
        try:
            self._send()
        except Exception as error:
            if trouble := trouble_of(error, self._uri):
                raise trouble from error
            raise

    def _send(self) -> None:
        with exclusive(self._run_dir.logs / ".mlflow"):  # one sender per run: two would both create it
            if (stored := self._read_state()) != self._state:
                self._restart(stored)
            self._connect()
            self._state["experiment_id"] = self._experiment_id  # the URL of a run's page contains it
            self._send_new()

    def _send_new(self) -> None:
        try:
            for line in self._new_lines():
                self._apply_or_refuse(line)
                self._waiting_lines.pop(0)
                self._state["applied"] += 1
                self._num_failures = 0
            for run in {run for run, _ in self._followed}:
                self._send_points(run)
        except Exception:
            self._client = None  # the next call looks for the run again: the server may have lost it
            raise
        finally:
            commit_json(self._run_dir.mlflow_state, self._state)

    def move_to(self, experiment: str) -> None:
        """From now on send to this experiment, everything again."""
        if experiment != self._state.get("experiment", self._experiment):
            self._restart(self._fresh_state() | {"experiment": experiment})
            commit_json(self._run_dir.mlflow_state, self._state)

    def num_waiting(self) -> int:
        """The number of lines and points that are not sent."""
        with contextlib.suppress(OSError):
            self._new_lines()
            for run in {run for run, _ in self._followed}:
                self._read_points(run)
        return len(self._waiting_lines) + sum(map(len, self._waiting_points.values()))

    @property
    def refused(self) -> list[dict[str, Any]]:
        """Lines that MLflow refused every time, with the errors."""
        return self._state["refused"]

    def _new_lines(self) -> list[dict[str, Any]]:
        """Lines not applied yet; of lines applied by an earlier process only "follow" is read again."""
        for line in self._lines.read():
            if self._num_read < self._state["applied"]:
                if line["do"] == "follow":
                    self._follow(line)
            else:
                self._waiting_lines.append(line)
            self._num_read += 1
        return list(self._waiting_lines)

    def _connect(self) -> None:
        if self._client is not None:
            return
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the next call retries
        for name in ("alembic", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs the traceback of what it raises
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        with self._alone():
            check_database(self._uri)
            client = MlflowClient(tracking_uri=self._uri)
            experiment_id = find_experiment(client, self._state.get("experiment") or self._experiment, self._uri)
            if PARENT in self._state["runs"]:
                try:
                    is_lost = client.get_run(self._state["runs"][PARENT]).info.lifecycle_stage == "deleted"
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    is_lost = True
                if is_lost:
                    _LOG.warning("%s no longer has this run; sending everything again", hide_credentials(self._uri))
                    moved = self._state.get("experiment")
                    self._restart(self._fresh_state() | ({"experiment": moved} if moved else {}))
        self._client, self._experiment_id = client, experiment_id

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time create an SQLite database: two would run its migration at once."""
        if self._uri.startswith(SQLITE):
            # A starting server (launcher/tracking/server.py) takes the lock `.mlflow` of the folder too.
            with exclusive(sqlite_path(self._uri).parent / ".mlflow"):
                create_store(self._uri)
                follow_artifacts(self._uri)
                yield
                remove_escaped_folder(self._uri)
        else:
            yield

    def _read_state(self) -> dict[str, Any]:
        state = read_mlflow_state(self._run_dir.mlflow_state)
        if PARENT in state:  # of an earlier version, which stored only ids
            steps = CHAINS["two-stage"].steps
            return self._fresh_state() | {
                "runs": {name: run_id for name, run_id in state.items() if name in (PARENT, *steps)}
            }
        uri = uri_around(self._run_dir.path, state.get("uri", ""))
        is_known = uri == self._uri and state.get("identity") == self._run_dir.identity()
        if not is_known:
            return self._fresh_state()
        return read_mlflow_state(self._run_dir.mlflow_state, needs=("runs", "applied", "read", "refused")) | {
            "uri": uri
        }

    def _fresh_state(self) -> dict[str, Any]:
        return {
            "uri": self._uri,
            "identity": self._run_dir.identity(),
            "runs": {},
            "applied": 0,
            "read": {},
            "refused": [],
        }

    def _restart(self, state: dict[str, Any]) -> None:
        """Start from a state, at first or when another process has stored a newer one."""
        self._state = state
        self._lines: JournalReader = JournalReader(self._run_dir.tracking, shape=shape_of_tracking_line)
        self._waiting_lines: list[dict[str, Any]] = []
        self._num_read = self._num_failures = 0
        # (run, pattern): names of its metrics, or None for all.
        self._followed: dict[tuple[str, str], dict[str, str] | None] = {}
        self._readers: dict[str, dict[str, JournalReader]] = {}  # run: key in "read": reader
        self._waiting_points: dict[str, list[Point]] = {}
        self._sent_points: dict[str, set[tuple[str, int]]] = {}

    def _apply_or_refuse(self, line: dict[str, Any]) -> None:
        """Apply a line; one that a reachable MLflow refuses every time must not block the others."""
        try:
            self._apply(line)
        except Exception as error:
            if trouble_of(error, self._uri):
                raise
            self._client.get_experiment(self._experiment_id)  # raises if MLflow is not reachable: then the line waits
            self._num_failures += 1
            if self._num_failures < _MAX_FAILURES or line["do"] == "start":
                raise
            message = hide_credentials(str(error))[:500]
            _LOG.warning("MLflow refuses a line of %s (%s): %s", self._run_dir.tracking, line["do"], message)
            self._state["refused"].append({"run": line["run"], "do": line["do"], "error": message})

    def _apply(self, line: dict[str, Any]) -> None:
        run, do = line["run"], line["do"]
        if do not in ("start", "follow") and run not in self._state["runs"]:
            raise InputError(
                f"its line {do!r} is of the run {run!r}, which no line before it starts; restore the file, or delete "
                "such lines"
            ).at(self._run_dir.tracking)
        if do == "start":
            self._start(line)
        elif do == "follow":
            self._follow(line)
        elif do == "end":
            self._send_points(run)
            self._client.set_terminated(self._state["runs"][run], status=line["status"], end_time=line["time_ms"])
        else:
            getattr(self, f"_send_{do}")(self._state["runs"][run], line)

    def _start(self, line: dict[str, Any]) -> None:
        run, runs = line["run"], self._state["runs"]
        if run not in runs:
            key = f"{self._run_dir.identity()}/{run}"
            if found := self._find(key):  # created by a process that ended before it could store the id
                runs[run] = found
            else:
                tags = {"mmcot.key": key, **line["tags"]}
                if run != PARENT:
                    tags["mlflow.parentRunId"] = runs[PARENT]
                elif line.get("parent_key"):
                    tags["mlflow.parentRunId"] = parent = self._find(line["parent_key"])
                    if parent is None:
                        # The sync of the parent's own folder creates it.
                        raise LookupError(f"MLflow has no run of key {line['parent_key']} yet")
                made = self._client.create_run(
                    self._experiment_id, run_name=line["name"], tags=tags, start_time=line["time_ms"]
                )
                runs[run] = made.info.run_id
            commit_json(self._run_dir.mlflow_state, self._state)
        self._client.update_run(runs[run], status="RUNNING")

    def _find(self, key: str) -> str | None:
        found = self._client.search_runs([self._experiment_id], f"tags.`mmcot.key` = '{key}'", max_results=1)
        return found[0].info.run_id if found else None

    def _send_params(self, run_id: str, line: dict[str, Any]) -> None:
        from mlflow.entities import Param

        existing = self._client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in line["values"].items() if key not in existing]
        for start in range(0, len(new), _MAX_PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=new[start : start + _MAX_PARAMS_PER_CALL])

    def _send_tags(self, run_id: str, line: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in line["values"].items()])

    def _send_scores(self, run_id: str, line: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        existing = self._client.get_run(run_id).data.metrics
        trained = self._state["runs"].get(line.get("trained_by"))
        model = find_logged_model(self._client, self._experiment_id, trained) if trained else None
        new = [
            Metric(key, value, line["time_ms"], 0, model_id=model.model_id if model else None)
            for key, value in line["values"].items()
            if key not in existing
        ]
        if new:
            self._client.log_batch(run_id, metrics=new)

    def _send_artifact(self, run_id: str, line: dict[str, Any]) -> None:
        path = file_of_run(self._run_dir.path, line["path"])
        if path.exists():
            self._client.log_artifact(run_id, str(path), line["folder"])
        else:
            _LOG.warning("%s does not exist and was not copied to MLflow", path)

    def _send_dataset(self, run_id: str, line: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        existing = {(i.dataset.name, i.dataset.digest) for i in self._client.get_run(run_id).inputs.dataset_inputs}
        if (line["name"], line["digest"]) not in existing:
            dataset = Dataset(
                name=line["name"],
                digest=line["digest"],
                source_type="mmcot shards",
                source=json.dumps({"uri": line["source"]}),
                profile=json.dumps(line["profile"]),
            )
            self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", line["context"])])])

    def _send_trained(self, run_id: str, line: dict[str, Any]) -> None:
        parent = self._state["runs"][PARENT]
        log_trained_model(self._client, self._experiment_id, run_id, line, parent_run_id=parent)

    def _send_model(self, run_id: str, line: dict[str, Any]) -> None:
        trained = self._state["runs"].get(f"train-{line['name']}")
        model = find_logged_model(self._client, self._experiment_id, trained) if trained else None
        model_id = model.model_id if model else None
        register_model(self._client, run_id, self._run_dir, line, model_id=model_id, log=_LOG.warning)

    def _follow(self, line: dict[str, Any]) -> None:
        self._followed[line["run"], line["pattern"]] = line.get("names")

    def _read_points(self, run: str) -> list[Point]:
        waiting, readers = self._waiting_points.setdefault(run, []), self._readers.setdefault(run, {})
        for pattern, names in [(pattern, names) for (owner, pattern), names in self._followed.items() if owner == run]:
            for path in sorted(self._run_dir.logs.glob(pattern)):
                place = f"{run}/{path.name}" if names else path.name  # a file of two runs is read twice
                reader = readers.setdefault(place, JournalReader(path, self._state["read"].get(place, 0)))
                for point in reader.read():
                    for key, value in point["metrics"].items():
                        if names is None or key in names:
                            waiting.append((names[key] if names else key, point["step"], value, point["time_ms"]))
        return waiting

    def _send_points(self, run: str) -> None:
        from mlflow.entities import Metric

        waiting = self._read_points(run)
        if not waiting:
            return
        run_id = self._state["runs"][run]
        if run not in self._sent_points:
            keys = self._client.get_run(run_id).data.metrics
            self._sent_points[run] = {
                (key, m.step) for key in keys for m in self._client.get_metric_history(run_id, key)
            }
        sent = self._sent_points[run]
        while waiting:
            batch: dict[tuple[str, int], Metric] = {}
            taken = 0
            for key, step, value, time_ms in waiting:
                taken += 1
                if (key, step) not in sent:
                    batch.setdefault((key, step), Metric(key, value, time_ms, step))
                if len(batch) == _MAX_METRICS_PER_CALL:
                    break
            if batch:
                self._client.log_batch(run_id, metrics=list(batch.values()))
            sent.update(batch)
            del waiting[:taken]
        self._state["read"] |= {place: reader.offset for place, reader in self._readers[run].items()}
