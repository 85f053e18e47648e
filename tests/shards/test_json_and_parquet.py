"""Tables in .json and .parquet: the same questions as in .jsonl, values as they are typed, and files that are none."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_shards.sources.folder_files import split_files
from data_shards.sources.forms import read_questions
from data_shards.sources.parquet_rows import RowsByNumber
from data_shards.sources.table_rows import SUFFIXES
from launcher.config.loading import load_settings
from launcher.data.build import prepare_data
from mmcot.errors import FaultsError, InputError

ROW = {"qid": "a1", "question": "Which is bigger?", "choices": ["sun", "moon"], "answer": "sun", "split": "train"}
ROWS = [ROW | {"qid": f"q{number}", "answer": ["sun", 1, "B"][number], "hint": "x" * number} for number in range(3)]
TYPED = [row | {"answer": number} for number, row in zip((0, 1, 1), ROWS, strict=True)]  # a column has one type
WITHOUT_SPLIT = {key: value for key, value in ROW.items() if key != "split"}


def write(path, rows):
    """Write a table in the form that its name tells."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def png(grey, size=8):
    stream = io.BytesIO()
    Image.new("L", (size, size), grey).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_table_gives_the_same_questions_as_a_jsonl(tmp_path, suffix):
    jsonl = read_questions(write(tmp_path / "q.jsonl", ROWS))
    assert read_questions(write(tmp_path / f"q{suffix}", TYPED if suffix == ".parquet" else ROWS)).problems == (
        jsonl.problems
    )


@pytest.mark.parametrize("name", ["q.csv", "q.parquet", "q.jsonl"])
def test_an_answer_that_is_left_empty_is_unknown_and_counted_as_such(tmp_path, name):
    rows = [WITHOUT_SPLIT | {"answer": 0, "split": "train"}, ROW | {"qid": "t", "answer": None, "split": "test"}]
    if name == "q.csv":
        (tmp_path / name).write_text("qid,question,choices,answer,split\na1,Which?,a|b,a,train\nt,Which?,a|b,,test\n")
    else:
        write(tmp_path / name, rows)
    assert "1 questions of test have no answer and are left out" in read_questions(tmp_path / name).notes


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_folder_may_have_a_file_or_a_set_of_them_a_split(tmp_path, suffix):
    for name in (f"train-00000-of-00002{suffix}", f"train-00001-of-00002{suffix}", f"val{suffix}", "test.jsonl"):
        write(tmp_path / name, [WITHOUT_SPLIT | {"qid": name.partition(".")[0]}])
    problems = read_questions(tmp_path).problems
    assert {split: [problem.qid for problem in part] for split, part in problems.items()} == {
        "train": ["train-00000-of-00002", "train-00001-of-00002"],
        "val": ["val"],
        "test": ["test"],
    }


def test_other_json_beside_tables_is_no_data_and_not_said(tmp_path):
    write(tmp_path / "train.json", [WITHOUT_SPLIT])
    for name in ("results.json", "notes.json", "vocab.json"):
        (tmp_path / name).write_text("{}")
    questions = read_questions(tmp_path)
    assert len(questions.problems["train"]) == 1 and questions.notes == ()


def test_scienceqas_folder_with_a_train_json_in_it_is_still_scienceqas(tmp_path):
    write(tmp_path / "problems.json", {"7": ROW | {"answer": 0}})
    write(tmp_path / "pid_splits.json", {"train": ["7"]})
    write(tmp_path / "train.json", [ROW])
    assert [problem.qid for problem in read_questions(tmp_path).problems["train"]] == ["7"]


