"""Files that a disk, an editor or a wrong copy has changed are named, never used."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.atomic_files import commit_json, read_json
from data_shards.check import check_shards
from data_shards.errors import ShardError
from data_shards.generated_texts import Task, close_output, open_output, reason_to_write_again, write_task
from data_shards.manifest import read_manifest
from data_shards.rationale_reader import read_rationales
from data_shards.reader import SplitReader
from data_shards.sealed_json import broken_seal, commit_sealed, sealed
from data_shards.sources.forms import read_questions
from data_shards.writer import write_text_shards

TASK = Task("val", "val-000000", 0, 2)
LINES = [{"qid": qid, "rationale": "because", "num_tokens": 2, "finish": "eos"} for qid in ("a", "b")]


@pytest.fixture
def copied_shards(tiny_data, tmp_path):
    shutil.copytree(tiny_data.path, tmp_path / "shards")
    return tmp_path / "shards"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
)


@given(st.dictionaries(st.text(min_size=1), VALUES, max_size=5), st.text(min_size=1), VALUES)
def test_a_sealed_object_knows_any_change_of_a_value(content, key, value):
    whole = sealed(content)
    assert broken_seal(whole) is None and sealed(whole) == whole
    changed = {**whole, key: value}
    assert (broken_seal(changed) is None) == (changed == whole)


def test_an_altered_manifest_of_shards_is_refused_by_name(copied_shards):
    path = copied_shards / "text" / "manifest.json"
    manifest = read_json(path)
    manifest["num_samples"]["train"] -= 1
    commit_json(path, manifest)
    with pytest.raises(ShardError, match=r"text/manifest.json cannot be used: .* it was altered; restore it, or build"):
        read_manifest(copied_shards / "text")


def test_an_index_that_was_altered_or_is_of_another_tar_is_refused(copied_shards):
    index = copied_shards / "features" / "patch" / "train-000001.parquet"
    other = index.with_name("train-000000.parquet")
    before = index.read_bytes()
    for data in (before[:-9] + bytes([before[-9] ^ 1]) + before[-8:], other.read_bytes()):
        index.write_bytes(data)
        with pytest.raises(ShardError, match="train-000001.parquet is not the index that was written"):
            list(SplitReader(copied_shards, "train", features="patch").qids)
            list(check_shards(copied_shards))


def test_an_older_tar_with_its_own_index_is_refused(copied_shards, workplace, tmp_path):
    source = next(workplace.glob("mini_sqa-source-*"))
    write_text_shards(read_questions(source), tmp_path / "older", samples_per_shard=16)
    for suffix in (".tar", ".parquet"):
        shutil.copy(tmp_path / "older" / "text" / f"train-000001{suffix}", copied_shards / "text")
    with pytest.raises(ShardError, match="train-000001.parquet is not the index that was written"):
        SplitReader(copied_shards, "train").problem(30)


def test_shards_of_an_earlier_version_have_no_sha256_of_indexes_and_are_read(copied_shards):
    path = copied_shards / "text" / "manifest.json"
    manifest = read_json(path)
    for shard in manifest["shards"]:
        del shard["index_sha256"]
    commit_json(path, sealed(manifest))
    assert SplitReader(copied_shards, "train").problem(0).question


# Texts of a step that is not finished


def entry_of(texts):
    return texts / "ledger" / "val" / "000000-000000.json"


@pytest.fixture
def texts(tmp_path):
    open_output(tmp_path, {"model": "1"})
    write_task(tmp_path, TASK, LINES)
    return tmp_path


def reason(texts, qids=("a", "b")):
    return reason_to_write_again(texts, TASK, qids)


def test_a_committed_file_is_taken_by_its_sha256_and_its_questions(texts):
    assert reason(texts) is None
    assert "texts of other questions" in reason(texts, ("a", "c"))
    path = texts / TASK.file_name
    path.write_text(path.read_text().replace("because", "BECAUSE"))
    assert "its sha256 is" in reason(texts)


def test_a_file_without_a_record_is_written_again(texts):
    shutil.rmtree(texts / "ledger")
    assert "no record of its sha256" in reason(texts)


@pytest.mark.parametrize("key", ["sha256", "num_samples", "weights", "seed", "texts"])
def test_an_altered_entry_of_the_ledger_is_named_and_its_file_written_again(texts, key):
    entry = read_json(entry_of(texts))
    entry[key] = {"sha256": "0" * 64, "num_samples": 1, "weights": "0" * 64, "seed": 1, "texts": [["a", 0]]}[key]
    commit_json(entry_of(texts), entry)
    assert "it was altered; delete it and val/000000-000000.jsonl, and run again" in reason(texts)


def test_an_entry_of_other_candidates_is_not_that_of_the_file(texts):
    entry = read_json(entry_of(texts))
    commit_sealed(entry_of(texts), entry | {"texts": [["a", 0], ["a", 1], ["b", 0]]})
    assert reason(texts) == "its entry in the ledger is of other texts"


def test_an_entry_of_an_earlier_version_has_no_list_of_texts_and_is_taken(texts):
    entry = read_json(entry_of(texts))
    commit_json(entry_of(texts), {name: entry[name] for name in ("sha256", "num_samples")})
    assert reason(texts) is None


def test_the_manifest_of_complete_texts_has_the_sha256s_beside_the_ledger_and_verifies_itself(texts):
    sha256 = read_json(entry_of(texts))["sha256"]
    close_output(texts, files={TASK.file_name: {"sha256": sha256, "num_samples": 2}}, summary={})
    assert entry_of(texts).exists() and reason(texts) is None
    shutil.rmtree(texts / "ledger")  # as earlier versions did
    assert reason(texts) is None
    manifest = read_json(texts / "manifest.json")
    manifest["files"][TASK.file_name]["sha256"] = "0" * 64
    commit_json(texts / "manifest.json", manifest)
    with pytest.raises(ShardError, match="it was altered; restore it, or delete"):
        read_rationales(texts, "val")
