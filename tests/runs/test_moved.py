"""A run's folder that was moved, alone or with what is around it, and a copy of one."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

from data_shards.atomic_files import commit_bytes, commit_json, read_json
from data_shards.sealed_json import commit_sealed
from launcher.config.loading import dump_settings, load_settings, tracking_uri
from launcher.config.settings import SettingsError
from launcher.runs.adoption import continue_here, copied_from
from launcher.runs.places import (
    earlier_places,
    file_of_run,
    mark_file,
    place_around,
    read_mark,
    renew_mark,
    stored_path,
    uri_around,
)
from launcher.runs.run_dir import RunDir, RunError, shards_dir_of
from launcher.runs.run_settings import of_moved_folder, settings_of, write_or_verify_settings
from launcher.runs.status import describe_run, mlflow_lines
from launcher.tracking.mlflow_store import follow_artifacts
from launcher.tracking.run_log import open_tracker
from launcher.tracking.sending import sync_run


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A working directory with a started run and its data; ``old`` is its place before a move."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old = tmp_path / "old"
    run_dir = RunDir(old / "runs" / "demo")
    run_dir.path.mkdir(parents=True)
    (old / "data" / "quiz").mkdir(parents=True)
    run_dir.identity()
    run_dir.mark_done("data", {"seconds": 1, "attempt": 1, "outputs": {"shards_dir": str(old / "data" / "quiz")}})
    renew_mark(run_dir.path)
    return old


def settings_in(folder, *overrides):
    return load_settings(preset="demo", overrides=[f"run.dir={folder}", "tracking.send_every_s=0.1", *overrides])


def log_run(folder, *overrides):
    """Log a run with an artifact and end it; returns its settings."""
    settings, run_dir = settings_in(folder, *overrides), RunDir(folder)
    commit_bytes(folder / "run.yaml", dump_settings(settings).encode())
    with open_tracker(settings, run_dir, report=lambda line: None) as tracker, tracker.step("data") as child:
        commit_json(folder / "scores.json", {"a": 1})
        child.log_artifact(folder / "scores.json", "scores")
    return settings


def as_earlier_version(run_dir):
    """Write absolute paths into the tracking file, and no mark, as version 0.1.0 did."""
    lines = [json.loads(line) for line in run_dir.tracking.read_text().splitlines()]
    for line in lines:
        if line["do"] == "artifact":
            line["path"] = str(run_dir.path / line["path"])
    run_dir.tracking.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mark_file(run_dir.path).unlink(missing_ok=True)


def artifacts(client, run_id, folder=None):
    found = client.list_artifacts(run_id, folder)
    return sorted(
        path for file in found for path in (artifacts(client, run_id, file.path) if file.is_dir else [file.path])
    )


def sync(folder):
    """`mmcot sync` in a process of its own: MLflow keeps the places of artifacts in memory."""
    command = [sys.executable, "-m", "launcher", "sync", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# Paths


def test_a_file_of_the_run_is_stored_by_its_path_in_the_folder(tree):
    folder = tree / "runs" / "demo"
    assert stored_path(folder, folder / "logs" / "a") == "logs/a"
    assert file_of_run(folder, "logs/a") == folder / "logs" / "a"
    assert stored_path(folder, tree / "data") == str(tree / "data") == str(file_of_run(folder, str(tree / "data")))


def test_an_absolute_path_of_an_earlier_version_is_read_as_one_of_the_moved_folder(tree, tmp_path):
    log_run(tree / "runs" / "demo")
    as_earlier_version(RunDir(tree / "runs" / "demo"))
    tree.rename(tmp_path / "new")
    folder = tmp_path / "new" / "runs" / "demo"
    assert earlier_places(folder) == [tree / "runs" / "demo"]
    assert file_of_run(folder, str(tree / "runs" / "demo" / "scores.json")) == folder / "scores.json"
    assert shards_dir_of(RunDir(folder)) == str(tmp_path / "new" / "data" / "quiz")


def test_data_are_found_next_to_the_moved_tree_and_at_their_place_if_the_run_alone_was_moved(tree, tmp_path):
    (tree / "archive" / "2026").mkdir(parents=True)
    (tree / "runs" / "demo").rename(tree / "archive" / "2026" / "demo")
    assert shards_dir_of(RunDir(tree / "archive" / "2026" / "demo")) == str(tree / "data" / "quiz")
    (tree / "archive" / "2026" / "demo").rename(tree / "runs" / "other")
    tree.rename(tmp_path / "new")
    assert shards_dir_of(RunDir(tmp_path / "new" / "runs" / "other")) == str(tmp_path / "new" / "data" / "quiz")


def test_data_that_are_nowhere_are_a_sentence_with_the_folder_and_the_setting(tree, tmp_path):
    shutil.move(tree / "runs" / "demo", tmp_path / "demo")
    shutil.rmtree(tree)
    with pytest.raises(RunError, match=r"data/quiz, the data folder of .*demo, does not exist.*data\.shards_dir="):
        shards_dir_of(RunDir(tmp_path / "demo"))


def test_nothing_is_made_again_at_a_place_that_was_left_also_after_a_second_move(tree, tmp_path):
    tree.rename(tmp_path / "new")
    folder = tmp_path / "new" / "runs" / "demo"
    renew_mark(folder)
    folder = folder.rename(folder.with_name("other"))
    assert uri_around(folder, f"sqlite:///{tree}/mlflow.db") == f"sqlite:///{tmp_path}/new/mlflow.db"


def test_a_url_and_a_relative_path_stay_as_they_are(tree, tmp_path):
    tree.rename(tmp_path / "new")
    folder = tmp_path / "new" / "runs" / "demo"
    for path in ("s3://bucket/data", "data/quiz"):
        assert place_around(folder, path) == path
    assert uri_around(folder, "http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    assert uri_around(folder, f"sqlite:///{tree}/runs/mlflow.db") == f"sqlite:///{tmp_path}/new/runs/mlflow.db"


def test_a_mark_keeps_all_earlier_places(tree, tmp_path):
    folder = tree / "runs" / "demo"
    for name in ("b", "c"):
        folder = folder.rename(tmp_path / name)
        renew_mark(folder)
    assert earlier_places(tmp_path / "c") == [tmp_path / "b", tree / "runs" / "demo"]
    assert read_mark(folder)["path"] == str(tmp_path / "c")


# Settings


def test_the_settings_of_a_moved_run_name_present_places(tree, tmp_path):
    folder = tree / "runs" / "demo"
    places = [f"data.shards_dir={tree}/data/quiz", f"tracking.uri=sqlite:///{tree}/runs/mlflow.db"]
    write_or_verify_settings(RunDir(folder), settings_in(folder, *places))
    tree.rename(tmp_path / "new")
    settings = settings_of(RunDir(tmp_path / "new" / "runs" / "demo"))
    assert settings.data.shards_dir == str(tmp_path / "new" / "data" / "quiz")
    assert settings.tracking.uri == f"sqlite:///{tmp_path}/new/runs/mlflow.db"


def test_the_place_of_data_may_change_once_their_fingerprints_are_known(tree):
    run_dir = RunDir(tree / "runs" / "demo")
    write_or_verify_settings(run_dir, settings_in(run_dir.path, "data.shards_dir=a"))
    write_or_verify_settings(run_dir, settings_in(run_dir.path, "data.shards_dir=b"))
    run_dir.marker_path("data").unlink()
    with pytest.raises(SettingsError, match=r"data\.shards_dir was 'a' and is now 'b'"):
        write_or_verify_settings(run_dir, settings_in(run_dir.path, "data.shards_dir=b"))


def test_run_yaml_of_a_moved_folder_continues_there_unless_a_folder_is_given(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree)
    folder = tree / "runs" / "demo"
    write_or_verify_settings(RunDir(folder), settings := load_settings(preset="demo"))
    commit_json(folder / "lock.json", {})
    assert of_moved_folder(settings, folder / "run.yaml", []).run_dir == settings.run_dir
    folder.rename(tree / "kept")
    assert of_moved_folder(settings, tree / "kept" / "run.yaml", []).run_dir == tree / "kept"
    assert of_moved_folder(settings, tree / "kept" / "run.yaml", ["run.name=b"]).run_dir == settings.run_dir
    assert of_moved_folder(settings, tree / "other.yaml", []).run_dir == settings.run_dir


# MLflow


@pytest.mark.processes
@pytest.mark.parametrize("is_earlier", [False, True], ids=["now", "0.1.0"])
def test_sync_of_a_moved_tree_sends_to_its_own_store_and_writes_nothing_at_the_old_place(tree, tmp_path, is_earlier):
    from mlflow import MlflowClient

    settings = log_run(tree / "runs" / "demo")
    run_dir = RunDir(tree / "runs" / "demo")
    if is_earlier:
        as_earlier_version(run_dir)
    state = read_json(run_dir.mlflow_state)
    commit_json(run_dir.mlflow_state, state | {"applied": 0})  # so that every line is sent again
    tree.rename(tmp_path / "new")
    folder = tmp_path / "new" / "runs" / "demo"
    (tmp_path / "new" / "runs" / "mlartifacts").rename(tmp_path / "gone")
    output = sync(folder)
    assert f"{tmp_path}/new/runs/mlflow.db" in output, output
    assert not tree.exists() and read_json(folder / "mlflow.json")["runs"] == state["runs"]
    client = MlflowClient(f"sqlite:///{tmp_path}/new/runs/mlflow.db")
    assert artifacts(client, state["runs"]["data"]) == ["scores/scores.json"]
    assert artifacts(client, state["runs"]["pipeline"]) == ["run.yaml"]
    assert (tmp_path / "new" / "runs" / "mlartifacts").is_dir()
    assert tracking_uri(settings_of(RunDir(folder))) != tracking_uri(settings)
    assert f"--runs {tmp_path}/new/runs" in mlflow_lines(settings_of(RunDir(folder)), RunDir(folder))[0]


@pytest.mark.processes
def test_a_copied_tree_writes_nothing_into_the_original(tree, tmp_path):
    log_run(tree / "runs" / "demo")
    before = files_of(tree)
    shutil.copytree(tree, tmp_path / "copy")
    run_dir = RunDir(tmp_path / "copy" / "runs" / "demo")
    run_dir.mlflow_state.unlink()
    sync(run_dir.path)
    assert files_of(tree) == before
    with sqlite3.connect(tmp_path / "copy" / "runs" / "mlflow.db") as store:
        addresses = [uri for (uri,) in store.execute("SELECT artifact_uri FROM runs")]
    assert addresses and all(uri.startswith(f"file://{tmp_path}/copy/runs/mlartifacts/") for uri in addresses)


def test_a_run_that_alone_was_moved_is_sent_whole_to_the_store_beside_it(tree, tmp_path):
    from mlflow import MlflowClient

    log_run(tree / "runs" / "demo")
    (tree / "archive").mkdir()
    folder = (tree / "runs" / "demo").rename(tree / "archive" / "demo")
    settings = settings_in(folder)
    sync_run(RunDir(folder), settings)
    runs, client = read_json(folder / "mlflow.json")["runs"], MlflowClient(tracking_uri(settings))
    assert artifacts(client, runs["data"]) == ["scores/scores.json"]
    assert not (tree / "runs" / "demo").exists() and (tree / "archive" / "mlflow.db").exists()


def test_a_database_that_alone_was_moved_keeps_its_artifacts_where_they_are(tree, tmp_path):
    log_run(tree / "runs" / "demo")
    moved = tmp_path / "moved.db"
    (tree / "runs" / "mlflow.db").rename(moved)
    follow_artifacts(f"sqlite:///{moved}")
    with sqlite3.connect(moved) as store:
        assert {uri.startswith(f"file://{tree}/") for (uri,) in store.execute("SELECT artifact_uri FROM runs")} == {
            True
        }


# Identity


@pytest.fixture
def said():
    return []


def test_a_run_in_its_own_folder_continues_without_a_word(tree, said):
    run_dir = RunDir(tree / "runs" / "demo")
    continue_here(run_dir, report=said.append)
    continue_here(run_dir, adopt=True, report=said.append)
    assert said == [f"{run_dir.path} is no copy, --adopt changes nothing"]


def test_a_moved_run_continues_with_its_id_and_says_so_once(tree, tmp_path, said):
    known = RunDir(tree / "runs" / "demo").identity()
    tree.rename(tmp_path / "new")
    run_dir = RunDir(tmp_path / "new" / "runs" / "demo")
    for _ in range(2):
        continue_here(run_dir, report=said.append)
    assert said == [f"{run_dir.path} was moved from {tree}/runs/demo; the run continues here"]
    assert run_dir.identity() == known and read_mark(run_dir.path)["path"] == str(run_dir.path)


@pytest.mark.parametrize("left", ["nothing", "another run", "no run"])
def test_a_folder_that_came_from_another_file_system_was_moved_if_the_run_is_no_longer_there(
    tree, tmp_path, said, left
):
    folder = tree / "runs" / "demo"
    shutil.copytree(folder, tmp_path / "demo")  # as `mv` does between file systems
    shutil.rmtree(folder)
    if left != "nothing":
        folder.mkdir()
    if left == "another run":
        RunDir(folder).identity()
    continue_here(RunDir(tmp_path / "demo"), report=said.append)
    assert len(said) == 1 and "was moved from" in said[0]


def test_a_folder_restored_at_its_place_continues(tree, tmp_path, said):
    folder = tree / "runs" / "demo"
    shutil.copytree(folder, tmp_path / "backup")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "backup", folder)
    continue_here(RunDir(folder), report=said.append)
    assert said == [] and read_mark(folder)["inode"] == folder.stat().st_ino


def test_the_same_folder_under_another_name_is_no_copy(tree, tmp_path, said):
    (tmp_path / "link").symlink_to(tree)
    folder = tmp_path / "link" / "runs" / "demo"
    commit_json(mark_file(folder), read_mark(folder) | {"device": -1})  # as another machine sees it
    assert copied_from(RunDir(folder)) is None


def test_an_old_run_without_a_mark_gets_one(tree, said):
    run_dir = RunDir(tree / "runs" / "demo")
    mark_file(run_dir.path).unlink()
    continue_here(run_dir, report=said.append)
    assert said == [] and read_mark(run_dir.path)["path"] == str(run_dir.path)


def test_a_copy_is_refused_with_the_other_folder_and_the_option(tree, tmp_path, said):
    original, copy = RunDir(tree / "runs" / "demo"), RunDir(tree / "runs" / "copy")
    shutil.copytree(original.path, copy.path)
    with pytest.raises(RunError, match=rf"runs/copy is a copy of {original.path}, .*--adopt"):
        continue_here(copy, report=said.append)
    assert copied_from(copy) == original.path and copied_from(original) is None
    assert copy.identity() == original.identity() and said == []


def test_an_adopted_copy_has_an_id_of_its_own_in_its_checkpoints_too(tree, said):
    original, copy = RunDir(tree / "runs" / "demo"), RunDir(tree / "runs" / "copy")
    for name, run_id in (("step-000002", original.identity()), ("step-000004", "another")):
        commit_json(original.checkpoints("rationale") / name / "manifest.json", {"run_id": run_id, "step": 2})
    commit_bytes(original.checkpoints("answer") / "step-000002" / "manifest.json", b"{")
    commit_json(original.mlflow_state, {"runs": {}})
    shutil.copytree(original.path, copy.path)
    continue_here(copy, adopt=True, report=said.append)
    new = copy.identity()
    assert new != original.identity() and len(said) == 1 and new in said[0]
    ids = [read_json(path)["run_id"] for path in sorted(copy.checkpoints("rationale").glob("*/manifest.json"))]
    assert ids == [new, "another"] and not copy.mlflow_state.exists() and original.mlflow_state.exists()
    continue_here(copy, report=said.append)
    continue_here(original, report=said.append)
    assert len(said) == 1 and copied_from(copy) is None


def test_an_altered_manifest_stays_altered_in_an_adopted_copy(tree, said):
    original, copy = RunDir(tree / "runs" / "demo"), RunDir(tree / "runs" / "copy")
    path = original.checkpoints("rationale") / "step-000002" / "manifest.json"
    commit_sealed(path, {"run_id": original.identity(), "step": 2, "probe_loss": 1.0})
    commit_json(path, altered := read_json(path) | {"probe_loss": 2.0})
    shutil.copytree(original.path, copy.path)
    continue_here(copy, adopt=True, report=said.append)
    assert read_json(copy.checkpoints("rationale") / "step-000002" / "manifest.json") == altered


def test_an_adoption_that_was_killed_is_completed_with_the_same_id(tree, said, monkeypatch):
    original, copy = RunDir(tree / "runs" / "demo"), RunDir(tree / "runs" / "copy")
    manifest = original.checkpoints("rationale") / "step-000002" / "manifest.json"
    commit_json(manifest, {"run_id": original.identity()})
    shutil.copytree(original.path, copy.path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(RunDir, "take_identity", lambda self, run_id: (_ for _ in ()).throw(OSError("killed")))
        continue_here(copy, adopt=True, report=said.append)
    continue_here(copy, adopt=True, report=said.append)
    assert read_json(copy.checkpoints("rationale") / "step-000002" / "manifest.json")["run_id"] == copy.identity()
    assert copy.identity() != original.identity()


def test_trials_of_an_adopted_tuning_are_adopted_with_it(tree, said):
    tuning = RunDir(tree / "runs" / "tuning")
    trial = RunDir(tuning.path / "trials" / "a")
    for run_dir in (tuning, trial):
        run_dir.identity()
        renew_mark(run_dir.path)
    line = json.dumps({"run": "pipeline", "do": "start", "parent_key": f"{tuning.identity()}/pipeline"})
    commit_bytes(trial.tracking, f"{line}\n".encode())
    shutil.copytree(tuning.path, tree / "runs" / "copy")
    copy, own = RunDir(tree / "runs" / "copy"), RunDir(tree / "runs" / "copy" / "trials" / "a")
    continue_here(copy, adopt=True, report=said.append)
    assert len({copy.identity(), own.identity(), tuning.identity(), trial.identity()}) == 4
    assert json.loads(own.tracking.read_text())["parent_key"] == f"{copy.identity()}/pipeline"


def test_a_copy_can_be_read_and_its_status_names_the_original(tree):
    folder = tree / "runs" / "demo"
    write_or_verify_settings(RunDir(folder), settings_in(folder))
    shutil.copytree(folder, tree / "runs" / "copy")
    lines = describe_run(tree / "runs" / "copy")
    assert f"a copy of {folder}; `mmcot run --adopt` makes it a run of its own" in lines
    assert not any("copy of" in line for line in describe_run(folder))
    assert os.listdir(tree / "runs" / "copy" / "logs") == os.listdir(folder / "logs")