def test_parts_of_the_hub_with_a_hash_in_their_names_are_a_set(tmp_path):
    for name in ("train-00000-of-00002-0123456789abcdef", "train-00001-of-00002-fedcba9876543210"):
        write(tmp_path / f"{name}.parquet", [WITHOUT_SPLIT | {"qid": name[6:11]}])
    assert [problem.qid for problem in read_questions(tmp_path).problems["train"]] == ["00000", "00001"]
    write(tmp_path / "train-00000-of-00002-aaaaaaaaaaaaaaaa.parquet", [WITHOUT_SPLIT])
    with pytest.raises(InputError, match="are the same part of a set; keep one"):
        split_files(tmp_path, SUFFIXES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": {"question": "q"}, "2": {}}', r"q\.json: it is objects by key \('1', '2'\); give each object its key"),
        ('{"qid": ["a"], "question": ["q"]}', r'it is lists of values by column .*orient="records"'),
        ('{"data": [], "n": 1}', "it is one object with 'data', 'n'; expected an array of objects, one a row"),
        ("3", "it is '3'; expected an array of objects"),
        ('{"qid": "a"}\n{"qid": "b"}\n', r"it has one object a line; name it q\.jsonl"),
        ("", "no valid JSON"),
        ('[{"qid": "a"},\n{"qid": "b", "answer": NaN}]', "line 2: NaN is no value of JSON"),
        ('[{"qid": "a"},\n{"qid": "b", "qid": "c"}]', "line 2: the key 'qid' occurs more than once"),
        (r'[{"question": "x\ud83d"}]', "half of a UTF-16 pair"),
    ],
)
def test_a_json_file_that_is_no_array_of_objects_is_told_what_it_is(tmp_path, text, message):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "q.json")


def test_faults_of_an_array_have_their_rows_counted_from_0(tmp_path):
    write(tmp_path / "q.json", [ROW, ROW, [1], ROW | {"qid": "b", "answer": 9}])
    with pytest.raises(FaultsError) as error:
        read_questions(tmp_path / "q.json")
    assert [fault.member for fault in error.value.faults] == ["row 1", "row 2", "row 3"]
    assert "the id 'a1' is also that of row 0" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qid": decimal.Decimal("1.50")}, r"row 0: the field 'qid' is Decimal\('1.50'\); expected a text or an int"),
        ({"qid": datetime.date(2024, 1, 1)}, "the field 'qid' is datetime.date"),
        ({"qid": 1.0}, "the field 'qid' is 1.0"),
        ({"qid": None}, "the field 'qid' is missing"),
        ({"answer": None}, "the answer is missing"),
        ({"answer": 1.0}, "answer 1.0 is no index"),
        ({"question": b"q"}, "the field 'question' is b'q'; expected a text"),
    ],
)
def test_a_value_of_another_type_is_refused_by_row(tmp_path, change, message):
    row = ROW | change
    schema = {"qid": pa.string()} if row["qid"] is None else {}
    schema |= {"answer": pa.int8()} if row["answer"] is None else {}
    table = pa.table({name: pa.array([value], schema.get(name)) for name, value in row.items()})
    with pytest.raises(InputError, match=message):
        read_questions(write(tmp_path / "q.parquet", table))


def test_categories_small_integers_and_nulls_are_read_as_what_they_are(tmp_path):
    table = pa.table(
        {
            "qid": pa.array([7, 8], pa.uint8()),
            "question": pa.array(["Which?", "Which?"]).dictionary_encode(),
            "choices": pa.array([["a", "b"], ["c", "d"]], pa.large_list(pa.large_string())),
            "answer": pa.array([1, 0], pa.int16()),
            "hint": pa.array([None, "h"]),
            "split": ["train", "train"],
        }
    )
    first, second = read_questions(write(tmp_path / "q.parquet", table)).problems["train"]
    assert (first.qid, first.answer, first.hint, second.hint) == ("7", 1, "", "h")


def test_rows_of_parquet_without_a_column_of_ids_get_split_and_position(tmp_path):
    row = {key: value for key, value in WITHOUT_SPLIT.items() if key != "qid"}
    write(tmp_path / "train-00000-of-00002.parquet", [row, row])
    write(tmp_path / "train-00001-of-00002.parquet", [row])
    questions = read_questions(tmp_path)
    assert [problem.qid for problem in questions.problems["train"]] == ["train-0", "train-1", "train-2"]
    assert questions.notes == ("3 rows without a qid got their split and position as one, such as train-0",)


def test_columns_that_are_not_used_are_counted_and_not_read(tmp_path):
    table = pa.Table.from_pylist([row | {"embedding": [0.5] * 9, "picture": "x"} for row in TYPED])
    notes = read_questions(write(tmp_path / "q.parquet", table)).notes
    assert notes == (
        "note: the field 'embedding' of 3 rows is not used",
        "note: the field 'picture' of 3 rows is not used; did you mean 'image'?",
    )


