"""Inputs like those of bug reports: each is read as its author meant it, or refused with file and place.

``inputs/`` has a folder for each; the commands run in a copy of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_shards.reader import SplitReader
from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import open_picture
from launcher.cli import app
from mmcot.texts.text_ids import encode_text
from mmcot.texts.tokenizer import open_tokenizer

INPUTS = Path(__file__).parent / "inputs"
SHARD = ["data", "shard", "--preset", "demo", "--set", "data.features=null", "--set", "data.shards_dir=out"]
DESCRIBE_CSV, DESCRIBE = ["data", "describe", "in.csv"], ["data", "describe", "."]
SHARD_CSV, SHARD_JSONL = ([*SHARD, "--set", f"data.path=in.{suffix}"] for suffix in ("csv", "jsonl"))
SHARD_FOLDER, INDEX = [*SHARD, "--set", "data.path=."], ["data", "index", "train=t.tar", "--out", "out"]
SHARD_WITH_PICTURES = [each.replace("features=null", "features=patch") for each in SHARD_JSONL]
CONFIG = ["config", "show", "--preset", "demo", "--config", "my.yaml"]
MINITRAIN = [*SHARD_FOLDER, "--set", "data.splits={train: minitrain}"]

REFUSED = [
    ("config_duplicate_section", CONFIG, "'training' occurs twice"),
    ("csv_cp1252", SHARD_CSV, "in.csv, line 7: the byte 0xf9 is no UTF-8"),
    ("csv_embedded_newline_then_bad", DESCRIBE_CSV, "in.csv, line 5: answer 'mars'"),
    ("csv_unclosed_quote_last_column", DESCRIBE_CSV, "in.csv, line 6: .* opens a quote that never ends"),
    ("csv_unquoted_comma", DESCRIBE_CSV, "in.csv, line 2: 6 fields, .* beyond them are ' warm and near.'"),
    ("folder_shards_hf", DESCRIBE, "'train' has 2 sources, train-00000-of-00002.jsonl and train.jsonl"),
    ("folder_shards_hf", DESCRIBE, "of which 1 is missing, such as train-00001-of-00002.jsonl"),
    ("jsonl_answer_superscript", SHARD_JSONL, "in.jsonl, line 1: answer '²' is no index, letter or text"),
    ("jsonl_caption_int", SHARD_JSONL, "in.jsonl, line 1: .*'caption' is 5; expected a text"),
    ("jsonl_image_dict", SHARD_JSONL, "in.jsonl, line 1: question q0: the field 'image' is {'path'"),
    ("jsonl_image_nan", SHARD_JSONL, "in.jsonl, line 1: NaN is no value of JSON"),
    ("jsonl_long_qid", SHARD_JSONL, "in.jsonl, line 1: .* has 128 characters; at most 95"),
    ("jsonl_qid_null", SHARD_JSONL, "in.jsonl, line 1: the field 'qid' is null"),
    ("jsonl_split_list", SHARD_JSONL, r"in.jsonl, line 1: .*split \['train'\] is unknown"),
    ("jsonl_surrogate", SHARD_JSONL, "in.jsonl, line 1: the field 'question' contains half of a UTF-16 pair"),
    ("sqa_captions_flat", DESCRIBE, "captions.json: it contains no captions"),
    ("sqa_dup_qid", DESCRIBE, "problems.json.*: the key '3' occurs more than once"),
    ("sqa_list_unknown", MINITRAIN, "'minitrain' names 1 unknown questions, such as '99'"),
    ("sqa_record_null", DESCRIBE, "problems.json, question '2': it is null; expected an object"),
    ("tar_answer_null", INDEX, "t.tar, member a.json: the answer is missing"),
    ("tar_bad_json", INDEX, "t.tar, member b.json: no valid JSON"),
    ("tar_json_list", INDEX, "t.tar, member b.json: expected an object"),
    ("tar_mid_zero", INDEX, "t.tar is not a readable tar: .* a hole of zeros"),
    ("tar_same_base_in_folders", INDEX, "member 0001.json: the id '0001' is also .* without folders"),
]

READ = [
    ("csv_empty", DESCRIBE_CSV, "in.csv: 0 questions"),
    ("csv_huge_field", DESCRIBE_CSV, "in.csv: 1 questions"),
    ("csv_index_answers_numeric_choices", DESCRIBE_CSV, "in.csv: answers are read as indices from 0"),
    ("csv_semicolon", SHARD_CSV, "in.csv is separated by semicolons"),
    ("hf_qid_zero", SHARD_FOLDER, "text: 2 train, 1 val, 1 test"),
    ("jsonl_choice_trailing_space", SHARD_JSONL, "text: 4 train, 1 val, 1 test"),
    ("sqa_bom", DESCRIBE, "6 questions"),
    ("sqa_int_splits", DESCRIBE, "6 questions"),
    ("sqa_unlisted", DESCRIBE, "2 questions of problems.json are in no split .* such as '2'"),
    ("tar_brackets[1]", ["data", "index", "train=t[1].tar", "--out", "out"], "1 train, 0 val, 0 test"),
    ("tar_concatenated", INDEX, "2 concatenated archives; all of them are read\n.*2 train"),
    ("tar_picture_without_json", INDEX, "'orphan' .*they are left out"),
    ("tar_qid_inside_differs", INDEX, "another qid than the member's name, such as 'q77' in 000000.json"),
]


@pytest.fixture
def enter(tmp_path, monkeypatch):
    """A function that copies a case's input and makes the copy the working folder."""

    def copy(name):
        shutil.copytree(INPUTS / name, tmp_path / "case")
        monkeypatch.chdir(tmp_path / "case")
        return tmp_path / "case"

    return copy


