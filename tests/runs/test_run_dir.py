"""The run's folder: one owner, growing attempts, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from data_shards.atomic_files import commit_bytes, commit_json, committing, read_json
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.runs import ownership
from launcher.runs.journal import LineFile
from launcher.runs.ownership import owned, owner
from launcher.runs.run_dir import RunDir, RunError
from launcher.runs.run_settings import settings_of, write_or_verify_settings
from launcher.tracking.run_log import RunLog
from launcher.tracking.sending import is_everything_logged


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "run")


def test_every_owner_has_a_greater_attempt(run_dir):
    run_dir.path.mkdir()
    with owned(run_dir) as first:
        pass
    with owned(run_dir) as second:
        assert (first, second) == (1, 2)


def test_a_run_that_is_running_is_refused_with_its_owner(run_dir):
    run_dir.path.mkdir()
    with owned(run_dir), pytest.raises(RunError, match=f"being run by process {os.getpid()}"), owned(run_dir):
        pass


def test_a_lock_of_a_dead_process_is_taken_over_at_once(run_dir):
    run_dir.path.mkdir()
    code = (
        "import os, sys; from pathlib import Path; from launcher.runs.ownership import owned; "
        "from launcher.runs.run_dir import RunDir\n"
        "with owned(RunDir(Path(sys.argv[1]))): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run_dir.path)], check=False)
    assert read_json(run_dir.path / "lock.json")["released"] is False and owner(run_dir) is None
    with owned(run_dir) as attempt:
        assert attempt == 2


def test_a_lock_of_a_dead_process_that_nobody_has_waited_for_is_taken_over_too(run_dir):
    run_dir.path.mkdir()
    code = (
        "import os, sys; from pathlib import Path; from launcher.runs.ownership import owned; "
        "from launcher.runs.run_dir import RunDir\nwith owned(RunDir(Path(sys.argv[1]))): os._exit(9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run_dir.path)])
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with owned(run_dir) as attempt:
        assert attempt == 2
    process.wait()


@pytest.fixture
def elsewhere(run_dir, monkeypatch):
    """A function that writes the lock of an owner on another host, with its clock's lead in seconds."""
    monkeypatch.setattr(ownership, "SILENT_S", 0.6)
    run_dir.path.mkdir()

    def write(lead=0.0, **fields):
        lock = ownership._lock(4, time.time() + lead) | {"host": "far", "heartbeat": time.time() + lead} | fields
        commit_json(run_dir.path / "lock.json", lock)

    return write


@pytest.mark.parametrize("lead", [-86400.0, 0.0, 86400.0])
def test_an_owner_elsewhere_whose_heartbeat_stands_still_is_dead_whatever_its_clock_says(run_dir, elsewhere, lead):
    elsewhere(lead)
    lines = []
    with owned(run_dir, report=lines.append) as attempt:
        assert attempt == 5
    assert "last run by process" in lines[0] and "on far; watching up to" in lines[0]


@pytest.mark.parametrize("lead", [-86400.0, 70.0, 86400.0])
@pytest.mark.parametrize("place", [{}, {"host": socket.gethostname(), "processes": "another namespace"}])
def test_an_owner_elsewhere_whose_heartbeat_changes_is_alive_whatever_its_clock_says(run_dir, elsewhere, lead, place):
    elsewhere(lead, **place)
    beat = threading.Timer(0.2, lambda: elsewhere(lead + 5, **place))
    beat.start()
    message = r"is being run by process .* since 20\d\d-.* by its clock \(attempt 4\)"
    with pytest.raises(RunError, match=message), owned(run_dir):
        pass
    beat.join()


def test_an_owner_that_releases_the_run_while_it_is_watched_is_followed_at_once(run_dir, elsewhere, monkeypatch):
    monkeypatch.setattr(ownership, "SILENT_S", 600.0)
    elsewhere()
    release = threading.Timer(0.2, lambda: elsewhere(released=True))
    release.start()
    with owned(run_dir) as attempt:
        assert attempt == 5
    release.join()


def test_take_over_does_not_watch_and_the_former_owner_may_not_commit(run_dir):
    run_dir.path.mkdir()
    with owned(run_dir) as first, owned(run_dir, take_over=True) as second:
        assert (first, second) == (1, 2)
        with pytest.raises(RunError, match="attempt 1 must not commit"):
            run_dir.check_attempt(first)
    assert read_json(run_dir.path / "lock.json")["released"] is True


