"""Samples of every kind through tables, shards and back."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from data_shards.manifest import manifest_shards, read_manifest, read_problems
from data_shards.sources.forms import read_questions
from data_shards.sources.tables import sample_of_row
from data_shards.writer import write_text_shards
from mmcot.texts.sample import SampleError

ROWS = [
    {"qid": "c", "question": "Hot?", "choices": ["yes", "no"], "answer": "no"},
    {"qid": "f", "question": "How many?", "answers": ["2", "two"], "image": "a.png"},
    {"qid": "g", "question": "How many?", "answer": "3"},
    {"qid": "p", "text": "Two magnets.", "image": ["a.png", "b.png"]},
    {"qid": "d", "document": [{"image": "b.png"}, {"text": "What?", "role": "user"}, {"text": "A map."}]},
]


@pytest.fixture
def questions(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    lines = [json.dumps({**row, "split": "train"}) for row in ROWS]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return read_questions(tmp_path / "mine.jsonl")


def test_rows_of_every_kind_come_back_from_shards_equal(questions, tmp_path):
    train = questions.problems["train"]
    assert [sample.kind for sample in train] == ["choices", "free", "free", "pair", "document"]
    assert [len(questions.pictures(sample)) for sample in train] == [0, 1, 0, 2, 1]
    write_text_shards(questions, tmp_path, samples_per_shard=2)
    shards = manifest_shards(read_manifest(tmp_path / "text"), "train")
    assert [sample for shard in shards for sample in read_problems(tmp_path / "text", shard)] == train


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Hot?"}, "'choices' is missing"),
        ({"question": "Hot?", "answer": 3}, "is no text"),
        ({"question": "Hot?", "answers": ["a"], "text": "b"}, "'answers' and 'text'"),
        ({"document": "a.png"}, "JSON list"),
    ],
)
def test_a_row_of_no_kind_is_refused_with_what_is_possible(row, message):
    with pytest.raises(SampleError, match=message):
        sample_of_row("x", row)


def test_a_question_to_predict_needs_neither_choices_nor_answer():
    assert sample_of_row("x", {"question": "Hot?"}, to_predict=True).answers == ()
    assert sample_of_row("x", {"question": "Hot?", "choices": ["a", "b"]}, to_predict=True).answer is None
