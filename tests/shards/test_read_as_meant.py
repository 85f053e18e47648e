"""What a data set holds is read as it was meant, or refused: never another answer, nor a field lost unsaid."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.sources.csv_answers import with_indices
from data_shards.sources.folder_files import split_files
from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import open_picture
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