def test_a_column_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 2, ["qid", "qid"])
    with pytest.raises(InputError, match="q.parquet: the column 'qid' occurs more than once"):
        read_questions(write(tmp_path / "q.parquet", table))


HELD = {"bytes": png(0), "path": "x/0.png"}


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.png", ["a.png"]),
        (["a.png", "b.png"], ["a.png", "b.png"]),
        (HELD, [png(0)]),
        ([HELD, {"bytes": png(9), "path": None}], [png(0), png(9)]),
        ({"bytes": None, "path": "a.png"}, ["a.png"]),
        (png(5), [png(5)]),
        ([HELD, {"bytes": None, "path": "b.png"}], [png(0), "b.png"]),
    ],
)
def test_a_picture_is_a_name_or_the_bytes_in_the_row(tmp_path, image, expected):
    questions = read_questions(write(tmp_path / "q.parquet", [ROW | {"image": image, "answer": 0}]))
    (sample,) = questions.problems["train"]
    found = questions.pictures(sample)
    assert found == [each if isinstance(each, bytes) else tmp_path / each for each in expected]
    assert (sample.qid in questions.held) == all(isinstance(each, bytes) for each in expected)


def test_a_document_holds_its_pictures_too(tmp_path):
    parts = [{"text": None, "image": HELD}, {"text": "A map.", "image": None}]
    questions = read_questions(write(tmp_path / "q.parquet", [{"qid": "d", "document": parts, "split": "train"}]))
    (sample,) = questions.problems["train"]
    assert sample.kind == "document" and questions.pictures(sample) == [png(0)]


def test_pictures_outside_of_the_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="must be a file name inside the data folder"):
        read_questions(write(tmp_path / "q.parquet", [ROW | {"image": {"bytes": None, "path": "../x.png"}}]))


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_rows_are_found_again_in_any_order_whatever_the_groups(tmp_path, group):
    table = pa.Table.from_pylist([{"image": str(number)} for number in range(300)])
    pq.write_table(table, tmp_path / "q.parquet", row_group_size=group)
    rows = RowsByNumber(tmp_path / "q.parquet", ["image", "document"])
    order = [*range(0, 300, 7), 299, 0, 150, 149, *range(299, 0, -50)]
    assert [rows[number]["image"] for number in order] == list(map(str, order))


def test_pictures_in_parquet_become_features(tmp_path):
    rows = [
        ROW | {"qid": f"{split}{number}", "split": split, "answer": 0, "image": {"bytes": png(number), "path": None}}
        for split in ("train", "val", "test")
        for number in range(3)
    ]
    path = write(tmp_path / "q.parquet", rows)
    settings = load_settings(
        preset="demo",
        overrides=[f"data.path={path}", f"data.shards_dir={tmp_path / 'out'}", f"data.cache_dir={tmp_path / 'cache'}"],
    )
    folder = prepare_data(settings, lambda line: None)
    assert folder.features and folder.features["counts"]["train"]["num_with_features"] == 3
    assert prepare_data(settings, lambda line: None).text == folder.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"q\.parquet: it is empty \(0 bytes\), expected a Parquet file; download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            "it is a Git LFS pointer, .*git lfs pull",
        ),
        (b'{"qid": "a1"}\n', r"it is a text that starts with b'\{\"qid\".*give it the ending of what it is"),
        (b"PK\x03\x04\x00\x01", "it is a file of another kind that starts with"),
        ("cut", "it is cut off: 600 bytes of a Parquet file without its end"),
        ("damaged", "it is a damaged Parquet file"),
    ],
)
def test_a_file_that_is_no_parquet_is_told_once_for_what_it_is(tmp_path, content, message):
    path = write(tmp_path / "q.parquet", TYPED * 1)
    whole = path.read_bytes()
    if content == "cut":
        content = whole[:600]
    elif content == "damaged":
        content = whole[:4] + b"\xff" * 400 + whole[404:]
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_questions(path)
    assert error.value.file == str(path) and not isinstance(error.value, FaultsError)
    assert not re.search(r"\n", str(error.value))
