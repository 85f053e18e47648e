"""Forms of data sets: one dict names them, for reading, messages, descriptions and fingerprints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_shards.atomic_files import read_json, sha256_of_file
from data_shards.reader import SplitReader
from data_shards.sources.forms import FORMS, Form, form_of, read_questions
from data_shards.sources.question_set import QuestionSet
from launcher.config.loading import load_settings
from launcher.config.settings import Data, SettingsError
from launcher.data.build import prepare_data
from launcher.data.fingerprints import folder_inputs
from launcher.pipeline.preflight import check_settings
from mmcot.texts.sample import Part, Sample

ROW = {"qid": "a1", "question": "Which is bigger?", "choices": ["sun", "moon"], "answer": 0, "split": "train"}


def settings_of(path, **data):
    overrides = [f"data.path={path}", *(f"data.{name}={value}" for name, value in data.items())]
    return load_settings(preset="demo", overrides=overrides)


def scienceqa_folder(path):
    path.mkdir()
    (path / "problems.json").write_text(json.dumps({"1": ROW}))
    (path / "pid_splits.json").write_text(json.dumps({"train": ["1"]}))
    (path / "captions.json").write_text(json.dumps({"captions": {}}))
    (path / "notes.json").write_text("{}")  # no part of the layout
    return path, ["problems.json", "pid_splits.json", "captions.json"]


def folder_of_tables(path):
    path.mkdir()
    for name in ("train.jsonl", "val.csv", "notes.json"):
        (path / name).write_text(json.dumps(ROW) if name == "train.jsonl" else "")
    (path / "picture.png").write_bytes(b"")
    return path, ["train.jsonl", "val.csv"]


def table(path):
    path = path.with_suffix(".jsonl")
    path.write_text(json.dumps(ROW))
    return path, [path.name]


def saved_data_set(path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])}).save_to_disk(path)
    inner = ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
    return path, ["dataset_dict.json", *(f"train/{name}" for name in inner)]


@pytest.mark.parametrize("make", [scienceqa_folder, folder_of_tables, table, saved_data_set])
def test_a_data_set_is_fingerprinted_by_the_same_files_as_in_earlier_versions(tmp_path, make):
    path, names = make(tmp_path / "mine")
    files = {name: sha256_of_file(path if path.is_file() else path / name) for name in names}
    inputs = folder_inputs(settings_of(path), path)
    assert list(inputs["files"].items()) == list(files.items())
    assert list(inputs) == ["schema_version", "files", "samples_per_shard", "tokenizer_vocab_size", "tokenizer_formats"]


def test_each_form_recognizes_its_own_data_sets_alone(tmp_path):
    makers = {"scienceqa": scienceqa_folder, "hf_dataset": saved_data_set, "tables": table}
    for name, make in makers.items():
        path, _ = make(tmp_path / name)
        assert form_of(path) is FORMS[name] and read_questions(path).problems["train"]


def test_every_place_that_lists_forms_names_them_all(tmp_path):
    with pytest.raises(SettingsError) as absent:
        check_settings(settings_of(tmp_path / "absent"))
    (tmp_path / "odd").mkdir()
    with pytest.raises(ValueError, match="in no known form") as unknown:
        read_questions(tmp_path / "odd")
    places = [str(absent.value), str(unknown.value), Data.model_fields["path"].description]
    assert all(form.label in place for form in FORMS.values() for place in places)


@pytest.fixture
def lines_form(monkeypatch):
    """A form that a user adds: a text file of words, each a document with pictures that are made on the spot."""

    def read(path):
        samples = [
            Sample.of_document(str(n), [Part(image="made"), Part(word)], split=split)
            for n, word in enumerate(path.read_text().split())
            for split in [("train", "val", "test")[n % 3]]
        ]
        problems = {split: [s for s in samples if s.split == split] for split in ("train", "val", "test")}
        return QuestionSet(problems, pictures=lambda sample: [PICTURES[int(sample.qid) % 2]])

    form = Form("a .words file", lambda path: path.suffix == ".words", read, lambda path: [path])
    monkeypatch.setitem(FORMS, "words", form)
    PICTURES[:] = [png(0), png(255)]


PICTURES: list[bytes] = []


def png(grey):
    stream = io.BytesIO()
    Image.new("L", (8, 8), grey).save(stream, "PNG")
    return stream.getvalue()


def test_a_user_s_form_gives_any_kind_and_its_own_pictures(tmp_path, lines_form):
    path = tmp_path / "mine.words"
    path.write_text("dax wug blick")
    settings = settings_of(path, shards_dir=tmp_path / "out")
    folder = prepare_data(settings, lambda line: None)
    reader = SplitReader(folder.path, "train", features="patch")
    assert reader.problem(0).document[-1].text == "dax"
    assert folder.features["counts"]["train"]["num_with_features"] == 1
    assert list(read_json(tmp_path / "out" / "inputs.json")["files"]) == ["mine.words"]
    PICTURES.reverse()
    with pytest.raises(SettingsError, match="was made of other pictures than the data set has now"):
        prepare_data(settings, lambda line: None, to_train=True)


def test_a_form_that_names_no_content_is_refused(tmp_path, lines_form, monkeypatch):
    path = tmp_path / "mine.words"
    path.write_text("dax")
    monkeypatch.setitem(FORMS, "words", Form("words", FORMS["words"].recognizes, FORMS["words"].read, lambda path: []))
    with pytest.raises(SettingsError, match="names no file"):
        folder_inputs(settings_of(path), path)


def test_forms_are_known_without_a_large_library():
    code = "import sys, data_shards.sources.forms\nprint({'numpy', 'pyarrow', 'PIL', 'datasets'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
