"""A data set is known by its contents: not by names beside it, nor by the times of its files."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from data_shards.atomic_files import commit_json, fingerprint, read_json
from data_shards.reader import SplitReader
from data_shards.sources.pictures import PictureError
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.data import remembered_hashes
from launcher.data.build import prepare_data
from launcher.data.remembered_hashes import sha256_of_files
from mmcot.errors import FaultsError

ROW = {"qid": "a", "question": "Dark?", "choices": ["yes", "no"], "answer": 0, "image": "a.png"}


def picture(path, grey):
    Image.fromarray(np.full((16, 16), grey, np.uint8)).save(path, "BMP")  # of equal size whatever it shows


@pytest.fixture
def tables(tmp_path):
    """A folder with a question and a picture for each split, and the settings that build it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, split in enumerate(("train", "val", "test")):
        row = ROW | {"qid": split, "image": f"{split}.png", "rationale": "It is dark."}
        (folder / f"{split}.jsonl").write_text(json.dumps(row))
        picture(folder / f"{split}.png", 40 * number)
    return folder


def build(folder, tmp_path, *overrides, to_train=False):
    said = []
    settings = load_settings(
        preset="demo",
        overrides=[
            f"data.path={folder}",
            f"data.shards_dir={tmp_path / 'out'}",
            f"data.cache_dir={tmp_path / 'cache'}",
            *overrides,
        ],
    )
    return prepare_data(settings, said.append, to_train=to_train), said


