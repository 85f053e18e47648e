"""Sharded generation on real Ray actors: each task committed exactly once, whatever dies."""

from __future__ import annotations

import os
import shutil
import signal

import psutil
import pytest

from data_shards.rationales import list_tasks, read_lines
from data_shards.scienceqa import SPLITS
from launcher.cluster import ray_session
from launcher.generate import GenerationError, GenerationWorker, run_tasks
from launcher.jobs import GenerationJob


@pytest.fixture(scope="module")
def model_dir(tiny_settings, tiny_data, workplace):
    """A stage-one model of random weights, exported as training exports it."""
    from launcher.samples import load_tokenizer, open_stage
    from launcher.train import build_model

    tokenizer = load_tokenizer(tiny_settings, tiny_data.path)
    samples = open_stage(tiny_settings, "rationale", "train", shards_dir=tiny_data.path, tokenizer=tokenizer, rationales_dir=None)
    build_model(tiny_settings, samples).save_pretrained(workplace / "model")
    tokenizer.save_pretrained(workplace / "model")
    return workplace / "model"


@pytest.fixture
def job(tiny_settings, tiny_data, model_dir, tmp_path):
    return GenerationJob(
        stage="rationale", settings=tiny_settings, model_dir=str(model_dir),
        shards_dir=str(tiny_data.path), output_dir=str(tmp_path / "rationales"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ray_up(tiny_settings):
    with ray_session(tiny_settings.cluster):
        yield


def contents(job, tasks):
    return {task.file_name: (open(f"{job.output_dir}/{task.file_name}", "rb").read()) for task in tasks}


def worker_processes():
    return [p for p in psutil.Process().children(recursive=True) if "GenerationWorker" in " ".join(p.cmdline())]


@pytest.mark.ray
def test_a_worker_killed_with_9_loses_no_line_and_writes_none_twice(job, ray_up):
    tasks = list_tasks(job.shards_dir, SPLITS, task_samples=8)
    worker = GenerationWorker(job)
    for task in tasks:
        worker.run(task)
    undisturbed = contents(job, tasks)
    shutil.rmtree(job.output_dir)
    killed = []

    def kill_one(progress):
        if not killed and (found := worker_processes()):
            os.kill(found[0].pid, signal.SIGKILL)
            killed.append(found[0].pid)

    files = run_tasks(job, tasks, report=kill_one)
    assert killed
    assert contents(job, tasks) == undisturbed
    assert sum(file["num_samples"] for file in files.values()) == 96
    qids = [line["qid"] for task in tasks for line in read_lines(f"{job.output_dir}/{task.file_name}")]
    assert len(set(qids)) == len(qids) == 96


@pytest.mark.ray
def test_a_committed_file_is_never_computed_again(job, ray_up):
    tasks = list_tasks(job.shards_dir, ["val"], task_samples=8)
    run_tasks(job, tasks)
    path = f"{job.output_dir}/{tasks[0].file_name}"
    before = os.stat(path).st_mtime_ns
    os.unlink(f"{job.output_dir}/{tasks[1].file_name}")
    seen = []
    run_tasks(job, tasks, report=lambda progress: seen.append(progress.num_done))
    assert seen == [16] and os.stat(path).st_mtime_ns == before


@pytest.mark.ray
def test_a_task_that_always_fails_is_named_after_its_attempts(job, ray_up, tmp_path):
    import dataclasses

    shards = tmp_path / "shards"
    shutil.copytree(job.shards_dir, shards)
    tar = shards / "text" / "val-000000.tar"
    tar.write_bytes(b"\0" * tar.stat().st_size)
    broken = dataclasses.replace(job, shards_dir=str(shards))
    with pytest.raises(GenerationError, match=r"task val/000000-000000.jsonl failed 3 times[\s\S]*cut off or altered"):
        run_tasks(broken, list_tasks(shards, ["val"], task_samples=16))
