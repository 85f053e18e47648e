"""What killed processes leave in folders: removed at the next start and counted, never those of a living process."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from data_shards.atomic_files import commit_bytes, process_mark
from data_shards.leftovers import SILENT_S, describe_leftovers, remove_leftovers
from launcher.config.loading import load_settings
from launcher.pipeline.pipeline import run_pipeline
from launcher.runs.run_dir import RunDir, RunError

WRITE = """
import os, sys, time
from data_shards.atomic_files import committing
with committing(sys.argv[1]) as temporary:
    temporary.write_bytes(b"x" * 1_000_000)
    print(temporary.name, flush=True)
    time.sleep(600)
"""


def write_half(path):
    """Start a process that has written half of a file; returns it and the temporary file's name."""
    writer = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True)
    return writer, writer.stdout.readline().strip()


def kill(writer):
    writer.kill()
    writer.wait()
    writer.stdout.close()


@pytest.mark.processes
def test_a_start_removes_what_killed_processes_left_in_run_and_data_and_counts_it(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sizes = [f"data.mini_sqa.num_{split}=8" for split in ("train", "val", "test")]
    places = [f"run.dir={tmp_path / 'runs' / 'a'}", f"data.shards_dir={tmp_path / 'data' / 'shards'}"]
    settings = load_settings(preset="demo", overrides=[*sizes, *places, "cluster.use_gpu=false"])
    run_pipeline(settings, until="data", report=lambda line: None)
    run, shards = tmp_path / "runs" / "a", tmp_path / "data" / "shards"
    killed = [write_half(run / "scores.json"), write_half(shards / "lengths" / "train.npz")]
    for writer, _ in killed:
        kill(writer)
    commit_bytes(run / "rationale" / "checkpoints" / ".staging-000020-0f5c" / "state" / "a", b"x" * 2_000_000)
    alive, kept = write_half(run / "rationale" / "model.json")
    said = []
    run_pipeline(settings, until="data", report=said.append)
    left = [path.name for pattern in (".tmp-*", ".staging-*") for path in tmp_path.rglob(pattern)]
    kill(alive)
    assert left == [kept]
    assert "removed 2 unfinished files of killed processes (3.0 MB)" in said
    assert "removed 1 unfinished file of killed processes (1.0 MB)" in said


def test_files_of_another_machine_are_removed_when_they_have_not_changed_for_long(tmp_path):
    names = (".tmp-00000000.17.0a1b2c3d-a.json", ".tmp-0123456789ab-of-an-earlier-version.json")
    old = time.time() - SILENT_S - 60
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / f"{name}.old").touch()
        os.utime(tmp_path / f"{name}.old", (old, old))
    (tmp_path / f".tmp-{process_mark()}.0a1b2c3d-own.json").touch()
    os.utime(tmp_path / f".tmp-{process_mark()}.0a1b2c3d-own.json", (old, old))
    assert remove_leftovers(tmp_path, staging=False) == (2, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*names, f".tmp-{process_mark()}.0a1b2c3d-own.json"]
    )
    assert list(describe_leftovers(0, 0)) == []


def test_a_refused_start_removes_nothing(tmp_path):
    from launcher.runs.ownership import owned

    settings = load_settings(preset="demo", overrides=[f"run.dir={tmp_path / 'a'}"])
    commit_bytes(tmp_path / "a" / ".staging-model" / "weights", b"x")
    with owned(RunDir(tmp_path / "a")), pytest.raises(RunError, match="being run by"):
        run_pipeline(settings, until="data", report=lambda line: None)
    assert (tmp_path / "a" / ".staging-model" / "weights").exists()
