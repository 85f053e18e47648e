"""Sharded generation on real Ray actors: each task committed exactly once, whatever dies."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import psutil
import pytest

from data_shards.atomic_files import read_json
from data_shards.generated_texts import list_tasks
from data_shards.generation_ledger import read_ledger
from data_shards.reader import SplitReader
from data_shards.sources.scienceqa import SPLITS
from data_shards.text_lines import read_lines
from launcher.generation.text_tasks import (
    GenerationError,
    GenerationWorker,
    expected_costs,
    run_tasks,
    write_split_texts,
)
from launcher.stages.jobs import GenerationJob
from mmcot.decoding.repetition import is_repetitive


@pytest.fixture
def job(tiny_settings, tiny_data, model_dir, tmp_path):
    return GenerationJob(
        stage="rationale",
        settings=tiny_settings,
        model_dir=str(model_dir),
        shards_dir=str(tiny_data.path),
        output_dir=str(tmp_path / "rationales"),
    )


def contents(job, tasks):
    return {task.file_name: (open(f"{job.output_dir}/{task.file_name}", "rb").read()) for task in tasks}


def worker_processes():
    return [p for p in psutil.Process().children(recursive=True) if "GenerationWorker" in " ".join(p.cmdline())]


@pytest.mark.ray
@pytest.mark.parametrize("num_candidates", [1, 3])
def test_a_worker_killed_with_9_loses_no_text_and_writes_none_twice(job, ray_up, num_candidates):
    if num_candidates > 1:
        drawn = {"temperature": 1.0, "candidates": num_candidates, "search": "vote"}
        generation = job.settings.generation.model_copy(update=drawn)
        job = dataclasses.replace(job, settings=job.settings.model_copy(update={"generation": generation}))
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
    ledger = [(text.qid, text.candidate) for text in read_ledger(job.output_dir)]
    assert sorted(ledger) == sorted((qid, number) for qid in qids for number in range(num_candidates))


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
def test_a_task_that_always_fails_is_set_aside_with_its_questions_and_the_rest_completes(job, ray_up, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(job.shards_dir, shards)
    tar = shards / "text" / "val-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(b"\0" * len(whole))
    broken = dataclasses.replace(job, shards_dir=str(shards))
    with pytest.raises(
        GenerationError,
        match=r"1 of 2 tasks failed 3 times and were quarantined[\s\S]*"
        r"task val/000000-000000.jsonl[\s\S]*cut off or altered",
    ):
        write_split_texts(broken, ["val", "test"], {"model": "a"})
    set_aside = read_json(f"{job.output_dir}/set_aside.json")
    assert len(set_aside["val/000000-000000.jsonl"]["qids"]) == 16 and os.path.exists(
        f"{job.output_dir}/test/000000-000000.jsonl"
    )
    tar.write_bytes(whole)
    files, summary = write_split_texts(broken, ["val", "test"], {"model": "a"})
    assert summary["num_samples"] == 32 and read_json(f"{job.output_dir}/set_aside.json") == {}
    assert len(files) == 2


@pytest.mark.ray
def test_a_local_ray_answers_nobody_without_its_token(ray_up):
    import grpc
    import ray

    with (
        grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel,
        pytest.raises(grpc.RpcError) as refusal,
    ):
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=10)
    assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_longest_tasks_come_first(job):
    tasks = list_tasks(job.shards_dir, SPLITS, task_samples=8)
    costs = expected_costs(job.shards_dir, tasks)
    assert len(costs) == 12 and min(costs.values()) > 0
    short, long = min(tasks, key=costs.get), max(tasks, key=costs.get)
    reader = SplitReader(job.shards_dir, long.split)
    read = sum(
        len(json.dumps(reader.problem(n).to_record(), ensure_ascii=False))
        for n in reader.samples_of_shard(long.shard)[long.start : long.start + 8]
    )
    assert costs[long] > costs[short] and abs(costs[long] - read) < 0.1 * read


@pytest.mark.parametrize(
    ("text", "repetitive"),
    [("", False), ("a b c d e f g h i j k l m", False), ("the cat sat on " * 6, True), ("yes " * 5, False)],
)
def test_a_text_that_goes_round_in_circles_is_told_from_one_that_does_not(text, repetitive):
    assert is_repetitive(text) == repetitive
