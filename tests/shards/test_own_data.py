"""A person's own data on the first day, and every mistake in it met with a sentence that helps."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.check import check_shards
from data_shards.errors import ShardError
from data_shards.indexed_tars import index_tars
from data_shards.manifest import manifest_shards, read_manifest, read_problems
from data_shards.reader import SplitReader
from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import PictureError, open_picture
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.data.build import describe_data, prepare_data
from launcher.data.check import check_data
from launcher.data.describe import describe_questions, description_lines
from mmcot.errors import InputError
from mmcot.texts.sample import SampleError

ROW = {"qid": "a1", "question": "Which is bigger?", "choices": ["sun", "moon"], "answer": "sun", "split": "train"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def png(colour="red", size=(8, 8), **save):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, save.pop("format", "PNG"), **save)
    return stream.getvalue()


@pytest.mark.parametrize("answer", ["sun", 0, "0", "A", "(a)"])
def test_an_answer_may_be_a_text_an_index_or_a_letter(tmp_path, answer):
    questions = read_questions(write_jsonl(tmp_path / "q.jsonl", [{**ROW, "answer": answer}]))
    assert questions.problems["train"][0].answer == 0


def test_context_and_rationale_become_hint_and_solution(tmp_path):
    row = {**ROW, "context": "Far away.", "rationale": "The sun is a star.", "lecture": "Stars are big."}
    problem = read_questions(write_jsonl(tmp_path / "q.jsonl", [row])).problems["train"][0]
    assert (problem.hint, problem.solution, problem.lecture) == ("Far away.", "The sun is a star.", "Stars are big.")


def test_a_csv_gives_the_same_questions_as_a_jsonl(tmp_path):
    rows = [{**ROW, "qid": f"q{n}", "image": [f"{n}.png", "b.png"], "context": 'a "quoted", text'} for n in range(3)]
    jsonl = read_questions(write_jsonl(tmp_path / "q.jsonl", rows))
    lines = ["qid,question,choices,answer,split,image,context"]
    lines += [f'q{n},Which is bigger?,sun|moon,sun,train,{n}.png|b.png,"a ""quoted"", text"' for n in range(3)]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    assert read_questions(tmp_path / "c.csv").problems == jsonl.problems


def test_a_folder_with_a_table_a_split_and_rows_without_a_split(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    row = {key: value for key, value in ROW.items() if key != "split"}
    for name in ("train", "validation", "test"):
        write_jsonl(folder / f"{name}.jsonl", [{**row, "qid": name}])
    problems = read_questions(folder).problems
    assert {split: [p.qid for p in problems[split]] for split in problems} == {
        "train": ["train"],
        "val": ["validation"],
        "test": ["test"],
    }
    divided = read_questions(write_jsonl(tmp_path / "all.jsonl", [{**row, "qid": f"q{n}"} for n in range(200)]))
    assert all(len(divided.problems[split]) > 5 for split in ("train", "val", "test"))
    assert divided.notes == ("200 questions without a split were divided 80:10:10 by their ids",)


def test_a_dataset_saved_to_disk_brings_its_pictures(tmp_path):
    import datasets

    rows = [{**ROW, "image": {"bytes": png(), "path": None}}, {**ROW, "qid": "a2", "image": None}]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("qid", "question", "answer", "split")}
        | {"choices": datasets.List(datasets.Value("string")), "image": datasets.Image()}
    )
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows, features=features)}).save_to_disk(tmp_path / "hf")
    questions = read_questions(tmp_path / "hf")
    first, second = questions.problems["train"]
    assert open_picture(questions.pictures(first)[0], name="a1").size == (8, 8)
    assert list(questions.pictures(second)) == [] and first.answer == 0


def build(tmp_path, rows, *settings):
    rows = [*rows, {**ROW, "qid": "v", "split": "val"}, {**ROW, "qid": "t", "split": "test"}]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    return prepare_data(
        load_settings(
            preset="demo", overrides=[f"data.path={path}", f"data.shards_dir={tmp_path / 'shards'}", *settings]
        ),
        lambda line: None,
    )


def test_patches_of_several_pictures_stand_behind_each_other_up_to_the_limit(tmp_path):
    for number, colour in enumerate(("red", "green", "blue")):
        (tmp_path / f"{number}.png").write_bytes(png(colour))
    rows = [{**ROW, "image": ["0.png", "1.png", "2.png"]}, {**ROW, "qid": "a2", "image": "1.png"}, {**ROW, "qid": "a3"}]
    folder = build(tmp_path, rows, "data.max_pictures=2")
    reader = SplitReader(folder.path, "train", features="patch")
    assert reader.feature_shape == (128, 208)
    assert [reader.features(number).shape[0] for number in range(3)] == [128, 64, 0]
    np.testing.assert_array_equal(reader.features(0)[64:], reader.features(1))
    assert any("1 pictures beyond data.max_pictures (left out)" in line for line in describe_data(folder))


@pytest.fixture
def cut_picture(tmp_path):
    (tmp_path / "cut.png").write_bytes(png(size=(64, 64))[:-30])
    return [{**ROW, "image": "cut.png"}, {**ROW, "qid": "a2", "image": "absent.png"}]


def test_a_picture_that_cannot_be_read_stops_the_build_and_is_named(tmp_path, cut_picture):
    with pytest.raises(PictureError, match=r"question a1: picture .*cut.png is damaged or cut off"):
        build(tmp_path, cut_picture)


def test_pictures_that_cannot_be_read_are_counted_apart_from_absent_ones_if_so_set(tmp_path, cut_picture):
    folder = build(tmp_path, cut_picture, "data.unreadable_pictures=count")
    counts = folder.features["counts"]["train"]
    assert counts["num_pictures_unreadable"] == 1 and counts["num_picture_absent"] == 1
    assert any("1 pictures that could not be read" in line for line in describe_data(folder))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.png", b"", "is an empty file"),
        ("text.png", b"hello", "is no picture of a known format"),
        ("bomb.png", None, "20000 x 20000 pixels|too large"),
    ],
)
def test_a_file_that_is_no_usable_picture_is_named(tmp_path, name, data, message):
    if data is None:
        Image.new("1", (20000, 20000)).save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(PictureError, match=rf"{name}.*({message})"):
        open_picture(tmp_path / name, name=name)


def test_odd_pictures_become_rgb_upright_and_still(tmp_path):
    red = (255, 0, 0)
    palette = Image.new("RGB", (4, 4), red).convert("P")
    palette.save(tmp_path / "palette.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    Image.new("RGB", (1, 1), red).save(tmp_path / "dot.png")
    Image.new("RGB", (4, 4), red).save(tmp_path / "wrong.jpg", "PNG")
    Image.new("RGB", (4, 4), red).save(
        tmp_path / "anim.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")]
    )
    for name in ("palette.png", "cmyk.jpg", "dot.png", "wrong.jpg", "anim.gif"):
        image = open_picture(tmp_path / name, name=name)
        assert image.mode == "RGB" and np.allclose(image.getpixel((0, 0)), red, atol=6), name
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("RGB", (8, 2), red).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg", name="turned.jpg").size == (2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "mars"}, "line 1: answer 'mars' is no index, letter or text of the choices"),
        ({"answer": 7}, "question a1: answer 7 is no index into its 2 choices"),
        ({"answer": None}, "question a1: the answer is missing"),
        ({"choices": ["one"], "answer": 0}, "the number of choices is 1; expected 2 to 26"),
        ({"choices": [str(n) for n in range(30)], "answer": 0}, "the number of choices is 30; expected 2 to 26"),
        ({"qid": "a.1"}, "question id 'a.1' must consist of letters"),
        ({"qid": ""}, "the field 'qid' is missing"),
        ({"image": "../../etc/passwd"}, "must be a file name inside the data folder"),
        ({"image": "/etc/passwd"}, "must be a file name inside the data folder"),
        ({"split": "exam"}, "split 'exam' is unknown"),
        ({"question": " "}, "the field 'question' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_field(tmp_path, change, message):
    with pytest.raises(SampleError, match=message):
        read_questions(write_jsonl(tmp_path / "q.jsonl", [{**ROW, **change}]))


def test_a_repeated_id_and_a_broken_line_are_named(tmp_path):
    with pytest.raises(SampleError, match="q.jsonl, line 2: the id 'a1' is also that of line 1;"):
        read_questions(write_jsonl(tmp_path / "q.jsonl", [ROW, ROW]))
    (tmp_path / "b.jsonl").write_text(json.dumps(ROW) + "\n{oops\n")
    with pytest.raises(InputError, match="b.jsonl, line 2: no valid JSON"):
        read_questions(tmp_path / "b.jsonl")


def test_a_path_in_no_known_form_is_told_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_questions(tmp_path / "none")
    (tmp_path / "odd").mkdir()
    with pytest.raises(ValueError, match=r"in no known form .* expected one of: .*problems.json"):
        read_questions(tmp_path / "odd")


def test_a_field_that_is_not_used_is_counted_with_the_one_that_was_meant(tmp_path):
    rows = [ROW | {"qid": "x", "picture": "x.png"}, ROW | {"qid": "y", "picture": "y.png", "source": "web"}]
    notes = read_questions(write_jsonl(tmp_path / "q.jsonl", rows)).notes
    assert "note: the field 'picture' of 2 rows is not used; did you mean 'image'?" in notes
    assert any(note.startswith("note: the field 'source' of 1 row is not used") for note in notes)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '[\n{"qid": "a"}\n]\n', "line 1: no valid JSON .*; a JSONL file has one object a line"),
        ("a.jsonl", '{"qid": "a", "question": "b", "choices": "c|d", "answer": "c"}', "is the text 'c|d'; give a list"),
        ("a.jsonl", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n", f"line 2: the id {ROW['qid']!r} is also that of line 1"),
    ],
)
def test_a_table_of_another_form_is_told_with_what_is_expected(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        read_questions(tmp_path / name)


def test_data_without_rationales_is_told_before_a_model_learns_to_write_none(tmp_path):
    rows = [ROW | {"qid": split, "split": split} for split in ("train", "val", "test")]
    for row in rows:
        row.pop("rationale", None)
    path, said = write_jsonl(tmp_path / "q.jsonl", rows), []
    overrides = [f"data.path={path}", f"data.shards_dir={tmp_path / 'shards'}", "data.features=null"]
    prepare_data(load_settings(preset="demo", overrides=overrides), said.append)
    assert any("no training question has a rationale" in line and "run.chain=answer" in line for line in said)
    said.clear()
    overrides = [f"data.path={path}", f"data.shards_dir={tmp_path / 'other'}", "data.features=null", "run.chain=answer"]
    prepare_data(load_settings(preset="demo", overrides=overrides), said.append)
    assert not any("has a rationale" in line for line in said)


def test_a_split_without_questions_is_refused_before_anything_is_written(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [ROW])
    settings = load_settings(preset="demo", overrides=[f"data.path={path}", f"data.shards_dir={tmp_path / 'shards'}"])
    with pytest.raises(SettingsError, match=r"q\.jsonl has no question in val and none in test \(1 train"):
        prepare_data(settings, lambda line: None, to_train=True)
    assert not (tmp_path / "shards" / "text").exists()
    prepare_data(settings, lambda line: None)  # `mmcot data shard` alone
    with pytest.raises(SettingsError, match="shards has no question in val and none in test"):
        prepare_data(settings, lambda line: None, to_train=True)


def test_check_finds_repeated_questions_and_leaks_between_splits(tmp_path):
    twin = {"qid": "twin", "question": "Who?", "choices": ["x", "y"], "answer": 0, "split": "train"}
    rows = [twin, {**twin, "qid": "again"}, {**twin, "qid": "leak", "split": "test"}]
    rows += [{**twin, "qid": f"pictured-{split}", "image": "a.png", "split": split} for split in ("train", "val")]
    lines = []
    check_data(build(tmp_path, rows).path, lines.append)
    assert "within train: 1 questions of the same text, no picture, such as twin, again" in lines
    assert "LEAK between test and train: 1 questions of the same text, no picture, such as twin, again, leak" in lines
    assert (
        "LEAK between train and val: 1 questions of the same text, pictures may differ, such as pictured-train, "
        "pictured-val" in lines
    )


def test_check_says_so_where_no_question_comes_twice(tiny_data):
    lines = []
    assert check_data(tiny_data.path, lines.append) == 192 and lines[-1] == "no question comes twice"


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(row):
    return json.dumps(row).encode()


@pytest.fixture
def my_tars(tmp_path):
    """Tars as a person has them: other field names, pictures beside the text."""
    row = {"question": "Which is bigger?", "choices": ["sun", "moon"], "answer": "sun", "context": "Far away."}
    tars = {"train": {}, "val": {}, "test": {}}
    for number, split in enumerate(("train", "train", "val", "test")):
        tars[split] |= {f"q{number}.json": member(row), f"q{number}.png": png()} if number else {"q0.json": member(row)}
    return {split: [write_tar(tmp_path / f"mine-{split}.tar", members)] for split, members in tars.items()}


def test_tars_are_indexed_where_they_lie_and_their_pictures_become_features(tmp_path, my_tars):
    before = {path: path.read_bytes() for paths in my_tars.values() for path in paths}
    index_tars(my_tars, tmp_path / "out")
    settings = load_settings(preset="demo", overrides=[f"data.shards_dir={tmp_path / 'out'}"])
    folder = prepare_data(settings, lambda line: None)
    reader = SplitReader(folder.path, "train", features="patch")
    assert [reader.problem(n).hint for n in range(2)] == ["Far away."] * 2
    assert [reader.features(n).shape for n in range(2)] == [(0, 208), (64, 208)]
    assert sum(count for _, count in check_shards(folder.path)) == 8
    assert {path: path.read_bytes() for path in before} == before and not list(
        (tmp_path / "out" / "text").glob("*.tar")
    )


def test_ready_made_features_in_the_tars_are_used_as_they_are(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    stream = io.BytesIO()
    np.save(stream, array)
    tars = {
        split: [write_tar(tmp_path / f"{split}.tar", {f"{split}.json": member(ROW), f"{split}.npy": stream.getvalue()})]
        for split in ("train", "val", "test")
    }
    index_tars(tars, tmp_path / "out", features="mine")
    reader = SplitReader(tmp_path / "out", "val", features="mine")
    assert reader.feature_shape == (3, 4)
    np.testing.assert_array_equal(reader.features(0), array)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_ready_made_features_that_are_not_finite_are_refused_with_file_and_question(tmp_path, value):
    stream = io.BytesIO()
    np.save(stream, np.array([[1.0, value]], dtype=np.float16))
    tar = write_tar(tmp_path / "mine.tar", {"q7.json": member(ROW), "q7.npy": stream.getvalue()})
    with pytest.raises(ShardError, match=r"mine\.tar, member q7\.npy: features contain NaN or infinite values"):
        index_tars({"train": [tar]}, tmp_path / "out", features="mine")


def test_a_tar_of_the_users_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(ShardError, match="no.tar contains no .json member"):
        index_tars({"train": [write_tar(tmp_path / "no.tar", {"a.png": png()})]}, tmp_path / "out")
    with pytest.raises(InputError, match=r"1.tar, member a.json: the id 'a' is also that of a member of .*0.tar"):
        index_tars(
            {"train": [write_tar(tmp_path / f"{n}.tar", {"a.json": member(ROW)}) for n in range(2)]}, tmp_path / "out"
        )
    with pytest.raises(ShardError, match="'a.pickle' is not of an allowed kind"):
        index_tars({"train": [write_tar(tmp_path / "p.tar", {"a.pickle": b""})]}, tmp_path / "out")


def test_describe_counts_what_is_there_and_what_is_not(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{**ROW, "image": "a.png", "context": "c"}, {**ROW, "qid": "a2", "image": "none.png"}, {**ROW, "qid": "a3"}]
    lines = description_lines(describe_questions(write_jsonl(tmp_path / "q.jsonl", rows)))
    table = {line[:24].strip(): line[24:].split() for line in lines}
    assert table["questions"] == ["3", "3", "0", "0"] and table["with image"] == ["2", "2", "0", "0"]
    assert table["with both"][0] == "1" and table["picture absent"][0] == "1" and table["with neither"][0] == "1"


@pytest.mark.skipif("MMCOT_SCIENCEQA_DIR" not in os.environ, reason="MMCOT_SCIENCEQA_DIR is not set")
def test_the_real_subset_is_described_and_sharded_with_its_absent_pictures_counted(tmp_path):
    source = os.environ["MMCOT_SCIENCEQA_DIR"]
    table = {line[:24].strip(): line[24:].split() for line in description_lines(describe_questions(Path(source)))}
    assert table["questions"] == ["1,218", "507", "361", "350"] and table["with image"] == ["377", "22", "189", "166"]
    settings = load_settings(preset="demo", overrides=[f"data.path={source}", f"data.shards_dir={tmp_path}"])
    folder = prepare_data(settings, lambda line: None)
    counts = folder.features["counts"]
    assert counts["test"]["num_with_features"] == 166 and counts["test"]["num_picture_absent"] == 0
    assert [counts[split]["num_picture_absent"] for split in ("train", "val")] == [22, 189]
    assert folder.ceilings is None
    assert any("no training question has a picture" in line for line in describe_data(folder))


def test_pictures_of_tars_without_an_image_field_are_counted_and_scored_as_pictures(tmp_path):
    row = {"question": "Which is bigger?", "choices": ["sun", "moon"], "answer": "sun"}
    members = {"a.json": member(row), "a.png": png(), "b.json": member(row), "c.json": member(row)}
    members |= {"c.1.png": png(), "c.0.png": png("blue")}
    tars = {split: [write_tar(tmp_path / f"{split}.tar", members)] for split in ("train",)}
    manifest = index_tars(tars, tmp_path / "data", report=lambda line: None)
    assert manifest["counts"]["num_with_image"] == 2
    (shard,) = manifest_shards(read_manifest(tmp_path / "data" / "text"))
    images = {problem.qid: problem.images for problem in read_problems(tmp_path / "data" / "text", shard)}
    assert images == {"a": ("a.png",), "b": (), "c": ("c.0.png", "c.1.png")}
