"""What `mmcot status` tells of a run that is under way."""

from __future__ import annotations

import json
import time

import pytest

from data_shards.atomic_files import commit_bytes, commit_json
from launcher.config.loading import load_settings
from launcher.generation.text_tasks import Progress
from launcher.runs import progress
from launcher.runs.journal import Journal, JournalReader, progress_of
from launcher.runs.ownership import owned
from launcher.runs.progress import GenerationLine, TrainingLine
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import settings_of, write_or_verify_settings
from launcher.runs.status import describe_run, describe_start, mlflow_lines


def write_points(path, *points):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"metrics": {}} | point) + "\n" for point in points))


def test_the_time_left_is_at_the_pace_of_the_last_attempt(tmp_path):
    journal = tmp_path / "j.jsonl"
    write_points(
        journal,
        {"step": 0, "time_ms": 0, "total": 100},
        {"step": 10, "time_ms": 1_000_000, "metrics": {"loss": 1.0}},  # 100 s a step, then lost
        {"step": 5, "time_ms": 2_000_000, "total": 100},
        {"step": 20, "time_ms": 2_030_000, "metrics": {"loss": 1.0}},
    )
    assert progress_of(JournalReader(journal).read()) == (20, 100, 160.0)


def test_before_the_first_point_the_time_left_is_unknown_and_a_journal_without_a_beginning_says_nothing(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.log(3, {"loss": 1.0})
    assert progress_of(JournalReader(tmp_path / "j.jsonl").read()) is None
    journal.begin(40, 2000)
    assert progress_of(JournalReader(tmp_path / "j.jsonl").read()) == (40, 2000, None)


EIGHT_HOURS = 8 * 3600 * 1000


def test_the_line_of_a_training_and_status_tell_the_same_time_left_eight_hours_after_the_first_attempt(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(progress, "SHOW_EVERY_S", 0.0)
    journal, lines = tmp_path / "j.jsonl", []
    metrics = {"loss": 1.0, "tokens_per_s": 10.0, "interval_s": 1.0}
    write_points(
        journal,
        {"step": 0, "time_ms": 0, "total": 100},
        {"step": 40, "time_ms": 80_000, "metrics": metrics},
        {"step": 40, "time_ms": EIGHT_HOURS, "total": 100},
        {"step": 50, "time_ms": EIGHT_HOURS + 10_000, "metrics": metrics},
    )
    line = TrainingLine(100, lines.append)
    for point in JournalReader(journal).read():
        line.show(point)
    assert lines[-1].endswith("time left 0:50")
    assert progress_of(JournalReader(journal).read()) == (50, 100, 50.0)


def test_texts_that_stood_before_do_not_shorten_the_time_left_of_a_generation(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SHOW_EVERY_S", 0.0)
    lines, path = [], tmp_path / "j.jsonl"
    with GenerationLine(lines.append, Journal(path)) as line:
        for done in (910, 920):  # 900 of 1,000 stood; 10 questions take 5 s
            line.show(Progress(done, 1000, num_tokens=10, seconds=(done - 900) / 2, num_before=900))
    assert lines[-1].endswith("time left 0:40")
    assert progress_of(JournalReader(path).read())[:2] == (920, 1000)
    begun = next(JournalReader(path).read())
    assert begun["step"] == 900 and abs(begun["time_ms"] / 1000 - time.time() + 5.0) < 1.0


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = load_settings(
        preset="demo", overrides=[f"run.dir={tmp_path / 'demo'}", "tracking.uri=http://tracking.example.org:5000"]
    )
    run_dir = RunDir(settings.run_dir)
    run_dir.path.mkdir()
    write_or_verify_settings(run_dir, settings)
    return run_dir


def test_status_tells_step_time_left_checkpoint_owner_and_the_page_in_mlflow(run_dir):
    run_dir.mark_done("data", {"seconds": 3.2, "attempt": 1})
    now = int(time.time() * 1000)
    write_points(
        run_dir.journal("rationale"),
        {"step": 0, "time_ms": now - 60_000, "total": 2000},
        {"step": 1200, "time_ms": now, "metrics": {"loss": 0.0123}},
        {"step": 1200, "time_ms": now, "metrics": {"validation_loss": 0.5}},
    )
    commit_bytes(run_dir.checkpoints("rationale") / "LATEST", b"step-1200\n")
    commit_json(
        run_dir.mlflow_state,
        {"uri": "http://tracking.example.org:5000", "experiment_id": "7", "runs": {"pipeline": "8f3c"}},
    )
    with owned(run_dir):
        lines = describe_run(run_dir.path)
    assert (
        lines[1]
        == "train-rationale  running, step 1,200 of 2,000, loss 0.0123, time left 0:40, last checkpoint step-1200"
    )
    assert lines[2] == "rationales       to do"
    assert lines[5].startswith("owner: process ") and lines[5].endswith(
        ("last heard of 0 s ago", "last heard of 1 s ago")
    )
    assert (
        lines[6] == "MLflow: http://tracking.example.org:5000/#/experiments/7/runs/8f3c?workflowType=machine_learning"
    )


@pytest.mark.parametrize(
    ("state", "page"),
    [
        (None, "experiments"),  # nothing is sent yet
        (
            {"uri": "http://tracking.example.org:5000/", "runs": {"pipeline": "8f3c"}},
            "runs/8f3c",
        ),  # of a version that kept no experiment
        ({"uri": "http://tracking.example.org:5000/", "experiment_id": "7", "runs": {}}, "experiments/7/runs"),
    ],
)
def test_the_address_in_mlflow_is_the_nearest_page_that_is_known(run_dir, state, page):
    if state:
        commit_json(run_dir.mlflow_state, state)
    assert (
        describe_run(run_dir.path)[-1]
        == f"MLflow: http://tracking.example.org:5000/#/{page}?workflowType=machine_learning"
    )


def test_a_tuning_also_names_the_page_that_compares_its_trials(run_dir):
    commit_json(
        run_dir.mlflow_state,
        {"uri": "http://tracking.example.org:5000", "experiment_id": "7", "runs": {"pipeline": "8f3c"}},
    )
    settings = settings_of(run_dir)
    assert "trials" not in " ".join(mlflow_lines(settings, run_dir))
    for number in range(2):
        commit_json(run_dir.path / "trials" / f"t{number}" / "mlflow.json", {"runs": {"pipeline": f"a{number}"}})
    page, title, trials = mlflow_lines(settings, run_dir)
    address = "http://tracking.example.org:5000/#/compare-runs?runs=[%22a0%22,%22a1%22]&experiments=[%227%22]&workflowType=machine_learning"
    assert "/runs/8f3c?" in page and (title, trials) == ("trials compared:", f"  {address}")
    for number in range(2, 20):
        commit_json(run_dir.path / "trials" / f"t{number}" / "mlflow.json", {"runs": {"pipeline": f"a{number}"}})
    assert mlflow_lines(settings, run_dir)[-2] == "the first 16 of 20 trials compared:"


def test_a_trials_page_is_served_from_the_folder_that_holds_the_tuning(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = f"sqlite:///{tmp_path / 'my runs' / 'mlflow.db'}"
    trial = load_settings(
        preset="demo",
        overrides=[f"run.dir={tmp_path / 'my runs' / 'tune' / 'trials' / 'a'}", f"tracking.uri={database}"],
    )
    command, page = mlflow_lines(trial, RunDir(trial.run_dir))
    assert command == f"MLflow: mmcot mlflow up --runs '{tmp_path / 'my runs'}'   then open"
    assert page.startswith("  http://127.0.0.1:5000/#/")


def test_status_counts_questions_while_texts_are_written_and_promises_no_time_when_nobody_runs_it(run_dir):
    for step in ("data", "train-rationale"):
        run_dir.mark_done(step, {"seconds": 1.0, "attempt": 1})
    write_points(
        run_dir.journal_of("rationales"),
        {"step": 256, "time_ms": 0, "total": 5200},
        {"step": 1280, "time_ms": 8_000, "metrics": {"generation_tokens_per_s": 100.0}},
    )
    lines = describe_run(run_dir.path)
    assert lines[2] == "rationales       to do, 1,280 of 5,200 questions"
    assert "resumes at 'rationales'" in lines[5]


def test_the_status_of_a_tuning_has_a_line_for_each_trial_by_its_values(tmp_path):
    space = "tuning.space={training.learning_rate: {loguniform: [1.0e-5, 1.0e-2]}}"
    run_dir = RunDir(tmp_path / "tune")
    settings = load_settings(preset="demo", overrides=[f"run.dir={run_dir.path}", space])
    trial = RunDir(run_dir.path / "trials" / "abc")
    for folder, rate in ((run_dir, 0.5), (trial, 0.002)):
        folder.path.mkdir(parents=True, exist_ok=True)
        own = settings.model_copy(update={"training": settings.training.model_copy(update={"learning_rate": rate})})
        write_or_verify_settings(folder, own)
    journal = Journal(trial.journal("rationale"))
    journal.begin(0, 950)
    journal.log(100, {"loss": 0.5})
    lines = describe_run(run_dir.path)
    assert "learning_rate 0.002, step 100 of 950, loss 0.5000" in lines
    assert "no process is running it; the same command continues it" in lines
    row = {"values": {"training.learning_rate": 0.002}, "state": "finished", "step": 950, "validation_loss": 0.25}
    commit_json(run_dir.path / "trials.json", [row])
    lines = describe_run(run_dir.path)
    assert "learning_rate 0.002: finished, validation_loss 0.2500, step 950" in lines
    assert any(line.startswith("finished; the best settings are in") for line in lines)


def test_more_workers_than_processors_are_said_to_share_them(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    settings = load_settings(preset="demo", overrides=["cluster.num_workers=16", "cluster.use_gpu=false"])
    lines = describe_start(settings, RunDir(settings.run_dir))
    assert lines[0].endswith("16 workers, CPUs, 1 for each") and "cluster.num_workers=2" in lines[-1]
    fewer = load_settings(preset="demo", overrides=["cluster.num_workers=2", "cluster.use_gpu=false"])
    assert "note:" not in " ".join(describe_start(fewer, RunDir(settings.run_dir)))
