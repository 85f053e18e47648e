"""Shards: written once, read by us and by plain webdataset, checked, refused when altered."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds

from data_shards.atomic_files import commit_bytes, sha256_of_file
from data_shards.check import check_shards
from data_shards.errors import ShardError
from data_shards.generated_texts import close_output, list_tasks, open_output, write_task
from data_shards.index import build_index
from data_shards.manifest import manifest_shards, read_manifest
from data_shards.rationale_reader import RationaleReader, read_rationales
from data_shards.reader import SplitReader
from data_shards.sources.forms import read_questions
from data_shards.stream import load_ahead, walk_steps
from data_shards.writer import (
    missing_feature_shards,
    write_feature_shard,
    write_feature_shards,
    write_text_shards,
)
from launcher.data.build import describe_data, prepare_data
from mmcot.texts.sample import Sample, SampleError


@pytest.fixture
def copied_shards(tiny_data, tmp_path):
    shutil.copytree(tiny_data.path, tmp_path / "shards")
    return tmp_path / "shards"


def test_plain_webdataset_reads_every_sample_joined_in_order(tiny_data):
    reader = SplitReader(tiny_data.path, "train", features="patch")
    tars = [shard.name for shard in manifest_shards(tiny_data.text, "train")]
    read = []
    for name in tars:
        text = wds.WebDataset(str(tiny_data.path / "text" / f"{name}.tar"), shardshuffle=False)
        features = wds.WebDataset(str(tiny_data.path / "features" / "patch" / f"{name}.tar"), shardshuffle=False)
        for sample, feature in zip(text, features, strict=True):
            assert sample["__key__"] == feature["__key__"]
            read.append((Sample.from_record(json.loads(sample["json"])), np.load(io.BytesIO(feature["npy"]))))
    assert len(read) == len(reader) == 64
    for number, (problem, array) in enumerate(read):
        assert reader.problem(number) == problem
        np.testing.assert_array_equal(reader.features(number), array)
        assert array.shape == ((64, 208) if problem.images else (0, 208)) and array.dtype == np.float16


def test_the_same_input_builds_the_same_bytes(tiny_data, workplace, tmp_path):
    source = next(workplace.glob("mini_sqa-source-*"))
    manifest = write_text_shards(read_questions(source), tmp_path, samples_per_shard=24)
    assert manifest == tiny_data.text


def test_every_feature_tar_counts_what_it_has_no_picture_for(tiny_data):
    counts = tiny_data.features["counts"]
    assert counts["train"] == dict.fromkeys(counts["train"], 0) | {"num_with_features": 40, "num_no_image": 24}
    assert sum(sum(count.values()) for count in counts.values()) == 96


def test_a_named_picture_that_is_not_there_is_counted_and_gets_no_feature(
    workplace, tiny_settings, tiny_data, tmp_path, monkeypatch
):
    source = tmp_path / "source"
    shutil.copytree(next(workplace.glob("mini_sqa-source-*")), source)
    shutil.rmtree(source / "images" / "val")
    data = tiny_settings.data.model_copy(update={"path": str(source), "shards_dir": str(tmp_path / "shards")})
    folder = prepare_data(tiny_settings.model_copy(update={"data": data}), lambda line: None)
    assert folder.features["counts"]["val"]["num_picture_absent"] == 10
    assert any("10 whose picture is absent" in line for line in describe_data(folder))
    reader = SplitReader(folder.path, "val", features="patch")
    assert {reader.features(number).shape for number in range(16)} == {(0, 208)}


def test_check_passes_over_every_tar_of_text_and_features(tiny_data):
    assert sum(num_samples for _, num_samples in check_shards(tiny_data.path)) == 2 * 96


def test_a_truncated_shard_is_named(copied_shards):
    tar = copied_shards / "text" / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-9000])
    with pytest.raises(ShardError, match=r"train-000001.tar has sha256"):
        list(check_shards(copied_shards))


def test_a_single_altered_byte_is_found_when_the_sample_is_read(copied_shards):
    tar = copied_shards / "text" / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="cut off or altered"):
        SplitReader(copied_shards, "val").problem(0)


def test_a_pickle_in_a_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        info = tarfile.TarInfo("1.pkl")
        tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(ShardError, match="not of an allowed kind"):
        build_index(tmp_path / "bad.tar")


def test_a_manifest_of_another_schema_is_refused(copied_shards):
    path = copied_shards / "text" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ShardError, match="schema version 99"):
        read_manifest(copied_shards / "text")


def test_a_split_that_lists_an_unknown_question_is_refused(workplace, tmp_path, tiny_data):
    source = tmp_path / "source"
    shutil.copytree(next(workplace.glob("mini_sqa-source-*")), source)
    splits = json.loads((source / "pid_splits.json").read_text())
    splits["val"].append("no-such-qid")
    (source / "pid_splits.json").write_text(json.dumps(splits))
    with pytest.raises(SampleError, match="no-such-qid"):
        read_questions(source)


class Numbers:
    """Samples that are their own numbers."""

    bytes_read = bytes_needed = 0

    def __init__(self, is_remote=False):
        self.is_remote, self.announced, self.loaded = is_remote, [], []

    def load_block(self, samples, is_dummy, epoch):
        assert not self.is_remote or set(samples) <= set(np.concatenate(self.announced[-2:]))
        self.loaded.append(samples)
        return tuple(samples), is_dummy

    def prefetch(self, samples):
        self.announced.append(samples)


def small_plan(epoch):
    from data_shards.plan import Plan

    return Plan(
        np.ones(10),
        np.ones(10),
        np.arange(10) // 3,
        seed=0,
        epoch=epoch,
        global_batch_size=4,
        micro_batch_size=2,
        window_shards=1,
    )


def walk(steps, samples=None, world_size=2):
    return list(walk_steps(small_plan, samples or Numbers(), rank=1, world_size=world_size, steps=steps))


def test_steps_can_be_streamed_from_anywhere_and_dummies_fill_the_last_batch():
    whole = walk(range(7))
    assert [step.number for step in whole] == list(range(7))
    assert walk(range(4, 7)) == whole[4:]
    assert whole[2].blocks[0][1][1] is True  # ten samples, two ranks: the third step has one block


@pytest.mark.parametrize("walkers", [1, 2, 3, 5])
def test_walkers_that_share_the_work_yield_what_one_alone_does(walkers):
    shared = [walk(range(7)[i::walkers]) for i in range(walkers)]
    assert [shared[step % walkers][step // walkers] for step in range(7)] == walk(range(7))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_that_is_read_was_announced_in_this_window_or_the_one_before(world_size):
    samples = Numbers(is_remote=True)
    assert (
        len(
            walk(range(7), samples, world_size)
            if world_size > 1
            else list(walk_steps(small_plan, samples, rank=0, world_size=1, steps=range(7)))
        )
        == 7
    )
    assert len(samples.announced) > 2 and sum(map(len, samples.announced)) == sum(map(len, samples.loaded))


def test_an_error_in_the_reading_thread_reaches_the_training_loop():
    def items():
        yield 1
        raise ShardError("broken")

    loaded = load_ahead(items())
    assert next(loaded) == 1
    with pytest.raises(ShardError, match="broken"):
        next(loaded)


def test_tasks_cover_every_sample_once_and_rationales_join_by_qid(tiny_data, tmp_path):
    tasks = list_tasks(tiny_data.path, ["train"], task_samples=10)
    assert sum(task.num_samples for task in tasks) == 64 and len({task.file_name for task in tasks}) == len(tasks)
    reader = SplitReader(tiny_data.path, "train")
    open_output(tmp_path, {"model": "a"})
    files = {}
    for task in tasks:
        numbers = reader.samples_of_shard(task.shard)[task.start : task.start + task.num_samples]
        path = write_task(
            tmp_path, task, [{"qid": reader.qids[n], "rationale": f"r{reader.qids[n]}\u2028"} for n in numbers]
        )
        files[task.file_name] = {"sha256": sha256_of_file(path), "num_samples": task.num_samples}
    (path.parent / f".tmp-left-by-a-kill-{path.name}").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ShardError, match="not complete"):
        read_rationales(tmp_path, "train")
    close_output(tmp_path, files=files, summary={})
    assert read_rationales(tmp_path, "train") == {qid: f"r{qid}\u2028" for qid in reader.qids}
    rationales = RationaleReader(tmp_path, "train")
    for sample in (63, 0, 25, 26):
        assert rationales.text(*reader.place(sample), reader.qid(sample)) == f"r{reader.qid(sample)}\u2028"
    with pytest.raises(ShardError, match="question other of split 'train' has no rationale"):
        rationales.text(0, 3, "other")
    path.write_bytes(path.read_bytes().replace(b"r", b"R", 1))
    with pytest.raises(ShardError, match="not what was written"):
        read_rationales(tmp_path, "train")


def test_outputs_of_another_model_are_not_mixed(tmp_path):
    open_output(tmp_path, {"model": "a"})
    with pytest.raises(ShardError, match="model = 'a', now it is 'b'"):
        open_output(tmp_path, {"model": "b"})


def test_lengths_are_the_same_from_one_process_and_from_several(tiny_settings, tiny_data, monkeypatch):
    from launcher.stages import token_lengths as lengths

    monkeypatch.setattr(lengths, "_CHUNK", 20)
    whose = lengths.LengthsOf(tiny_settings, "rationale", "train", str(tiny_data.path), None)
    alone, shared = (lengths.count_lengths(whose, whose.open(), processes=processes) for processes in (1, 2))
    assert alone.keys() == shared.keys() and all(
        (alone[name] == shared[name]).all() and len(alone[name]) == 64 for name in alone
    )
    assert alone["source"].min() > 10 and len(set(alone["source"])) > 5


def test_what_a_killed_build_left_is_cleared_by_the_next(tiny_settings, tmp_path, monkeypatch):
    from launcher.data import build as data
    from launcher.data import dataset as source

    monkeypatch.chdir(tmp_path)
    settings = tiny_settings.model_copy(update={"data": tiny_settings.data.model_copy(update={"shards_dir": "shards"})})
    with monkeypatch.context() as patch:
        patch.setattr(source, "commit_folder", lambda staging, folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data(settings, lambda line: None)
    commit_bytes(tmp_path / "shards" / "text" / ".tmp-0123456789ab-train-000000.tar", b"half")
    assert [path.name for path in tmp_path.glob(".staging-*")]
    data.prepare_data(settings, lambda line: None)
    assert not [path for pattern in (".tmp-*", ".staging-*") for path in tmp_path.rglob(pattern)]


def test_features_that_were_interrupted_go_on_at_the_missing_shard_and_give_the_same_manifest(tiny_data, tmp_path):
    shards_dir = tmp_path / "shards"
    shutil.copytree(tiny_data.path / "text", shards_dir / "text")

    def arrays_of(problems, counts):
        for problem in problems:
            counts["num_with_features"] += 1
            yield np.full((1, 2), int(problem.qid), dtype=np.float16)

    def features_of(problem, counts):
        return next(arrays_of([problem], counts))

    whole = write_feature_shards(shards_dir, name="whole", features_of=features_of, shape=(1, 2))
    first, *others = missing_feature_shards(shards_dir, name="parts")
    write_feature_shard(shards_dir, name="parts", shard=first, arrays_of=arrays_of)
    tar = shards_dir / "features" / "parts" / f"{first.name}.tar"
    before = tar.stat().st_mtime_ns
    assert missing_feature_shards(shards_dir, name="parts") == others
    parts = write_feature_shards(shards_dir, name="parts", features_of=features_of, shape=(1, 2))
    assert tar.stat().st_mtime_ns == before and parts["counts"] == whole["counts"]
    assert [shard["sha256"] for shard in parts["shards"]] == [shard["sha256"] for shard in whole["shards"]]
