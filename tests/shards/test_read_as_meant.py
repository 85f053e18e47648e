"""What a data set holds is read as it was meant, or refused: never another answer, nor a field lost unsaid."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.errors import ShardError
from data_shards.indexed_tars import index_tars, pictures_in_tars
from data_shards.reader import SplitReader
from data_shards.sources.csv_answers import with_indices
from data_shards.sources.folder_files import split_files
from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import PictureError, open_picture
from mmcot.errors import InputError
from mmcot.torch_files import TorchFileError, read_torch_file

ROW = {"question": "How many?", "choices": ["1", "2", "3", "4"], "split": "train"}


def table(tmp_path, rows):
    rows = [{**ROW, "qid": f"q{number}", **row} for number, row in enumerate(rows)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "in.jsonl"


def answers(path):
    return [sample.answer for sample in read_questions(path).problems["train"]]


def test_texts_that_equal_choices_are_these_choices_and_integers_are_indices(tmp_path):
    assert answers(table(tmp_path, [{"answer": "1"}, {"answer": "2"}, {"answer": "4"}])) == [0, 1, 3]
    assert answers(table(tmp_path, [{"answer": 1}, {"answer": 2}])) == [1, 2]


def test_texts_of_which_some_are_choices_and_others_indices_are_refused_with_both(tmp_path):
    path = table(tmp_path, [{"answer": "0"}, {"answer": "1"}])
    with pytest.raises(
        InputError, match=r"in.jsonl: the answer '0' \(line 1\) is an index .* '1' \(line 2\) is a text"
    ):
        read_questions(path)
    mixed = [{"choices": ["C", "B", "A"], "answer": "A"}, {"choices": ["x", "y"], "answer": "B"}]
    with pytest.raises(InputError, match="may be|would be another"):
        read_questions(table(tmp_path, mixed))


def test_an_answer_that_two_choices_have_is_refused(tmp_path):
    with pytest.raises(InputError, match="line 1: the answer 'yes' is 2 of the choices"):
        read_questions(table(tmp_path, [{"choices": ["yes", "yes", "no"], "answer": "yes"}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", " "]}, "one of the choices .* is empty"),
        ({"hint": 0}, "'hint' is 0; expected a text"),
        ({"lecture": False}, "'lecture' is False; expected a text"),
        ({"caption": {}}, "'caption' is {}; expected a text"),
        ({"split": 0}, "split 0 is unknown"),
        ({"split": []}, r"split \[\] is unknown"),
        ({"image": "data:image/png;base64," + "A" * 9000}, "'data:image.{0,60} is an address; save it as a file"),
        ({"image": "https://example.com/a.png"}, "is an address; save it as a file"),
    ],
)
def test_a_value_of_another_type_is_refused_though_it_is_empty_or_zero(tmp_path, row, message):
    with pytest.raises(InputError, match=f"in.jsonl, line 1: .*{message}") as error:
        read_questions(table(tmp_path, [{"answer": 0, **row}]))
    assert len(str(error.value)) < 600


def test_fields_of_another_kind_are_counted(tmp_path):
    notes = read_questions(table(tmp_path, [{"answer": 0, "answers": ["x"], "text": ""}, {"answer": 1}])).notes
    assert "note: the field 'answers' of 1 row is not used, it is none of a sample of the kind 'choices'" in notes


def test_a_row_of_another_split_than_its_file_is_refused(tmp_path):
    table(tmp_path, [{"answer": 0}]).rename(tmp_path / "val.jsonl")
    with pytest.raises(InputError, match=r"val.jsonl, line 1: .* its split is 'train', and the file is of 'val'"):
        read_questions(tmp_path)


def test_digits_of_any_length_are_an_index_or_none():
    rows = [
        (2, {"answer": "00000000099", "choices": ["00000000099", "b"]}),
        (3, {"answer": "b", "choices": ["a", "b"]}),
    ]
    assert [row["answer"] for _, row in with_indices(rows)[0]] == [0, 1]
    assert with_indices([(2, {"answer": "01", "choices": ["a", "b"]})])[0][0][1]["answer"] == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-30000000.jsonl"], "of which 29,999,999 are missing, such as train-00001-of-30000000.jsonl"),
        (["train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl"], "part 2 is beyond a set of 2"),
    ],
)
def test_a_set_that_is_not_whole_is_refused_at_once(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        split_files(tmp_path, (".jsonl",))


@pytest.mark.parametrize(("white", "over"), [(1.0, 1.0001), (255.0, 255.5), (65_535.0, 65_600.0)])
def test_floats_a_little_above_white_keep_their_levels(tmp_path, white, over):
    levels = np.linspace(0, white, 256, dtype=np.float32).reshape(16, 16)
    levels[-1, -1] = over
    Image.fromarray(levels).save(tmp_path / "a.tif")
    grey = np.asarray(open_picture(tmp_path / "a.tif", name="a.tif"))[..., 0].astype(int)
    assert np.abs(grey.ravel() - np.arange(256)).max() <= 1


def test_a_tensor_file_with_altered_bytes_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(torch.arange(4000.0), path)
    with zipfile.ZipFile(path) as file:
        info = next(info for info in file.infolist() if info.file_size >= 16_000)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 8000 : info.header_offset + 8020] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(TorchFileError, match=r"a\.pth: the bytes of .* were altered; download it again"):
        read_torch_file(path, "one tensor")


def csv_table(tmp_path, text):
    (tmp_path / "in.csv").write_text(text, newline="")
    return tmp_path / "in.csv"


def test_rows_behind_a_stray_quote_are_not_taken_for_a_text(tmp_path):
    text = 'qid,question,choices,answer\nq1,"Which?,a|b,0\nq2,What?,a|b,1\nq3,What is 5",a|b,1\n'
    with pytest.raises(InputError, match="in.csv, line 2: .* looks like another row, 'q2,What"):
        read_questions(csv_table(tmp_path, text))
    whole = 'qid,question,choices,answer\nq1,"Which,\nof these, if any?",a|b,A\n'
    (only,) = [s for part in read_questions(csv_table(tmp_path, whole)).problems.values() for s in part]
    assert only.question == "Which,\nof these, if any?"


@pytest.mark.parametrize(
    "text",
    [
        'qid, question, choices, answer\nq1, "Which, then?", "a|b", A\n',
        'qid,question,choices,answer\rq1,"Which, then?",a|b,A\r',
        'sep=;,,\nqid;question;choices;answer\nq1;"Which, then?";a|b;A\n',
    ],
)
def test_blanks_old_line_ends_and_padding_of_spreadsheets_change_no_text(tmp_path, text):
    (only,) = [s for part in read_questions(csv_table(tmp_path, text)).problems.values() for s in part]
    assert (only.qid, only.question, only.choices, only.answer) == ("q1", "Which, then?", ("a", "b"), 0)


def scienceqa(tmp_path, splits, **files):
    problem = {"question": "Hot?", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "problems.json").write_text(json.dumps({qid: {**problem, **files.get("more", {})} for qid in "123"}))
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    if "captions" in files:
        (tmp_path / "captions.json").write_text(json.dumps({"captions": files["captions"]}))
    return tmp_path


def test_splits_of_scienceqas_layout_have_the_names_that_tables_may_have(tmp_path):
    read = read_questions(scienceqa(tmp_path, {"Train": ["1"], "validation": ["2"], "test": ["3"]}))
    assert [sample.qid for sample in read.problems["val"]] == ["2"] and read.notes == ()


def test_a_question_in_two_splits_is_told_with_both(tmp_path):
    with pytest.raises(InputError, match=r"pid_splits.json: question '1' is in 'train' and in 'test'; keep it"):
        read_questions(scienceqa(tmp_path, {"train": ["1"], "val": ["2"], "test": ["3", "1"]}))


def test_captions_of_unknown_questions_and_unused_fields_of_problems_are_counted(tmp_path):
    splits = {"train": ["1"], "val": ["2"], "test": ["3"]}
    notes = read_questions(scienceqa(tmp_path, splits, captions={"99": "x"}, more={"img": "a.png"})).notes
    assert "note: captions.json has captions of 1 unknown questions, which are left out" in notes
    assert any(note.startswith("note: the field 'img' of 3 rows is not used; did you mean 'image'?") for note in notes)


def saved(tmp_path, columns, features=None):
    import datasets

    columns = {"question": ["Hot?"] * 2, "choices": [["a", "b"]] * 2, **columns}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    return read_questions(tmp_path / "saved")


def test_a_saved_data_set_of_one_part_has_the_splits_of_its_column(tmp_path):
    read = saved(tmp_path, {"qid": ["x", "y"], "answer": [0, 1], "split": ["validation", "train"]})
    assert [sample.qid for sample in read.problems["val"]] == ["x"]


def test_empty_ids_of_a_saved_data_set_are_made_and_counted(tmp_path):
    notes = saved(tmp_path, {"qid": ["", "y"], "answer": [0, 1]}).notes
    assert any(note.startswith("1 rows without a qid got") for note in notes)


def test_a_class_with_a_name_is_the_choice_of_that_name(tmp_path):
    import datasets

    kinds = datasets.Features(
        {
            "question": datasets.Value("string"),
            "choices": datasets.Sequence(datasets.Value("string")),
            "qid": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["b", "a"]),
        }
    )
    read = saved(tmp_path, {"qid": ["x", "y"], "answer": [0, 1]}, kinds)
    assert [sample.answer for sample in read.problems["train"]] == [1, 0]


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def colour(name):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), name).save(stream, "PNG")
    return stream.getvalue()


def test_a_question_of_a_tar_has_the_pictures_that_it_names(tmp_path):
    row = {"question": "Hot?", "choices": ["a", "b"], "answer": 0}
    members = [
        ("a.json", json.dumps({**row, "image": "a.1.png"}).encode()),
        ("a.0.png", colour("red")),
        ("a.1.png", colour("lime")),
        ("b.json", json.dumps({**row, "image": ["x.png", "y.png"]}).encode()),
        ("b.png", colour("blue")),
    ]
    said: list[str] = []
    index_tars({"train": [tar_of(tmp_path / "t.tar", members)]}, tmp_path / "out", report=said.append)
    samples = {sample.qid: sample for sample in map(SplitReader(tmp_path / "out", "train").problem, range(2))}
    pictures = pictures_in_tars(tmp_path / "out")
    assert pictures(samples["a"]) == [colour("lime")]
    assert pictures(samples["b"]) == [colour("blue"), Path("not-in-its-tar/y.png")]


def test_two_members_of_one_name_are_refused(tmp_path):
    row = json.dumps({"question": "Hot?", "choices": ["a", "b"], "answer": 0}).encode()
    path = tar_of(tmp_path / "t.tar", [("a.json", row), ("a.png", colour("red")), ("x/a.png", colour("lime"))])
    with pytest.raises(ShardError, match=r"the question 'a' has two members ending in \.png"):
        index_tars({"train": [path]}, tmp_path / "out", report=print)


@pytest.mark.parametrize("features", ["../text", "..", ".", "", "/tmp/x", "a/b"])
def test_features_of_tars_have_a_name_and_no_path(tmp_path, features):
    with pytest.raises(InputError, match="is no name for a folder"):
        index_tars({"train": []}, tmp_path / "out", features=features)


def test_indexing_into_a_folder_of_shards_leaves_them_alone(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="has shards of another origin, which would be lost"):
        index_tars({"train": [tmp_path / "none.tar"]}, tmp_path)
    assert (tmp_path / "text" / "manifest.json").read_text() == "{}"


def test_what_a_tar_says_and_is_not_used_is_told(tmp_path):
    row = {"question": "Hot?", "choices": ["a", "b"], "answer": 0, "split": "test", "img": "x"}
    members = [("a.json", json.dumps(row).encode()), ("a.txt", b"x"), ("a.npy", b"x")]
    said: list[str] = []
    index_tars({"train": [tar_of(tmp_path / "t.tar", members)]}, tmp_path / "out", report=said.append)
    text = "\n".join(said)
    for part in ("'test' in a.json; the given", "ending in .txt", "--features NAME", "the field 'img' of 1 row"):
        assert part in text, text


def test_a_pointer_in_place_of_a_tar_or_picture_is_named(tmp_path):
    path = tmp_path / "t.tar"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")
    with pytest.raises(ShardError, match="t.tar is a Git LFS pointer .* `git lfs pull`"):
        index_tars({"train": [path]}, tmp_path / "out", report=print)
    with pytest.raises(PictureError, match="t.tar is a Git LFS pointer"):
        open_picture(path, name="t.tar")