def grown_old(folder):
    """Set the times of files back, as if they had lain there for a while."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 1000, time.time() - 1000))


def test_files_that_are_not_read_change_nothing(tables, tmp_path):
    first, _ = build(tables, tmp_path)
    (tables / "results.json").write_text("{}")
    (tables / "notes.json").mkdir()
    (tables / "old.json").symlink_to("nowhere")
    (tables / ".ipynb_checkpoints").mkdir()
    (tables / ".ipynb_checkpoints" / "train-checkpoint.jsonl").write_text("{}")
    (tables / "train.jsonl~").write_text("{}")
    again, said = build(tables, tmp_path)
    assert again.text == first.text and again.features == first.features and said == []


def test_other_times_change_nothing_and_another_byte_does(tables, tmp_path):
    build(tables, tmp_path)
    grown_old(tables)
    assert build(tables, tmp_path)[1] == []
    text = (tables / "val.jsonl").read_text()
    (tables / "val.jsonl").write_text(text.replace("Dark", "Park"))
    with pytest.raises(SettingsError, match="holds the shards of another data set"):
        build(tables, tmp_path)


@pytest.mark.parametrize("name", ["train.jsonl", "train.png"])
def test_an_unchanged_file_is_not_read_again(tables, tmp_path, monkeypatch, name):
    read = []
    real = remembered_hashes.sha256_of_file
    monkeypatch.setattr(remembered_hashes, "sha256_of_file", lambda path: (read.append(path.name), real(path))[1])
    monkeypatch.setattr(remembered_hashes, "_SETTLED_NS", 0)
    build(tables, tmp_path)
    assert name in read
    read.clear()
    build(tables, tmp_path)
    assert read == []
    (tables / name).write_bytes((tables / name).read_bytes())  # the same content, another time
    build(tables, tmp_path)
    assert read == [name]


def test_hashes_are_right_without_a_cache_and_with_a_damaged_one(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("a")
    expected = sha256_of_files([file], tmp_path / "cache", name=file)
    memory = next(iter((tmp_path / "cache").rglob("*.json")), tmp_path / "cache" / "hashes" / "x.json")
    for content in ("[]", "{", json.dumps({str(file): [1]}), json.dumps({str(file): None})):
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(content)
        assert sha256_of_files([file], tmp_path / "cache", name=file) == expected
    (tmp_path / "file").write_text("")
    assert sha256_of_files([file], tmp_path / "file", name=file) == expected


def features(folder, split):
    return SplitReader(folder.path, split, features="patch").features(0)


def test_a_picture_replaced_by_one_of_equal_size_gets_new_features_and_the_same_texts(tables, tmp_path):
    first, _ = build(tables, tmp_path)
    before, others = features(first, "train"), features(first, "val")
    size = (tables / "train.png").stat().st_size
    picture(tables / "train.png", 200)
    assert (tables / "train.png").stat().st_size == size
    with pytest.raises(SettingsError, match="was made of other pictures .* `mmcot data shard`"):
        build(tables, tmp_path, to_train=True)
    again, said = build(tables, tmp_path)
    assert "have changed: the features patch are made again" in said[0]
    assert again.text == first.text and not np.array_equal(features(again, "train"), before)
    np.testing.assert_array_equal(features(again, "val"), others)


def test_a_feature_of_an_earlier_version_is_known_by_the_sizes_of_its_pictures(tables, tmp_path):
    folder, _ = build(tables, tmp_path)
    path = folder.path / "features" / "patch" / "inputs.json"
    inputs = read_json(path)
    del inputs["picture_contents"]
    facts = [[split, f"{split}.png", (tables / f"{split}.png").stat().st_size] for split in ("train", "val", "test")]
    commit_json(path, {"pictures": fingerprint(facts), **inputs})
    assert build(tables, tmp_path)[1] == []
    picture(tables / "val.png", 7)
    (tables / "val.png").write_bytes((tables / "val.png").read_bytes() + b"more")
    with pytest.raises(SettingsError, match="other pictures"):
        build(tables, tmp_path, to_train=True)


def test_a_folder_of_an_earlier_version_that_listed_more_files_is_the_same_data(tables, tmp_path):
    folder, _ = build(tables, tmp_path)
    path = folder.path / "inputs.json"
    inputs = read_json(path)
    commit_json(path, inputs | {"files": {"results.json": "0" * 64, **inputs["files"]}})
    assert build(tables, tmp_path)[1] == []


def test_a_published_file_is_known_by_its_bytes(tables, tmp_path):
    published = tables / "vision_features"
    published.mkdir()
    array = np.ones((3, 100, 256), np.float32)
    np.save(published / "detr.npy", array)
    (published / "name_map.json").write_text(json.dumps({"train": "0", "val": "1", "test": "2"}))
    build(tables, tmp_path, "data.features=detr")
    shutil.copy(published / "detr.npy", tmp_path / "copy.npy")
    shutil.move(tmp_path / "copy.npy", published / "detr.npy")
    assert build(tables, tmp_path, "data.features=detr")[1] == []
    np.save(published / "detr.npy", array * 2)
    with pytest.raises(SettingsError, match="another data set"):
        build(tables, tmp_path, "data.features=detr")


def test_after_an_unreadable_picture_the_same_shards_continue_with_count(tables, tmp_path):
    (tables / "val.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match="val.png is no picture of a known format"):
        build(tables, tmp_path)
    standing = (tmp_path / "out" / "text" / "manifest.json").read_bytes()
    folder, _ = build(tables, tmp_path, "data.unreadable_pictures=count")
    assert folder.features["counts"]["val"]["num_pictures_unreadable"] == 1
    assert (tmp_path / "out" / "text" / "manifest.json").read_bytes() == standing
    with pytest.raises(SettingsError, match="unreadable_pictures was 'count' and is now 'fail'"):
        build(tables, tmp_path)


def test_where_every_picture_was_read_both_policies_have_the_same_features(tables, tmp_path):
    first, _ = build(tables, tmp_path, "data.unreadable_pictures=count")
    again, said = build(tables, tmp_path)
    assert again.features == first.features and said == []


def test_all_unreadable_pictures_of_a_shard_are_told_together(tables, tmp_path):
    rows = [ROW | {"qid": f"q{number}", "image": f"{number}.png", "split": "train"} for number in range(5)]
    (tables / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number in range(5):
        (tables / f"{number}.png").write_bytes(b"no picture" if number in (1, 4) else (tables / "val.png").read_bytes())
    with pytest.raises(FaultsError, match=r"q1: .*1\.png is no picture(.|\n)*q4: (.|\n)*2 faults in all"):
        build(tables, tmp_path)
    assert not (tmp_path / "out" / "features" / "patch" / "train-000000.tar").exists()


def test_a_removed_split_is_another_data_set(tables, tmp_path):
    build(tables, tmp_path)
    (tables / "test.jsonl").unlink()
    with pytest.raises(SettingsError, match="holds the shards of another data set"):
        build(tables, tmp_path)
