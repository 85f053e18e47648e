"""Tables of one's own: every row as it is written, or a refusal that names its line."""

from __future__ import annotations

import csv
import json
import random
import re

import datasets
import pytest

from data_shards.sources.forms import read_questions
from data_shards.sources.table_rows import read_rows
from data_shards.sources.tables import read
from data_shards.strict_json import parse_json
from mmcot.errors import InputError

HEADER = "qid,question,choices,answer,split\n"
ROW = "a1,Which?,sun|moon,sun,train\n"
PIECES = [
    "",
    "x",
    ",",
    ";",
    "\t",
    '"',
    '""',
    "\n",
    "\r\n",
    "ä",
    "ß",
    "日本",
    "🙂",
    "\u2028",
    "'",
    "\\",
    "  ",
    "=1+1",
    "a|b",
]


def table(tmp_path, text, name="in.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("seed", range(40))
def test_rows_that_a_csv_writer_wrote_are_read_back_to_the_character(tmp_path, seed):
    chance = random.Random(seed)
    columns = ["qid", "question", "hint", "note"]
    rows = [["q" + str(n), *("x" + "".join(chance.choices(PIECES, k=6)) for _ in columns[1:])] for n in range(8)]
    separator = chance.choice(",;\t")
    with open(tmp_path / "in.csv", "w", newline="", encoding=chance.choice(["utf-8", "utf-8-sig", "utf-16"])) as file:
        csv.writer(file, delimiter=separator, lineterminator=chance.choice(["\n", "\r\n"])).writerows([columns, *rows])
    notes: list[str] = []
    found = [list(row.values()) for _, row in read_rows(tmp_path / "in.csv", notes)]
    assert found == rows
    assert len(notes) == (separator != ",")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEADER + ROW + "a2,Which, of these?,sun|moon,sun,train\n",
            r"line 3: 6 fields, .* beyond .* 'train'",
        ),
        (HEADER + ROW + "\n" + "a2,Which?,sun|moon\n", r"line 4: 3 fields, .* 'answer', 'split' are missing"),
        (HEADER + ROW + 'a2,"Which?,sun|moon,sun,train\n' + ROW, r"line 3: a field .* opens a quote that never ends"),
        (HEADER + 'a2,"Which" one?,sun|moon,sun,train\n', r"line 2: ',' expected after '\"'"),
        (HEADER + '"a\n2","Which?\n\n",sun|moon,pluto,train\n' + ROW, r"line 2: "),
        (HEADER.replace("split", "answer") + ROW, "the column 'answer' occurs more than once"),
        ((HEADER + ROW).encode() + b"a2,Pi\xf9,sun|moon,sun,train\n", r"line 3: the byte 0xf9 is no UTF-8; save"),
        (HEADER + ROW + "a2,Whi\0ch?,sun|moon,sun,train\n", r"line 3"),
        ("sep=ab\n" + HEADER, "the separator 'ab' is no single character"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_line_on_which_its_row_begins(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        read(table(tmp_path, text))
    assert "in.csv" in str(error.value)


def test_a_field_of_any_length_is_read(tmp_path):
    long = "long " * 60_000
    assert read(table(tmp_path, HEADER + f"a1,{long},sun|moon,sun,train\n")).problems["train"][0].question == long


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ((HEADER + ROW).replace(",", ";"), "is separated by semicolons"),
        ((HEADER + ROW).replace(",", "\t"), "is separated by tabs"),
        ("sep=;\n" + (HEADER + ROW).replace(",", ";"), "is separated by semicolons"),
        (HEADER.replace("qid,question", " QID ,Question") + ROW, r"columns are read without .* ' QID ' as 'qid'"),
    ],
)
def test_other_dialects_are_recognised_and_said(tmp_path, text, note):
    questions = read(table(tmp_path, text))
    assert questions.problems["train"][0].choices == ("sun", "moon")
    assert any(re.search(note, line) for line in questions.notes)


