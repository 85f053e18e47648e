"""Samples of every kind through tables, shards and back."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_shards.indexed_tars import index_tars, pictures_in_tars
from data_shards.manifest import manifest_shards, problem_of_member, read_manifest, read_problems
from data_shards.picture_features import open_pictures_of
from data_shards.reader import SplitReader
from data_shards.sources.duplicates import find_duplicates
from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import PictureError
from data_shards.sources.row_samples import row_to_record, sample_of_row
from data_shards.writer import write_text_shards
from launcher.config.loading import load_settings
from launcher.data.build import prepare_data
from launcher.data.check import check_data
from launcher.data.describe import describe_questions, description_lines
from mmcot.texts.sample import KINDS, Part, Sample, SampleError

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


texts = st.text(min_size=1).filter(str.strip)
names = st.sampled_from(("a.png", "b.png", "folder/c.jpg"))
parts = st.builds(Part, text=texts, role=st.sampled_from(("", "user"))) | st.builds(Part, image=names)
fields = st.fixed_dictionaries({}, optional=dict.fromkeys(("hint", "skill", "solution", "caption", "grade"), texts))
images = st.lists(names, max_size=3).map(tuple)


@st.composite
def samples(draw):
    """Any sample of any kind whose answer is known."""
    qid, rest = draw(st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True)), draw(fields)
    kind = draw(st.sampled_from(KINDS))
    if kind == "choices":
        choices = tuple(draw(st.lists(texts, min_size=2, max_size=5)))
        answer = draw(st.integers(0, len(choices) - 1))
        return Sample(qid, draw(texts), choices, answer, images=draw(images), **rest)
    if kind == "free":
        answers = tuple(draw(st.lists(texts, min_size=1, max_size=3)))
        return Sample(qid, draw(texts), answers=answers, images=draw(images), **rest)
    if kind == "pair":
        return Sample(qid, draw(st.text()), text=draw(texts), images=draw(images) or ("a.png",), **rest)
    return Sample.of_document(qid, [*draw(st.lists(parts, max_size=4)), draw(st.builds(Part, text=texts))], **rest)


@settings(max_examples=100, deadline=None)
@given(samples())
def test_any_sample_comes_back_from_its_member_in_a_shard_equal(sample):
    data = json.dumps(sample.to_record(), ensure_ascii=False).encode()
    assert problem_of_member(sample.qid, data, tar="train-000000.tar") == sample
    assert Sample.from_record(json.loads(data)) == sample
    row = row_to_record(json.loads(data))
    assert Sample.from_record(row) == sample and sample_of_row(sample.qid, row) == sample


def test_scienceqa_s_folder_holds_records_of_every_kind(tmp_path):
    records = {row["qid"]: {key: row[key] for key in row if key != "qid"} for row in ROWS}
    records["c"]["answer"] = 1
    (tmp_path / "problems.json").write_text(json.dumps(records))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": list(records)}))
    (tmp_path / "captions.json").write_text(json.dumps({"captions": {"p": "red", "c": "blue"}}))
    read = read_questions(tmp_path)
    assert [sample.kind for sample in read.problems["train"]] == ["choices", "free", "free", "pair", "document"]
    assert [sample.caption for sample in read.problems["train"]] == ["blue", "", "", "red", ""]
    document = read.problems["train"][-1]
    assert read.pictures(document) == [tmp_path / "images" / "train" / "d" / "b.png"]


def test_a_csv_has_free_answers_and_pairs_and_refuses_documents(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("qid,question,answers,text,image,split\na,How many?,2| two,,,train\nb,,,A map.,a.png,train\n")
    free, pair = read_questions(path).problems["train"]
    assert free.answers == ("2", "two") and (pair.text, pair.images) == ("A map.", ("a.png",))
    path.write_text("qid,question,answer,split\na,How many?,2,train\n")
    assert read_questions(path).problems["train"][0].answers == ("2",)
    path.write_text('qid,document,split\na,"[]",train\n')
    with pytest.raises(SampleError, match="give it in a .jsonl"):
        read_questions(path)


def test_columns_of_other_kinds_are_ignored_beside_choices(tmp_path):
    row = {**ROWS[0], "text": "x", "answers": ["y"], "document": "z"}
    assert sample_of_row("c", row) == sample_of_row("c", ROWS[0])


def test_a_saved_data_set_of_documents_holds_their_pictures_in_the_order_of_the_parts(tmp_path):
    import datasets

    def png(colour):
        stream = io.BytesIO()
        Image.new("RGB", (4, 4), colour).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": f"{colour}.png"}

    parts = [{"image": png("blue")}, {"text": "a dax"}, {"image": png("red")}, {"text": "a wug"}]
    rows = [{"qid": "d", "document": [{"text": None, "image": None, **part} for part in parts], "choices": None}]
    rows += [{"qid": "c", "document": None, "choices": ["a", "b"], "question": "Which?", "answer": "b"}]
    rows = [{"question": None, "answer": None, **row} for row in rows]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    questions = read_questions(tmp_path / "saved")
    document, question = questions.problems["train"]
    assert [part.text or part.image for part in document.document] == ["blue.png", "a dax", "red.png", "a wug"]
    assert list(questions.pictures(document)) == [parts[0]["image"]["bytes"], parts[2]["image"]["bytes"]]
    assert question.answer == 1


def test_a_document_s_pictures_in_a_tar_come_in_the_order_of_its_parts(tmp_path):
    members = {"d.json": json.dumps({"document": [{"image": "1.png"}, {"image": "0.png"}, {"text": "x"}]}).encode()}
    members |= {"d.0.png": b"first", "d.1.png": b"second", "q.png": b"q"}
    members |= {"q.json": json.dumps({**ROWS[0], "image": "mine.png"}).encode()}
    with tarfile.open(tmp_path / "mine.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_tars({"train": [tmp_path / "mine.tar"]}, tmp_path / "out")
    pictures = pictures_in_tars(tmp_path / "out")
    reader = SplitReader(tmp_path / "out", "train")
    assert pictures(reader.problem(0)) == [b"second", b"first"] and pictures(reader.problem(1)) == [b"q"]


def test_a_document_with_a_part_of_its_pictures_is_refused(questions):
    document = Sample.of_document("d", [Part(image="a.png"), Part(image="gone.png"), Part("x")])
    with pytest.raises(PictureError, match="1 of its 2 pictures exist, .*gone.png does not"):
        open_pictures_of(questions.pictures, max_pictures=2)(document, Counter())


def test_pairs_and_documents_are_duplicates_by_their_texts():
    found = find_duplicates(
        [
            Sample("1", text="A map.", images=("a.png",), split="train"),
            Sample("2", text="A map.", images=("b.png",), split="test"),
            Sample("3", question="A map.", answers=("x",), images=("b.png",), split="test"),
            Sample.of_document("4", [Part("A map."), Part("x")], split="test"),
            Sample.of_document("5", [Part("A map."), Part("y")], split="test"),
        ]
    )
    assert found.with_picture == {("test", "train"): [("1", "2")]} and not found.without_picture


def test_samples_of_every_kind_are_described_and_sharded_with_features_and_a_tokenizer(tmp_path, questions):
    lines = description_lines(describe_questions(tmp_path / "mine.jsonl"))
    table = {line[:24].strip(): line[24:].split() for line in lines}
    assert table["questions"][0] == "5" and table["with a free answer"][0] == "2" and table["documents"][0] == "1"
    assert any(line.startswith("P-T source") for line in lines)
    rows = [*ROWS, {**ROWS[0], "qid": "v", "split": "val"}, {**ROWS[0], "qid": "t", "split": "test"}]
    text = "\n".join(json.dumps({"split": "train", **row}) for row in rows)
    (tmp_path / "all.jsonl").write_text(text, encoding="utf-8")
    overrides = [f"data.path={tmp_path / 'all.jsonl'}", f"data.shards_dir={tmp_path / 'out'}", "data.max_pictures=2"]
    folder = prepare_data(load_settings(preset="demo", overrides=overrides), lambda line: None)
    reader = SplitReader(folder.path, "train", features="patch")
    features = [reader.features(number) for number in range(5)]
    assert [len(array) for array in features if array is not None] == [0, 64, 0, 128, 64]
    assert check_data(folder.path, lines.append) == 14  # texts and features


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"image": "a.png"}, "pair"),
        ({"image": "a.png", "question": "Describe it.", "text": ""}, "pair"),
        ({"image": "a.png", "question": "How many?"}, "free"),
        ({"image": "a.png", "question": "Describe it.", "text": None}, "pair"),
        ({"image": "a.png", "question": "How many?", "answers": [], "document": []}, "free"),
        ({"document": [{"text": "See"}, {"image": "a.png"}]}, "document"),
        ({"document": [{"image": "a.png"}, {"text": "What?", "role": "user"}, {"text": ""}]}, "document"),
    ],
)
def test_a_row_to_predict_needs_no_answer_of_any_kind(row, kind):
    sample = sample_of_row("q", row, to_predict=True)
    assert sample.kind == kind and sample.images == ("a.png",) and not sample.has_answer


def test_a_pair_without_its_text_is_no_training_sample(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"qid": "p", "image": "a.png", "text": "", "split": "train"}))
    with pytest.raises(SampleError, match="question p: the field .choices. is missing; give .* image-text pair"):
        read_questions(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": " ", "image": "a.png"}, "the answer is missing"),
        ({"text": "A map.", "image": 5}, "the field 'image' is 5"),
        ({"text": "A map.", "image": "a.png", "split": ["train"]}, "split .'train'. is unknown"),
        ({"text": "A map.", "image": "a.png", "caption": 5}, "the field 'caption' is 5"),
    ],
)
def test_a_field_of_a_wrong_type_or_a_blank_text_is_named(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"qid": "p", "split": "train"} | row))
    with pytest.raises(SampleError, match=message):
        read_questions(tmp_path / "a.jsonl")


def test_empty_fields_of_other_kinds_are_left_out(tmp_path):
    row = {"qid": "p", "text": "A map.", "image": "a.png", "document": [], "answers": [], "choices": []}
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"split": "train"}))
    assert read_questions(tmp_path / "a.jsonl").problems["train"][0].kind == "pair"
