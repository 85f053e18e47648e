"""An object store and an MLflow server in files, whose every change is a commit point (``fault_points.py``)."""

from __future__ import annotations

import json
import os
import shutil
import types
import uuid
from collections import defaultdict
from pathlib import Path

import fault_points
import mlflow

from data_shards import remote_files


class FolderStore:
    """The file system of fsspec, as far as ``remote_files.py`` uses it; an object is there when it is complete."""

    async_impl = False

    def __init__(self, root: Path):
        self.root = root

    def invalidate_cache(self):
        pass

    def cat_file(self, path):
        return self._path(path).read_bytes()

    def open(self, path, mode):
        return open(self._path(path), mode)

    def ls(self, path, *, detail):
        return [str(each) for each in self._path(path).iterdir()]

    def rm(self, path, *, recursive):
        shutil.rmtree(self._path(path))

    def put_file(self, source, target):
        self.pipe_file(target, Path(source).read_bytes())

    def pipe_file(self, target, data):
        path = self.root / target

        def put():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
            draft.write_bytes(data)
            draft.replace(path)

        fault_points.current.at("upload", path, put, file=path)

    def _path(self, path) -> Path:
        if fault_points.current.is_away:
            raise ConnectionError("the store is away")
        return self.root / path


def open_store(root: Path) -> None:
    """Let every ``s3://`` URL of this process be a file below ``root``; failed requests are repeated at once."""
    remote_files.FIRST_WAIT_S = 0.0
    remote_files._open = lambda url: (FolderStore(root), url.removeprefix("s3://"))


class Server:
    """MLflow's client, as far as runs are sent with it: keeps what arrives in a file, as a server would."""

    def __init__(self, path: Path):
        self.path = path

    def _put(self, call: str, run: str, **values):
        def put():
            line = json.dumps({"call": call, "run": run, **values}) + "\n"
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(descriptor, line.encode())
            os.close(descriptor)

        fault_points.current.at("send", call, put)

    def _lines(self) -> list[dict]:
        if fault_points.current.is_away:
            raise ConnectionError("the server is away")
        return list(map(json.loads, self.path.read_text().splitlines())) if self.path.exists() else []

    def get_experiment_by_name(self, name):
        found = [line for line in self._lines() if line["call"] == "create_experiment"]
        return types.SimpleNamespace(experiment_id="1", lifecycle_stage="active") if found else None

    def create_experiment(self, name, artifact_location=None):
        self._put("create_experiment", name)
        return "1"

    def get_experiment(self, experiment_id):
        return self._lines()

    def search_runs(self, experiments, query, max_results):
        found = [line["run"] for line in self._lines() if f"'{line.get('tags', {}).get('mmcot.key')}'" in query]
        return [self.get_run(run) for run in found[:max_results]]

    def create_run(self, experiment_id, *, run_name, tags, start_time):
        run = uuid.uuid4().hex
        self._put("create_run", run, tags=tags, name=run_name)
        return self.get_run(run)

    def update_run(self, run_id, *, status):
        self._put("update_run", run_id, status=status)

    def set_terminated(self, run_id, *, status, end_time):
        self._put("set_terminated", run_id, status=status)

    def log_batch(self, run_id, *, metrics=(), params=(), tags=()):
        self._put(
            "log_batch",
            run_id,
            points=[[each.key, each.step, each.value] for each in metrics],
            params={each.key: each.value for each in params},
            more_tags={each.key: each.value for each in tags},
        )

    def log_artifact(self, run_id, path, folder):
        self._put("log_artifact", run_id, artifact=Path(path).name)

    def log_inputs(self, run_id, inputs):
        self._put("log_inputs", run_id, datasets=[[each.dataset.name, each.dataset.digest] for each in inputs])

    def get_run(self, run_id):
        lines = [line for line in self._lines() if line["run"] == run_id]
        params = {key: value for line in lines for key, value in line.get("params", {}).items()}
        metrics = {point[0]: point[2] for line in lines for point in line.get("points", [])}
        datasets = [
            types.SimpleNamespace(dataset=types.SimpleNamespace(name=name, digest=digest))
            for line in lines
            for name, digest in line.get("datasets", [])
        ]
        return types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=run_id, lifecycle_stage="active"),
            data=types.SimpleNamespace(params=params, metrics=metrics),
            inputs=types.SimpleNamespace(dataset_inputs=datasets),
        )

    def get_metric_history(self, run_id, key):
        points = [point for line in self._lines() if line["run"] == run_id for point in line.get("points", [])]
        return [types.SimpleNamespace(step=point[1]) for point in points if point[0] == key]

    def content(self) -> dict:
        """What the server holds: by the keys of runs, without ids; every point that arrived, in its order."""
        runs: dict = defaultdict(lambda: {"params": {}, "tags": {}, "points": [], "datasets": [], "artifacts": set()})
        keys: dict[str, str] = {}
        for line in self._lines():
            if line["call"] == "create_experiment":
                continue
            if line["call"] == "create_run":
                key = line["tags"]["mmcot.key"].partition("/")[2]
                keys[line["run"]] = key if key not in keys.values() else f"{key} once more"
            run = runs[keys[line["run"]]]
            for name, value in line.get("params", {}).items():
                assert run["params"].setdefault(name, value) == value, f"the parameter {name} has changed"
            run["tags"] |= {name: value for name, value in line.get("tags", {}).items() if "parentRun" not in name}
            run["tags"] |= line.get("more_tags", {})
            run["points"] += line.get("points", [])
            run["datasets"] += line.get("datasets", [])
            run["artifacts"] |= {line["artifact"]} if "artifact" in line else set()
            run["status"] = line.get("status", run.get("status"))
        for run in runs.values():
            run["points"].sort(key=lambda point: point[0])  # stable: the steps of a metric stay as they arrived
            run["artifacts"] = sorted(run["artifacts"])
            run["tags"].pop("mmcot.key", None)
        return dict(runs)


def open_server(path: Path) -> Server:
    """Let MLflow's client be the stand-in."""
    server = Server(path)
    mlflow.MlflowClient = lambda tracking_uri: server
    return server
