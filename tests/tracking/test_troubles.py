"""What MLflow cannot take until a person helps: the remedy, said once, while the run goes on."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import sqlite3
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from data_shards.atomic_files import commit_bytes, read_json
from launcher.cli.main import app
from launcher.config.loading import dump_settings, load_settings, tracking_uri
from launcher.config.sqlite_uris import sqlite_path
from launcher.runs.run_dir import RunDir
from launcher.runs.status import describe_end
from launcher.tracking.mlflow_store import create_store
from launcher.tracking.run_log import open_tracker
from launcher.tracking.sending import sync_run


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    create_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def place(tmp_path, monkeypatch, empty_store):
    return make(tmp_path, monkeypatch, empty_store)


def make(folder, monkeypatch, empty_store, *overrides):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (folder / "runs").mkdir(parents=True)
    shutil.copy(empty_store, folder / "runs" / "mlflow.db")
    changes = [f"run.dir={folder / 'runs' / 'a'}", "tracking.send_every_s=0.05", *overrides]
    settings = load_settings(preset="demo", overrides=changes)
    run_dir = RunDir(settings.run_dir)
    commit_bytes(run_dir.path / "run.yaml", dump_settings(settings).encode())
    return settings, run_dir


def client_of(settings):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(settings))


def run_and_sync(settings, run_dir, caplog):
    """Run a step; returns the last line of the run, the warnings meanwhile, and what `mmcot sync` says."""
    said, done = [], []
    with (
        caplog.at_level(logging.WARNING),
        open_tracker(settings, run_dir, report=said.append) as tracker,
        tracker.step("data"),
    ):
        threading.Event().wait(1.5)  # many looks
        done.append("data")
    assert done == ["data"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    synced = CliRunner().invoke(app, ["sync", str(run_dir.path)])
    assert synced.exit_code == 1
    return said[-1], warnings, " ".join(synced.output.split())


def check_said_once(sentence, said, warnings, synced):
    assert sentence in said and "values wait: `mmcot sync" in said
    assert [sentence in warning for warning in warnings] == [True], warnings
    assert sentence in synced and "start the server" not in synced


def test_a_deleted_experiment_is_named_with_how_to_restore_it_or_to_use_another(place, caplog):
    settings, run_dir = place
    client = client_of(settings)
    client.delete_experiment(client.create_experiment("mmcot"))
    found = run_and_sync(settings, run_dir, caplog)
    check_said_once("the experiment 'mmcot' of MLflow", *found)
    restore = f"`MLFLOW_TRACKING_URI={tracking_uri(settings)} mlflow experiments restore --experiment-id 1`"
    assert restore in found[0] and "tracking.experiment" in found[0]
    assert "values sent" in CliRunner().invoke(app, ["sync", str(run_dir.path), "--experiment", "other"]).output
    with open_tracker(settings, run_dir) as tracker, tracker.step("train-rationale"):
        pass
    other = client.get_experiment_by_name("other").experiment_id
    assert len(client.search_runs([other])) == len(read_json(run_dir.mlflow_state)["runs"]) == 3
    client.restore_experiment("1")
    assert client.search_runs(["1"]) == []


def test_a_database_of_an_older_version_says_how_to_upgrade_it(place, caplog):
    settings, run_dir = place
    set_schema(run_dir, "451aebb31d03")
    found = run_and_sync(settings, run_dir, caplog)
    check_said_once(f"then run `mlflow db upgrade {tracking_uri(settings)}`", *found)


def test_a_database_of_an_unknown_version_is_not_upgraded(place):
    settings, run_dir = place
    set_schema(run_dir, "aaaaaaaaaaaa")
    with open_tracker(settings, run_dir):
        pass
    with pytest.raises(RuntimeError, match="was written by another version of MLflow") as raised:
        sync_run(run_dir, settings)
    assert "upgrade" not in str(raised.value)


def set_schema(run_dir, version):
    with contextlib.closing(sqlite3.connect(run_dir.path.parent / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))


@pytest.mark.parametrize("uri", ["htp://localhost:5000", "localhost:5000", "sqlite:/mlflow.db", "mlruns", "foo://a/b"])
def test_an_address_that_mlflow_does_not_know_is_named_with_those_it_takes(
    tmp_path, monkeypatch, empty_store, caplog, uri
):
    settings, run_dir = make(tmp_path, monkeypatch, empty_store, f"tracking.uri={uri}")
    check_said_once(f"MLflow takes no address like {uri}; set tracking.uri", *run_and_sync(settings, run_dir, caplog))


def test_a_locked_database_is_named_and_takes_everything_when_it_is_free(place, caplog, monkeypatch):
    monkeypatch.setattr("launcher.tracking.troubles.LOCK_WAIT_S", 0.05)
    settings, run_dir = place
    file = run_dir.path.parent / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        found = run_and_sync(settings, run_dir, caplog)
        other.execute("ROLLBACK")
    check_said_once(f"another process holds MLflow's database {file} locked; `fuser {file}`", *found)
    assert sync_run(run_dir, settings) > 0
    runs = read_json(run_dir.mlflow_state)["runs"]
    assert {client_of(settings).get_run(run_id).info.status for run_id in runs.values()} == {"FINISHED"}


def test_lines_wait_for_a_full_disk_instead_of_being_given_up(place, monkeypatch):
    from launcher.tracking.mlflow_sync import MlflowSync

    settings, run_dir = place

    def full(self, run_id, line):
        raise RuntimeError("(sqlite3.OperationalError) database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowSync, "_send_scores", full)
        said = []
        with open_tracker(settings, run_dir, report=said.append) as tracker, tracker.step("data") as child:
            child.log_scores({"num_train": 8.0})
    assert f"the disk of MLflow's database {run_dir.path.parent / 'mlflow.db'} is full" in said[-1]
    assert read_json(run_dir.mlflow_state)["refused"] == []
    sync_run(run_dir, settings)
    assert client_of(settings).get_run(read_json(run_dir.mlflow_state)["runs"]["data"]).data.metrics == {
        "num_train": 8.0
    }


@pytest.mark.parametrize("name", ["100%", "a%20b", "what?", "a?b=c", "no#1", "two words"])
def test_any_folder_may_hold_the_run_and_its_database(tmp_path, monkeypatch, empty_store, name):
    settings, run_dir = make(tmp_path / name, monkeypatch, empty_store)
    said = []
    with open_tracker(settings, run_dir, report=said.append) as tracker, tracker.step("data") as child:
        child.log_scores({"num_train": 8.0})
        child.log_artifact(run_dir.path / "run.yaml", "settings")
    assert said == [] and sqlite_path(tracking_uri(settings)) == tmp_path / name / "runs" / "mlflow.db"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]  # nothing was written to another place
    client, runs = client_of(settings), read_json(run_dir.mlflow_state)["runs"]
    run = client.get_run(runs["data"])
    assert run.data.metrics == {"num_train": 8.0}
    assert [file.path for file in client.list_artifacts(runs["data"], "settings")] == ["settings/run.yaml"]
    assert unquote(urlsplit(run.info.artifact_uri).path).startswith(str(tmp_path / name))
    copied = client.download_artifacts(runs["data"], "settings/run.yaml", str(tmp_path))
    assert Path(copied).read_text() == (run_dir.path / "run.yaml").read_text()
    served = f"MLflow: mmcot mlflow up --runs {shlex.quote(str(tmp_path / name / 'runs'))}"
    assert served in " ".join(describe_end(settings, run_dir))
