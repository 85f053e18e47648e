"""Samples of the next task are loaded while a task runs; each task has its own samples and its own errors."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from data_shards.generated_texts import list_tasks
from launcher.generation.task_loading import TaskLoader
from launcher.stages.jobs import GenerationJob
from launcher.stages.samples import StageSamples, load_tokenizer, open_stage

CPU = torch.device("cpu")


@pytest.fixture
def parts(tiny_settings, tiny_data, tmp_path):
    """A loader, its tasks, and the tokenizer."""
    job = GenerationJob(
        stage="rationale",
        settings=tiny_settings,
        model_dir=str(tmp_path),
        shards_dir=str(tiny_data.path),
        output_dir=str(tmp_path),
    )
    tokenizer = load_tokenizer(tiny_settings, tiny_data.path)
    tasks = list_tasks(tiny_data.path, ["train"], task_samples=4)
    return TaskLoader(job, tokenizer, pad_token_id=0, device=CPU), tasks, tokenizer


def test_a_task_has_its_samples_in_their_order_loaded_ahead_or_not(parts, tiny_settings, tiny_data):
    loader, tasks, tokenizer = parts
    samples = open_stage(tiny_settings, "rationale", "train", shards_dir=tiny_data.path, tokenizer=tokenizer)
    loader.start(tasks[1])
    for task in (tasks[1], tasks[0], tasks[2]):
        loaded = loader.take(task)
        numbers = samples.reader.samples_of_shard(task.shard)[task.start : task.start + task.num_samples]
        assert list(loaded.qids) == [samples.reader.qid(number) for number in numbers]
        assert list(loaded.sources) == [samples.encode(number).source_ids for number in numbers]
        batch, *_ = loaded.batches
        for place, index in enumerate(batch.indices):
            features, source = samples.reader.features(numbers[index]), loaded.sources[index]
            assert batch.inputs["input_ids"][place, : len(source)].tolist() == list(source)
            assert np.array_equal(batch.inputs["vision_features"][place, : len(features)], features.astype(np.float32))


def test_loading_ahead_does_not_hold_up_the_worker_and_its_error_is_the_next_tasks(parts, monkeypatch):
    loader, tasks, _ = parts
    first, may_fail = loader.take(tasks[0]), threading.Event()
    encode = StageSamples.encode

    def fail(samples, number, epoch):
        may_fail.wait(30)
        raise OSError("the disk is gone")

    monkeypatch.setattr(StageSamples, "encode", fail)
    loader.start(tasks[1])  # returns although nothing can be read yet
    assert len(first.sources) == tasks[0].num_samples
    may_fail.set()
    with pytest.raises(OSError, match="the disk is gone"):
        loader.take(tasks[1])
    monkeypatch.setattr(StageSamples, "encode", encode)
    assert len(loader.take(tasks[1]).sources) == tasks[1].num_samples  # another attempt reads again


def test_an_error_of_a_task_that_is_not_taken_is_nobodys(parts, monkeypatch):
    loader, tasks, _ = parts
    with monkeypatch.context() as patch:
        patch.setattr(StageSamples, "encode", lambda *arguments: pytest.fail("damaged"))
        loader.start(tasks[1])
        loader._thread.submit(lambda: None).result()  # it has failed by now
    assert len(loader.take(tasks[2]).sources) == tasks[2].num_samples


def test_a_task_that_is_not_taken_stops_at_its_next_sample(parts, monkeypatch):
    loader, tasks, _ = parts
    encode, started, may_go_on, read = StageSamples.encode, threading.Event(), threading.Event(), []

    def wait(samples, number, epoch):
        read.append(number)
        started.set()
        may_go_on.wait(30)
        return encode(samples, number)

    monkeypatch.setattr(StageSamples, "encode", wait)
    loader.start(tasks[1])
    started.wait(30)
    assert not loader.is_loaded(tasks[1]) and not loader.is_loaded(tasks[0])
    loader.start(tasks[2])
    may_go_on.set()
    assert len(loader.take(tasks[2]).sources) == tasks[2].num_samples
    assert len(read) == 1 + tasks[2].num_samples


def test_no_more_batches_are_in_memory_than_the_one_that_is_used_and_the_next(parts, monkeypatch):
    from mmcot.decoding import source_batches

    loader, tasks, _ = parts
    made, collate = [], source_batches.collate_sources
    monkeypatch.setitem(source_batches.SOURCES_PER_BATCH, "cpu", 1)
    monkeypatch.setattr(
        source_batches, "collate_sources", lambda *args, **options: (made.append(1), collate(*args, **options))[1]
    )
    loaded = loader.take(tasks[0])
    assert not made
    for number, batch in enumerate(loaded.batches, start=1):
        assert len(batch.indices) == 1 and number <= len(made) + 1 and len(made) <= number + 1
    assert len(made) == tasks[0].num_samples == 4


def test_a_worker_that_waits_for_its_samples_reports_their_progress_alone(parts, monkeypatch):
    loader, tasks, _ = parts
    reported, may_end = [], threading.Event()
    monkeypatch.setattr("launcher.generation.task_loading.LOOK_EVERY_S", 0.01)
    encode = StageSamples.encode

    def wait(samples, number, epoch):
        may_end.wait(30)
        return encode(samples, number)

    monkeypatch.setattr(StageSamples, "encode", wait)
    threading.Timer(0.3, may_end.set).start()
    loader.take(tasks[0], lambda: reported.append(may_end.is_set()))
    assert reported.count(False) == 1  # at the beginning; nothing was read until the end of the wait


def test_several_tasks_are_loaded_ahead_in_their_order_and_those_left_out_are_dropped(parts, monkeypatch):
    loader, tasks, _ = parts
    loader.start(*tasks[:3])
    loader._thread.submit(lambda: None).result()
    assert all(loader.is_loaded(task) for task in tasks[:3])
    first = loader.take(tasks[0])
    loader.start(*tasks[2:4])
    assert not loader.is_loaded(tasks[1]) and loader.is_loaded(tasks[2])
    monkeypatch.setattr(StageSamples, "encode", lambda *arguments: pytest.fail("loaded again"))
    assert len(first.sources) == len(loader.take(tasks[2]).sources) == tasks[2].num_samples
