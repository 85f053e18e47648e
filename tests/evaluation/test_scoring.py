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
        ('{"qid": "0"}\n{"qid": "1"}\n', "line 1: the key 'prediction' is missing; expected an object with 'qid'"),
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
    output = CliRunner().invoke(app, ["evaluate", "--predictions", str(path), "--data", str(data), "--json"]).stdout
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


def mmcot(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert "Traceback" not in result.output and result.exit_code in (0, 1)
    return result


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark_is_read(tmp_path, data, encoding):
    (tmp_path / "p.jsonl").write_text(lines([("0", 0), ("1", 1)]), encoding=encoding)
    assert score_file(tmp_path / "p.jsonl", data).report["accuracy"]["AVG"] == 100.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            r'{"qid": "1", "prediction": 0, "rationale": "\ud83d"}',
            "the field 'rationale' contains half of a UTF-16",
        ),
        ('{"qid": "1", "prediction": NaN}', "NaN is no value of JSON"),
        ('{"qid": "1", "prediction": 0, "rat', "no valid JSON"),
        ("[1]", r"is '\[1\]'; expected an object with 'qid' and 'prediction'"),
        ("null", "is 'None'; expected an object"),
        ('{"qid": null, "prediction": 0}', "the qid is None; expected a text or an integer"),
        ('{"qid": true, "prediction": 0}', "the qid is True; expected a text or an integer"),
        ('{"qid": 1.0, "prediction": 0}', "the qid is 1.0; expected a text or an integer"),
        ('{"qid": "1", "prediction": 0.0}', "question 1 has prediction 0.0; expected the index"),
        ('{"qid": "1", "prediction": 0, "rationale": 5}', "the rationale is 5; expected a text, or null"),
        ('{"qid": 0, "prediction": 0}', "question 0 is predicted a second time"),
        ('{"QID": "1", "Prediction": 0}', "the key 'qid' is missing"),
    ],
)
@pytest.mark.parametrize("position", [1, 2])
def test_a_line_that_cannot_be_scored_is_named_with_its_file_and_number(tmp_path, data, line, message, position):
    if position == 1 and "second time" in message:
        line = '{"qid": "0", "prediction": 0}\n' + line
    rows = [lines([("0", 0)]), line + "\n"] if position == 2 else [line + "\n", lines([("3", 0)])]
    (tmp_path / "p.jsonl").write_text("".join(rows))
    number = 2 if "second time" in message else position
    with pytest.raises(PredictionsError, match=f"p.jsonl, line {number}:? {message}"):
        score_file(tmp_path / "p.jsonl", data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"preds": None}, "'preds' is None; expected a list of the texts"),
        ({"preds": {"a": 1}}, "'preds' is {'a': 1}; expected a list"),
        ({"preds": ["x", None, "y", "z"]}, "'preds' is a list whose item 1 is None; expected a list"),
        ({"results": None}, "'results' is empty or no object"),
        ("null", "of no known form"),
        ("5", "of no known form"),
        ({"results": {"0 ": 1}}, "1 predictions, such as '0 ', 4 questions, such as '0'"),
    ],
)
def test_a_value_of_another_type_is_met_with_a_sentence(tmp_path, data, content, message):
    with pytest.raises(PredictionsError, match=message):
        score_file(write(tmp_path, content), data)


def test_rationales_of_some_lines_alone_are_not_scored_and_it_is_said(tmp_path, data):
    path = write(tmp_path, lines([("0", 0)]) + '{"qid": "1", "prediction": 1}\n')
    note = "rationales are not scored: 1 of 2 predictions have none"
    assert note in mmcot("--predictions", path, "--data", data).stdout
    as_json = mmcot("--predictions", path, "--data", data, "--json")
    assert json.loads(as_json.stdout)["rationale"]["rougeL"] is None and note in as_json.stderr


def test_what_was_left_out_is_said_beside_json_too(tmp_path, data):
    path = write(tmp_path, {"results": {"0": 0, "99": 1}})
    said = mmcot("--predictions", path, "--data", data, "--json").stderr
    assert "left out: 1 predictions for other questions, 3 questions without a prediction" in said


def test_lines_with_an_error_are_left_out_and_counted(tmp_path, data):
    error = {"qid": None, "line": 2, "error": "no valid JSON"}
    scored = score_file(write(tmp_path, lines([("0", 0)]) + json.dumps(error) + "\n" + lines([("2", 1)])), data)
    assert scored.report["num_questions"] == 2 and scored.report["accuracy"]["AVG"] == 50.0
    assert scored.left_out[1] == "lines with an error in place of a prediction: 1"


def test_an_object_over_several_lines_is_a_prediction_of_ours(tmp_path, data):
    path = write(tmp_path, json.dumps({"qid": "1", "prediction": 1}, indent=2))
    assert score_file(path, data).report["accuracy"]["AVG"] == 100.0


def test_a_csv_of_answers_is_refused_with_the_form_to_give(tmp_path, data):
    (tmp_path / "p.csv").write_text("qid,prediction\n0,0\n")
    assert (
        "give a .jsonl, as `mmcot predict` writes" in mmcot("--predictions", tmp_path / "p.csv", "--data", data).stderr
    )
