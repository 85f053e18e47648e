"""Columns with other names: read as our fields in every form that has columns, or refused with those that exist."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_shards.sources.forms import read_questions
from launcher.cli import app
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.data.build import prepare_data
from launcher.data.fingerprints import folder_inputs
from mmcot.errors import InputError

COLUMNS = {"qid": "uid", "question": "text", "choices": "options", "answer": "Label", "image": "img"}
ROWS = [
    {"uid": f"q{n}", "text": "Which?", "options": ["sun", "moon"], "Label": n % 2, "img": "a.png", "source": "web"}
    for n in range(3)
]


def jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def array(path):
    path.write_text(json.dumps(ROWS))


def csv(path):
    lines = [" UID ,text,options,Label,img,source", *(f"q{n},Which?,sun|moon,{n % 2},a.png,web" for n in range(3))]
    path.write_text("\n".join(lines))


def parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def saved(path):
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("uid", "text", "img", "source")}
        | {"options": datasets.List(datasets.Value("string")), "Label": datasets.ClassLabel(names=["sun", "moon"])}
    )
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS, features=features)}).save_to_disk(path)


MAKERS = {"q.jsonl": jsonl, "q.json": array, "q.csv": csv, "q.parquet": parquet, "saved": saved}


@pytest.fixture(params=MAKERS)
def data(request, tmp_path):
    MAKERS[request.param](tmp_path / request.param)
    return tmp_path / request.param


def samples(questions):
    return sorted((sample for part in questions.problems.values() for sample in part), key=lambda sample: sample.qid)


def test_columns_with_other_names_become_our_fields(data):
    questions = read_questions(data, columns=COLUMNS)
    found = [(s.qid, s.question, s.choices, s.answer, s.images) for s in samples(questions)]
    assert found == [(f"q{n}", "Which?", ("sun", "moon"), n % 2, ("a.png",)) for n in range(3)]
    assert "note: the field 'source' of 3 rows is not used" in questions.notes


def test_a_column_that_does_not_exist_is_refused_once_with_those_that_do(data):
    with pytest.raises(InputError, match="no column 'lable' .for answer.; did you mean 'Label'") as error:
        read_questions(data, columns=COLUMNS | {"answer": "lable"})
    message = str(error.value)
    assert "it has " in message and "text, options" in message and "rationale" in message and "\n" not in message


def test_a_column_of_ours_that_is_replaced_is_counted(tmp_path):
    row = {"qid": "a", "question": "Which?", "choices": ["sun", "moon"], "answer": "sun", "gold": 1, "split": "train"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    questions = read_questions(tmp_path / "q.jsonl", columns={"answer": "gold"})
    assert samples(questions)[0].answer == 1
    assert questions.notes == (
        "note: the field 'answer' of 1 row is not used, because data.columns gives it another column",
    )


def test_a_column_by_one_name_replaces_the_other_name_of_the_field(tmp_path):
    row = {"id": "a", "hint": "h", "question": "Which?", "choices": ["sun", "moon"], "answer": 0, "split": "train"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row | {"uid": "b", "story": "s"}))
    (sample,) = samples(read_questions(tmp_path / "q.jsonl", columns={"qid": "uid", "context": "story"}))
    assert (sample.qid, sample.hint) == ("b", "s")


def test_two_columns_may_change_places(tmp_path):
    row = {"qid": "a", "question": "A hint.", "hint": "Which?", "choices": ["a", "b"], "answer": 0, "split": "train"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    (sample,) = samples(read_questions(tmp_path / "q.jsonl", columns={"question": "hint", "hint": "question"}))
    assert (sample.question, sample.hint) == ("Which?", "A hint.")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"qestion": "text"}, "'qestion' is no field; did you mean 'question'"),
        ({"options": "x"}, "'options' is no field; did you mean 'choices'"),
        ({"body": "question"}, "did you mean question: body"),
        ({"question": "text", "hint": "text"}, "question and hint are both of the column 'text'"),
        ({"context": "a", "hint": "b"}, "context and hint are two names of the same field"),
        ({"question": ""}, "data.columns.question is empty"),
    ],
)
def test_a_mapping_that_cannot_be_right_is_refused_with_the_settings(columns, message):
    with pytest.raises(SettingsError, match=message) as error:
        load_settings(preset="demo", overrides=["data.path=x.jsonl", f"data.columns={json.dumps(columns)}"])
    assert "data.columns" in str(error.value)


def test_columns_without_a_data_set_or_of_a_form_without_columns_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"data.path, which is not given"):
        load_settings(preset="demo", overrides=["data.columns.question=text"])
    (tmp_path / "problems.json").write_text("{}")
    with pytest.raises(InputError, match="which has no columns; leave data.columns out"):
        read_questions(tmp_path, columns={"question": "text"})


def settings_of(path, *overrides):
    given = [f"data.path={path}", *(f"data.columns.{field}={column}" for field, column in COLUMNS.items()), *overrides]
    return load_settings(preset="demo", overrides=given)


def test_columns_belong_to_what_a_data_folder_is_made_of_only_where_they_are_given(tmp_path):
    jsonl(tmp_path / "q.jsonl")
    inputs = folder_inputs(settings_of(tmp_path / "q.jsonl"), tmp_path / "q.jsonl")
    assert inputs["columns"] == COLUMNS
    plain = load_settings(preset="demo", overrides=[f"data.path={tmp_path / 'q.jsonl'}"])
    assert "columns" not in folder_inputs(plain, tmp_path / "q.jsonl")


def test_shards_are_built_of_renamed_columns(tmp_path):
    jsonl(tmp_path / "q.jsonl")
    said = []
    folder = prepare_data(settings_of(tmp_path / "q.jsonl", f"data.shards_dir={tmp_path / 'out'}"), said.append)
    assert sum(folder.text["num_samples"].values()) == 3 and folder.features


def test_predictions_are_scored_on_renamed_columns(tmp_path):
    parquet(tmp_path / "q.parquet")
    (tmp_path / "out.jsonl").write_text("".join(json.dumps({"qid": f"q{n}", "prediction": 0}) + "\n" for n in range(3)))
    given = [part for field, column in COLUMNS.items() for part in ("--column", f"{field}={column}")]
    (split,) = {sample.split for sample in samples(read_questions(tmp_path / "q.parquet", columns=COLUMNS))}
    files = ("--predictions", str(tmp_path / "out.jsonl"), "--data", str(tmp_path / "q.parquet"))
    result = CliRunner().invoke(app, ["evaluate", *files, *given, "--split", split, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_questions"] == 3


def test_two_texts_of_one_field_are_refused_and_equal_ones_are_not(tmp_path):
    row = {"qid": "a", "question": "Which?", "choices": ["a", "b"], "answer": 0, "split": "train", "context": "c"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row | {"hint": "h"}))
    with pytest.raises(InputError, match="line 1: the fields 'context' and 'hint' are the same field"):
        read_questions(tmp_path / "q.jsonl")
    for other in ("c", "", None):
        (tmp_path / "q.jsonl").write_text(json.dumps(row | {"hint": other}))
        assert samples(read_questions(tmp_path / "q.jsonl"))[0].hint == "c"


def test_describe_takes_columns(tmp_path):
    jsonl(tmp_path / "q.jsonl")
    given = [part for field, column in COLUMNS.items() for part in ("--column", f"{field}={column}")]
    result = CliRunner().invoke(app, ["data", "describe", str(tmp_path / "q.jsonl"), *given])
    assert result.exit_code == 0 and "q.jsonl: 3 questions" in result.output
    wrong = CliRunner().invoke(app, ["data", "describe", str(tmp_path / "q.jsonl"), "--column", "question"])
    assert wrong.exit_code == 1 and "expected a field and its column, once: question=text" in wrong.output
