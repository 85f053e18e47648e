"""The marker of a step names the code that began and the code that ended it."""

from __future__ import annotations

import contextlib

import pytest

from data_shards.atomic_files import commit_bytes, commit_json
from launcher.config.loading import dump_settings, load_settings
from launcher.pipeline.attempt import Attempt
from launcher.runs import code_version as module
from launcher.runs.code_version import code_version
from launcher.runs.run_dir import RunDir


def run_step(run_dir, settings, version, monkeypatch, *, fails=False):
    """Run or continue a step with the code of some version; returns what was printed."""

    def work(child):
        if fails:
            raise KeyError("killed")
        return {}

    said = []
    monkeypatch.setattr(module, "code_version", lambda: version)
    with contextlib.ExitStack() as resources:
        resources.enter_context(contextlib.suppress(KeyError))
        attempt = Attempt(settings, run_dir, 1, said.append, resources)
        attempt.run_step("data", {}, work)
    return [line for line in said if "version" in line]


@pytest.fixture
def place(tmp_path, monkeypatch):
    settings = load_settings(
        preset="demo", overrides=[f"run.dir={tmp_path}/a", f"tracking.uri=sqlite:///{tmp_path}/m.db"]
    )
    monkeypatch.setattr("launcher.tracking.run_log.sending", lambda *given, **options: contextlib.nullcontext())
    run_dir = RunDir(settings.run_dir)
    commit_bytes(run_dir.path / "run.yaml", dump_settings(settings).encode())
    commit_json(run_dir.path / "lock.json", {"attempt": 1})
    return run_dir, settings


def test_a_step_of_one_version_says_nothing_and_its_marker_names_it(place, monkeypatch):
    run_dir, settings = place
    assert run_step(run_dir, settings, "1.0 aa", monkeypatch, fails=True) == []
    assert run_step(run_dir, settings, "1.0 aa", monkeypatch) == []
    assert run_dir.marker("data")["code"] == {"began": "1.0 aa", "ended": "1.0 aa"}


def test_a_step_of_two_versions_is_said_once_and_its_marker_names_both(place, monkeypatch):
    run_dir, settings = place
    run_step(run_dir, settings, "1.0 aa", monkeypatch, fails=True)
    (note,) = run_step(run_dir, settings, "1.1 bb", monkeypatch, fails=True)
    assert "'data' was begun by version 1.0 aa of this program and is continued by 1.1 bb" in note
    assert run_step(run_dir, settings, "1.1 bb", monkeypatch) == []
    assert run_dir.marker("data")["code"] == {"began": "1.0 aa", "ended": "1.1 bb"}


def test_the_version_changes_with_any_module(monkeypatch, tmp_path):
    code_version.cache_clear()
    before = code_version()
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "__init__.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "_PACKAGES", (*module._PACKAGES, "extra"))
    code_version.cache_clear()
    first = code_version()
    (tmp_path / "extra" / "__init__.py").write_text("A = 2\n")
    assert code_version() == first  # of a process it is one
    code_version.cache_clear()
    assert len({before, first, code_version()}) == 3
    code_version.cache_clear()