def run(*arguments):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert "Traceback" not in result.output and result.exit_code in (0, 1), result.output
    return result.exit_code, result.output


def search(pattern, text):
    return re.search(pattern, text, re.DOTALL if "\n" in pattern else 0)


@pytest.mark.parametrize(("name", "command", "message"), REFUSED)
def test_what_would_be_lost_or_altered_is_refused_with_its_place(enter, name, command, message):
    folder = enter(name)
    before = {path.name for path in folder.iterdir()}
    status, output = run(*command)
    assert status == 1 and search(message, output), output
    assert not (folder / "out" / "text" / "manifest.json").exists()
    assert {path.name for path in folder.iterdir()} <= before | {"out"}


@pytest.mark.parametrize(("name", "command", "said"), READ)
def test_what_can_be_read_is_read_and_what_was_recognised_is_said(enter, name, command, said):
    enter(name)
    status, output = run(*command)
    assert status == 0 and search(said, output), output


def test_indices_over_numeric_choices_are_the_gold_answers_that_the_column_means(enter):
    problems = read_questions(enter("csv_index_answers_numeric_choices") / "in.csv").problems
    answers = {problem.qid: problem.answer for split in problems.values() for problem in split}
    assert answers == {"q0": 0, "q1": 1, "q2": 2, "q3": 3}


def test_files_that_appear_beside_tables_change_nothing(enter):
    folder = enter("folder_unrelated_json")
    command = [*SHARD, "--set", "data.path=data"]
    assert run(*command)[0] == 0
    manifest = (folder / "out" / "text" / "manifest.json").read_bytes()
    (folder / "data" / "results.json").write_text("{}")
    (folder / "data" / ".ipynb_checkpoints").mkdir()
    (folder / "data" / ".ipynb_checkpoints" / "train-checkpoint.jsonl").write_text("{}")
    assert run(*command)[0] == 0 and (folder / "out" / "text" / "manifest.json").read_bytes() == manifest


def test_an_id_of_zero_stays_zero(enter):
    qids = [problem.qid for split in read_questions(enter("hf_qid_zero")).problems.values() for problem in split]
    assert "0" in qids and not any(qid.startswith("train-") for qid in qids)


def test_an_end_token_inside_a_question_is_text(enter):
    folder = enter("jsonl_eos_in_text")
    assert run(*SHARD_JSONL)[0] == 0
    tokenizer, question = open_tokenizer(folder / "out" / "tokenizer"), SplitReader(folder / "out", "train").problem(0)
    ids = encode_text(tokenizer, question.question)
    assert "</s>" in question.question and tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == question.question


def test_a_postscript_file_called_png_is_refused_and_starts_nothing(enter, monkeypatch):
    folder = enter("picture_eps")
    gs = folder / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}{os.pathsep}{os.environ['PATH']}")
    status, output = run(*SHARD_WITH_PICTURES)
    assert status == 1 and search("x_eps.png is no picture of a known format", output), output
    assert not (folder / "started").exists()


def test_grey_of_16_bits_and_floats_keep_their_levels(enter):
    folder = enter("picture_gray16")
    for name in ("gray16.png", "float01.tif"):
        levels = np.unique(np.asarray(open_picture(folder / name, name=name)))
        assert len(levels) > 20 and levels.min() < 20 and levels.max() > 230, name


def test_a_picture_whose_exif_cannot_be_read_has_all_its_pixels(enter):
    folder = enter("pictures_bad_exif")
    names = sorted(path.name for path in folder.glob("*.jpg"))
    assert len(names) >= 6
    for name in names:
        with Image.open(folder / name, formats=("JPEG",)) as plain:
            expected = sorted(plain.size)
        assert sorted(open_picture(folder / name, name=name).size) == expected
    status, output = run(*SHARD_WITH_PICTURES)
    assert status == 0 and "pictures of train: 1 questions with one" in output, output


def test_all_faults_of_a_table_are_told_at_once_as_json_too(enter):
    enter("csv_unquoted_comma")
    _, output = run(*DESCRIBE_CSV)
    assert output.count("error: in.csv, line ") == 20 and "error: 20 faults in all" in output
    status, output = run(*DESCRIBE_CSV, "--json")
    told = json.loads(output)
    assert status == 1 and told["num_faults"] == 20
    assert [fault["line"] for fault in told["faults"]] == list(range(2, 22))
    assert {fault["file"] for fault in told["faults"]} == {"in.csv"}
