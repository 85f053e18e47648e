"""A worker keeps one engine: the texts of the next tasks take the rows that a task leaves free."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from data_shards.generated_texts import list_tasks
from data_shards.generation_ledger import read_ledger
from data_shards.sources.scienceqa import SPLITS
from launcher.generation.text_tasks import GenerationWorker, _tasks_ahead
from launcher.stages.jobs import GenerationJob

ROWS = 5


@pytest.fixture
def job(tiny_settings, tiny_data, model_dir, tmp_path):
    generation = tiny_settings.generation.model_copy(update={"batch_size": ROWS, "temperature": 1.0})
    return GenerationJob(
        stage="rationale",
        settings=tiny_settings.model_copy(update={"generation": generation}),
        model_dir=str(model_dir),
        shards_dir=str(tiny_data.path),
        output_dir=str(tmp_path / "rationales"),
    )


def run(worker, tasks, ahead):
    """Run all tasks; returns the files and the results."""
    done = []
    for number, task in enumerate(tasks):
        worker.following = tuple(tasks[number + 1 :][:ahead])
        done.append(worker.run(task))
        wait_for_loading(worker)
    files = {task.file_name: Path(worker.job.output_dir, task.file_name).read_bytes() for task in tasks}
    shutil.rmtree(worker.job.output_dir)
    return files, done


def wait_for_loading(worker):
    worker.loader._thread.submit(lambda: None).result()


@pytest.fixture
def eager(monkeypatch):
    """The samples of tasks that follow are loaded before a task's first step."""
    start = GenerationWorker._write

    def write(worker, begun, following):
        worker.loader.start(*(task for task in following if task not in worker.begun))
        wait_for_loading(worker)
        return start(worker, begun, following)

    monkeypatch.setattr(GenerationWorker, "_write", write)


@pytest.mark.usefixtures("eager")
def test_a_files_bytes_are_the_same_whatever_tasks_share_the_rows(job):
    tasks = list_tasks(job.shards_dir, SPLITS, task_samples=8)
    alone, results = run(GenerationWorker(job), tasks, ahead=0)
    together, shared = run(GenerationWorker(job), tasks, ahead=3)
    backwards, _ = run(GenerationWorker(job), tasks[::-1], ahead=1)
    assert together == alone == backwards
    used = [sum(one.rows_used for one in found) / sum(one.rows for one in found) for found in (results, shared)]
    assert used[0] < 0.9 and used[1] > 0.95


@pytest.mark.usefixtures("eager")
def test_a_task_that_was_begun_and_is_not_run_here_leaves_nothing(job):
    tasks = list_tasks(job.shards_dir, SPLITS, task_samples=8)
    alone, _ = run(GenerationWorker(job), tasks, ahead=0)
    worker = GenerationWorker(job)
    worker.following = (tasks[5], tasks[6])
    worker.run(tasks[0])
    assert tasks[5] in worker.begun
    worker.following = (tasks[6],)
    worker.run(tasks[1])
    assert tasks[5] not in worker.begun and tasks[6] in worker.begun
    assert {path.name for path in Path(job.output_dir).rglob("*.jsonl")} == {
        Path(task.file_name).name for task in tasks[:2]
    }
    shutil.rmtree(job.output_dir)
    worker.following = ()
    rest, _ = run(worker, tasks, ahead=1)
    assert rest == alone


@pytest.mark.usefixtures("eager")
def test_an_error_of_a_task_that_follows_is_not_charged_to_the_one_that_runs(job, monkeypatch):
    tasks = list_tasks(job.shards_dir, SPLITS, task_samples=8)
    alone, _ = run(GenerationWorker(job), tasks[:1], ahead=0)
    worker = GenerationWorker(job)
    worker.following = (tasks[1],)
    step, begun = worker.engine.step, worker.begun

    def fail_of_the_second():
        if tasks[1] in begun:
            raise RuntimeError("the second task is damaged")
        return step()

    monkeypatch.setattr(worker.engine, "step", fail_of_the_second)
    worker.run(tasks[0])
    assert Path(job.output_dir, tasks[0].file_name).read_bytes() == alone[tasks[0].file_name]
    worker.following = ()
    begun[tasks[1]] = worker._begin(tasks[1])
    monkeypatch.setattr(worker.engine, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker.run(tasks[1])


def test_small_tasks_are_prepared_several_at_a_time():
    from data_shards.generated_texts import Task

    def tasks(*sizes):
        return [Task("train", f"train-{number:06d}", 0, size) for number, size in enumerate(sizes)]

    assert _tasks_ahead(tasks(256, 256), 64) == 1
    assert _tasks_ahead(tasks(256, 256, 44), 64) == 2
    assert _tasks_ahead(tasks(40, 40, 40), 64) == 7
    assert _tasks_ahead(tasks(1, 1), 64) == 8


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("search", ["none", "vote"])
def test_candidates_of_a_question_stand_in_its_line_and_are_the_same_on_every_worker(job, search):
    generation = job.settings.generation.model_copy(update={"candidates": 3, "search": search})
    job = dataclasses.replace(job, settings=job.settings.model_copy(update={"generation": generation}))
    tasks = list_tasks(job.shards_dir, ["val"], task_samples=8)
    alone, _ = run(GenerationWorker(job), tasks, ahead=0)
    together, _ = run(GenerationWorker(job), tasks[::-1], ahead=1)
    assert together == alone
    GenerationWorker(job).run(tasks[1])
    weights = hashlib.sha256(Path(job.model_dir, "model.safetensors").read_bytes()).hexdigest()
    ledger = list(read_ledger(job.output_dir))
    assert {(text.seed, text.weights) for text in ledger} == {(job.settings.run.seed, weights)}
    assert sorted(text.candidate for text in ledger) == sorted([0, 1, 2] * 8)
    shutil.rmtree(job.output_dir)
    lines = [json.loads(line) for file in alone.values() for line in file.decode().split("\n") if line]
    for line in lines:
        assert [candidate["candidate"] for candidate in line["candidates"]] == [0, 1, 2]
        chosen = [each for each in line["candidates"] if each["rationale"] == line["rationale"]]
        assert chosen and (search == "vote") == ("agreement" in line)
        assert search == "vote" or line["rationale"] == line["candidates"][0]["rationale"]
    assert any(len({each["rationale"] for each in line["candidates"]}) > 1 for line in lines)
    one = dataclasses.replace(
        job,
        settings=job.settings.model_copy(
            update={"generation": generation.model_copy(update={"candidates": 1, "search": "none"})}
        ),
    )
    first, _ = run(GenerationWorker(one), tasks, ahead=0)
    firsts = [json.loads(line)["rationale"] for file in first.values() for line in file.decode().split("\n") if line]
    assert firsts == [line["candidates"][0]["rationale"] for line in lines]