def test_an_excel_table_in_utf_16_is_read(tmp_path):
    assert len(read(table(tmp_path, HEADER + ROW, encoding="utf-16")).problems["train"]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"qid": "a", "answer": 0, "answer": 1}', "the key 'answer' occurs more than once"),
        ('{"qid": "a", "image": NaN}', "NaN is no value of JSON"),
        ('{"qid": "a", "image": -Infinity}', "-Infinity is no value of JSON"),
        (r'{"qid": "a", "question": "x\ud83d"}', "the field 'question' contains half of a UTF-16 pair"),
        (r'{"qid": "a", "choices": ["x", "\ude00"]}', "the field 'choices' contains half of a UTF-16 pair"),
        ('{"qid": "a"', r"no valid JSON \(.* at character 12\)"),
        ("[" * 200_000, "nested too deeply"),
        ("[1]", "expected an object"),
    ],
)
def test_a_line_of_json_that_would_lose_something_is_refused_by_line(tmp_path, line, message):
    path = table(tmp_path, '\n{"qid": "first", "text": "x", "image": "a.png"}\n' + line + "\n", "in.jsonl")
    with pytest.raises(InputError, match=rf"in\.jsonl, line 3: .*{message}"):
        list(read_rows(path))


def test_whole_characters_are_read_however_they_are_written():
    value = {"a": "🙂", "b": ["ß", 1.5, None, True]}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text, "here") == value
    with pytest.raises(InputError, match=r"^here, line 2: no valid JSON \(.* at character 3\)"):
        parse_json("{\n  oops}", "here")


@pytest.mark.parametrize(
    ("line", "qid", "answer"),
    [
        ('{"qid": 0, "question": "q", "choices": ["sun ", "sun"], "answer": "sun "}', "0", 0),
        ('{"qid": "00", "question": "q", "choices": ["sun ", "sun"], "answer": "sun"}', "00", 1),
        ('{"id": 7, "question": "q", "choices": ["sun", "moon"], "answer": " moon "}', "7", 1),
        ('{"qid": "a", "question": "q", "choices": ["\u00b2", "2"], "answer": "\u00b2"}', "a", 0),
    ],
)
def test_ids_and_answers_are_taken_as_they_are_written(tmp_path, line, qid, answer):
    questions = read(table(tmp_path, line + "\n", "in.jsonl"))
    (sample,) = [sample for split in questions.problems.values() for sample in split]
    assert (sample.qid, sample.answer) == (qid, answer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"qid": null', "the field 'qid' is null; expected a text or an integer"),
        ('"qid": 1.0', "the field 'qid' is 1.0"),
        ('"qid": true', "the field 'qid' is True"),
        ('"qid": ["a"]', "the field 'qid' is"),
        ('"qid": ""', "the field 'qid' is missing"),
        ('"qid": "a", "answer": "\u00b2"', "answer '\u00b2' is no index, letter or text"),
    ],
)
def test_an_id_or_an_answer_that_is_none_is_refused_by_line(tmp_path, fields, message):
    line = '{"question": "q", "choices": ["x", "y"], "answer": 0, ' + fields + "}"
    if '"answer": "' in fields:
        line = line.replace('"answer": 0, ', "")
    with pytest.raises(InputError, match=rf"in\.jsonl, line 1: .*{re.escape(message)}"):
        read(table(tmp_path, line + "\n", "in.jsonl"))


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("in.jsonl", '{"qid": "a"}\n{\n{"qid": "b"}\n[1]\n', ([1, 3], [2, 4])),
        ("in.csv", "qid,hint\na,x\nb\nc,x,y\nd,x\n", ([2, 5], [3, 4])),
    ],
)
def test_reading_continues_after_rows_whose_faults_are_gathered(tmp_path, name, text, lines):
    faults = []
    read_on = [
        line
        for line, _ in read_rows(table(tmp_path, text, name), refuse=lambda fault: faults.append((fault.line, fault)))
    ]
    assert (read_on, [line for line, _ in faults]) == lines
    assert all(isinstance(error, InputError) and f"{name}, line {line}" in str(error) for line, error in faults)


def test_an_integer_of_thousands_of_digits_is_refused_with_its_place():
    with pytest.raises(InputError, match="in.jsonl, line 3: an integer has thousands of digits"):
        parse_json("1" + "0" * 5000, "in.jsonl, line 3")


def test_a_saved_data_set_with_offsets_beyond_its_values_is_refused_and_ends_no_process(tmp_path):
    datasets.disable_progress_bars()
    rows = [{"qid": f"q{n}", "question": "Which?", "choices": ["a", "b"], "answer": 0} for n in range(9)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    file = next((tmp_path / "saved").glob("*.arrow"))
    data = file.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 2, 4, 6))  # of the ids q0, q1, q2, ...
    assert offsets in data
    file.write_bytes(data.replace(offsets, (0x7FFFFFF0).to_bytes(4, "little") * 4, 1))
    with pytest.raises(InputError, match="saved: the data set cannot be opened .*save it again"):
        read_questions(tmp_path / "saved")
