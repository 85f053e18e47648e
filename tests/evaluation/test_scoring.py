"""Scoring files of predictions: ours, the published system's and ScienceQA's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.evaluation.external_predictions import PredictionsError, format_scores, score_file
from launcher.evaluation.tables import ceiling_rows, score_lines
from mmcot.texts.sample import Sample

ROWS = [
    {
        "qid": str(n),
        "question": f"Is {n} even?",
        "choices": ["yes", "no"],
        "answer": n % 2,
        "split": "test",
        "rationale": f"{n} halves.",
    }
    for n in range(4)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def write(tmp_path, content):
    path = tmp_path / "predictions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(predictions):
    return "".join(
        json.dumps({"qid": qid, "rationale": f"Solution: {qid} halves.", "answer_text": "", "prediction": index}) + "\n"
        for qid, index in predictions
    )


def test_our_own_lines_are_scored_with_their_rationales(tmp_path, data):
    scored = score_file(write(tmp_path, lines([("0", 0), ("1", 1), ("2", 1), ("3", None)])), data)
    assert scored.report["accuracy"]["AVG"] == 50.0 and scored.report["parse_failure_rate"] == 25.0
    assert scored.report["rationale"]["rougeL"] == 100.0 and scored.report["num_questions"] == 4


def test_a_single_line_is_a_file_of_ours_too(tmp_path, data):
    scored = score_file(write(tmp_path, lines([("1", 1)])), data)
    assert scored.report["accuracy"]["AVG"] == 100.0 and scored.num_questions_left_out == 3


def test_the_published_systems_file_is_aligned_to_the_split(tmp_path, data):
    texts = ["The answer is (A).", "The answer is (B).", "no idea", "The answer is (A). The answer is (B)."]
    path = write(tmp_path, {"num_fail": 2, "scores": {}, "preds": texts, "labels": []})
    scored = score_file(path, data)
    assert scored.report["accuracy"]["AVG"] == 50.0 and scored.report["parse_failure_rate"] == 50.0
    assert score_file(path, data, guess_seed=0).report["parse_failure_rate"] == 50.0
    with pytest.raises(PredictionsError, match="holds 3 predictions without ids, the split has 4 questions"):
        score_file(write(tmp_path, {"preds": texts[:3], "labels": []}), data)


def test_a_result_file_is_restricted_to_common_questions_and_says_how_many_were_left_out(tmp_path, data):
    scored = score_file(write(tmp_path, {"results": {"0": 0, "1": 0, "99": 1, "98": 1}}), data)
    assert scored.report["accuracy"]["AVG"] == 50.0 and scored.report["parse_failure_rate"] is None
    assert (scored.num_predictions_left_out, scored.num_questions_left_out) == (2, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ({"results": {}}, "'results' is empty"),
        ({"results": {"77": 1}}, "share no question"),
        ({"results": {"0": 2}}, "question 0 has prediction 2, its choices are 0 to 1"),
        ({"results": {"0": "A"}}, "question 0 has prediction 'A'; expected the index"),
        ('{"results": {"0": 1, "0": 0}}', "the key '0' occurs more than once"),
        (lines([("0", 0), ("0", 1)]), "line 2: question 0 is predicted a second time"),
        ('{"qid": "0"}\n{"qid": "1"}\n', "line 1 is no object with 'qid' and 'prediction'"),
        ([1, 2], "of no known form"),
    ],
)
def test_a_file_that_cannot_be_scored_is_met_with_a_sentence(tmp_path, data, content, message):
    with pytest.raises(PredictionsError, match=message):
        score_file(write(tmp_path, content), data)


def test_the_command_prints_the_table_the_breakdowns_and_the_published_rows(tmp_path, data):
    path = write(tmp_path, {"results": {"0": 0, "1": 0}})
    output = (
        CliRunner()
        .invoke(app, ["evaluate", "--predictions", str(path), "--data", str(data), "--against", "paper"])
        .output
    )
    assert (
        "published: MM-CoT base (later)" in output
        and "85.31" in output
        and "by topic" in output
        and "left out: 0" in output
    )
    output = CliRunner().invoke(app, ["evaluate", "--predictions", str(path), "--data", str(data), "--json"]).output
    assert json.loads(output)["accuracy"]["AVG"] == 50.0


KINDS = [
    {"qid": "c", "question": "Hot?", "choices": ["yes", "no"], "answer": 1, "split": "test"},
    {"qid": "f", "question": "How many?", "answers": ["2", "two"], "split": "test"},
    {"qid": "d", "document": [{"text": "What?", "role": "user"}, {"text": "A map."}], "split": "test"},
]


@pytest.fixture
def all_kinds(tmp_path):
    path = tmp_path / "kinds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in KINDS))
    return path


def test_texts_are_scored_beside_choices(tmp_path, all_kinds):
    scored = score_file(write(tmp_path, {"results": {"c": 1, "f": "Two.", "d": "a plan"}}), all_kinds)
    assert scored.report["accuracy"]["AVG"] == 66.67
    assert scored.report["answers"]["exact_match"] == 50.0 and scored.report["answers"]["vqa_accuracy"] == 50.0
    shown = "\n".join(format_scores(scored, path=tmp_path, against_paper=False))
    assert "answers: exact match 50.00   VQA accuracy 50.00" in shown
    texts = ["The answer is (B).", "The answer is two.", "A map."]
    assert score_file(write(tmp_path, {"preds": texts}), all_kinds).report["accuracy"]["AVG"] == 100.0


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"f": 1}, "question f has prediction 1; it has no choices: expected the answer's text"),
        ({"c": "no"}, "question c has prediction 'no'; expected the index of a choice"),
        ({"f": 1.5}, "expected the index of a choice, a text, or null"),
    ],
)
def test_a_prediction_of_another_kind_is_refused(tmp_path, all_kinds, results, message):
    with pytest.raises(PredictionsError, match=message):
        score_file(write(tmp_path, {"results": results}), all_kinds)


def test_the_console_line_of_choices_has_rouge_and_bleu_and_answers_follow():
    scores = {"rationale": {"bleu1": 1.0, "bleu4": 2.0, "rougeL": 3.0, "similarity": None}, "parse_failure_rate": 4.0}
    assert score_lines(scores) == ["ROUGE-L 3.00   BLEU-4 2.00   answers that could not be read 4.00%"]
    empty = dict.fromkeys(scores["rationale"])
    assert score_lines(scores | {"rationale": empty}) == ["answers that could not be read 4.00%"]
    with_answers = score_lines(scores | {"rationale": empty, "answers": {"exact_match": 5.0, "anls": None}})
    assert with_answers == ["exact match 5.00   answers that could not be read 4.00%"]


def test_a_ceiling_is_given_only_where_it_is_known_for_every_sample():
    ceilings = {"per_skill": {"maps": {"direct_text": 0.5, "chain_text": 1.0}}}
    known, other = Sample("a", "Hot?", ("x", "y"), 0, skill="maps"), Sample("b", "How many?", answers=("2",))
    assert [row["AVG"] for row in ceiling_rows({"a": known}, ceilings).values()] == [50.0, 100.0]
    assert ceiling_rows({"a": known, "b": other}, ceilings) == {} == ceiling_rows({"a": known}, None)


@pytest.mark.skipif("MMCOT_SCIENCEQA_DIR" not in os.environ, reason="MMCOT_SCIENCEQA_DIR is not set")
def test_the_published_gpt3_file_scores_75_14_on_the_real_subset():
    folder = Path(os.environ["MMCOT_SCIENCEQA_DIR"])
    scored = score_file(folder / "predictions_gpt3_QCM-ALE.json", folder)
    accuracy = scored.report["accuracy"]
    assert (accuracy["AVG"], accuracy["IMG"], scored.report["num_questions"]) == (75.14, 66.27, 350)
    assert scored.num_predictions_left_out == 4241 - 350
