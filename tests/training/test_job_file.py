"""A job file for torchrun that something cut or altered is one sentence."""

from __future__ import annotations

import json

import pytest

from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.stages.jobs import TrainJob
from launcher.training.torchrun import main, read_job

JOB = TrainJob("rationale", load_settings(preset="demo"), "runs/demo", "data/demo", {}, num_steps=7, attempt=1)


def changed(**values):
    return json.dumps({key: value for key, value in {**JOB.to_json(), **values}.items() if value is not ...})


def test_a_job_is_read_as_it_was_written_also_with_a_mark(tmp_path):
    (tmp_path / "job.json").write_text(changed(), encoding="utf-8-sig")
    assert read_job(tmp_path / "job.json") == JOB


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "job.json: no valid JSON"),
        (changed()[:300], "job.json: no valid JSON"),
        ("[]", "job.json is no object with the settings of a job"),
        (changed(settings=5), "job.json is no object with the settings of a job"),
        (changed(stage=...), "job.json has no 'stage'"),
        (changed(more=1), "job.json has the unknown 'more'"),
    ],
)
def test_a_broken_job_is_named_with_its_remedy(tmp_path, text, message):
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(SettingsError, match=f"job file .*{message}.*; write it again with `mmcot train STAGE"):
        read_job(tmp_path / "job.json")


def test_wrong_settings_of_a_job_are_named_with_the_file(tmp_path):
    (tmp_path / "job.json").write_text(changed(settings={**JOB.settings.model_dump(), "training": {"log_every": 0}}))
    with pytest.raises(SettingsError, match=r"job\.json: setting training\.log_every = 0: expected greater than 0"):
        read_job(tmp_path / "job.json")


def test_a_rank_ends_with_the_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main([str(tmp_path / "none.json")]) == 2
    assert "rank 0: job file" in capsys.readouterr().err