def test_an_older_attempt_may_not_commit(run_dir):
    run_dir.path.mkdir()
    with owned(run_dir) as attempt:
        run_dir.check_attempt(attempt)
        with pytest.raises(RunError, match="attempt 0 must not commit"):
            run_dir.check_attempt(attempt - 1)


def test_other_settings_are_refused_and_those_that_may_change_are_not(run_dir):
    write_or_verify_settings(run_dir, load_settings(preset="demo"))
    write_or_verify_settings(
        run_dir, load_settings(preset="demo", overrides=["cluster.address=auto", "generation.hang_timeout_s=60"])
    )
    with pytest.raises(SettingsError, match=r"run.seed was 0 and is now 1.*--set run.dir"):
        write_or_verify_settings(run_dir, load_settings(preset="demo", overrides=["run.seed=1"]))


def start(run_dir, *overrides):
    from launcher.pipeline.pipeline import run_pipeline

    settings = load_settings(preset="demo", overrides=[f"run.dir={run_dir.path}", *overrides])
    return run_pipeline(settings, until="data", report=lambda line: None)


def test_the_corrected_command_continues_after_a_first_one_that_did_no_step(run_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sizes = [f"data.mini_sqa.num_{split}=8" for split in ("train", "val", "test")]
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        start(run_dir, *sizes, f"data.shards_dir={tmp_path / 'file'}", "cluster.use_gpu=false")
    start(run_dir, *sizes, f"data.shards_dir={tmp_path / 'shards'}", "cluster.use_gpu=false")
    assert run_dir.marker("data")["attempt"] == 2
    assert settings_of(run_dir).data.shards_dir == str(tmp_path / "shards")
    with pytest.raises(SettingsError, match="holds a run of other settings"):  # a step is done now
        start(run_dir, *sizes, f"data.shards_dir={tmp_path / 'shards'}", "run.seed=7", "cluster.use_gpu=false")


def test_a_run_killed_after_the_last_marker_that_it_wanted_ends_as_finished_at_the_next_start(run_dir, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sizes = [f"data.mini_sqa.num_{split}=8" for split in ("train", "val", "test")]
    given = [*sizes, f"data.shards_dir={run_dir.path.parent / 'shards'}", "cluster.use_gpu=false"]
    start(run_dir, *given)
    with contextlib.closing(LineFile(run_dir.tracking)) as file:
        RunLog(file, "pipeline", run_dir.path).end("KILLED")
    assert not is_everything_logged(run_dir)
    start(run_dir, *given)
    assert is_everything_logged(run_dir)


@pytest.mark.parametrize("work", ["steps/data.json", "rationale/checkpoints/step-000400/manifest.json", "trials/a/x"])
def test_settings_of_a_run_with_any_work_in_it_are_never_replaced(run_dir, work):
    write_or_verify_settings(run_dir, load_settings(preset="demo"))
    commit_json(run_dir.path / work, {})
    with pytest.raises(SettingsError, match=r"run.seed was 0 and is now 1"):
        start(run_dir, "run.seed=1")


def test_settings_of_a_run_whose_first_step_is_under_way_are_not_replaced(run_dir):
    write_or_verify_settings(run_dir, load_settings(preset="demo"))
    with owned(run_dir), pytest.raises(RunError, match="being run by process"):
        start(run_dir, "run.seed=1")
    assert settings_of(run_dir).run.seed == 0


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path):
    commit_bytes(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="disk full"), committing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"ne")
        raise OSError("disk full")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_said_so_and_the_last_file_stands(tmp_path):
    commit_bytes(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="the disk is full; what was committed is kept"), committing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_broken_json_file_is_named(tmp_path):
    commit_json(tmp_path / "a.json", {"a": 1})
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json: no valid JSON"):
        read_json(tmp_path / "a.json")


def test_a_lock_that_a_stopped_process_holds_is_told_and_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "LOCK_WAIT_S", 0.2)
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(RunError, match=r"\.lock has been locked by another process for 0.2 s, which is stopped"),
            ownership.owned(RunDir(tmp_path), take_over=True),
        ):
            pass
    with ownership.owned(RunDir(tmp_path), take_over=True) as attempt:
        assert attempt == 1
