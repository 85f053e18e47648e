"""Accuracy in ScienceQA's classes, rationale scores, and the report."""

import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest

from mmcot.metrics.metrics import (
    COLUMNS,
    PUBLISHED,
    accuracy_table,
    breakdown,
    rationale_scores,
    score_report,
)
from mmcot.texts.sample import Sample


def problem(qid, subject="natural science", grade="grade3", hint="", images=(), answer=0, topic="force"):
    return Sample(
        qid=qid,
        question="Which one?",
        choices=("this", "that"),
        answer=answer,
        hint=hint,
        images=images,
        grade=grade,
        subject=subject,
        topic=topic,
    )


PROBLEMS = [
    problem("n1", hint="Look."),
    problem("n2", hint="Look.", images=("image.png",), grade="grade10"),
    problem("s1", subject="social science", images=("image.png",), grade="grade10", topic="maps"),
    problem("l1", subject="language science", grade="grade12", topic="verbs"),
]


def test_each_class_counts_its_own_questions():
    table = accuracy_table(PROBLEMS, {"n1": 0, "n2": 1, "s1": 0, "l1": 0})
    assert table == {
        "NAT": 50.0,
        "SOC": 100.0,
        "LAN": 100.0,
        "TXT": 50.0,
        "IMG": 50.0,
        "NO": 100.0,
        "G1-6": 100.0,
        "G7-12": 66.67,
        "AVG": 75.0,
    }
    assert tuple(table) == COLUMNS


def test_unreadable_answer_counts_as_wrong():
    assert accuracy_table(PROBLEMS[:1], {"n1": None})["AVG"] == 0.0


def test_class_without_questions_is_none():
    table = accuracy_table({"l1": PROBLEMS[3]}, {"l1": 0})
    assert table["NAT"] is None and table["IMG"] is None and table["LAN"] == 100.0


def test_prediction_for_another_question_is_not_counted():
    assert accuracy_table(PROBLEMS[:1], {"n1": 0, "other": 1})["AVG"] == 100.0


def test_question_without_a_prediction_is_named():
    with pytest.raises(ValueError, match=r"3 of 4 questions have no prediction \(first: n2\)"):
        accuracy_table(PROBLEMS, {"n1": 0})


def test_question_without_a_gold_answer_is_not_scored():
    with pytest.raises(ValueError, match=r"1 of 1 questions have no gold answer \(first: x\)"):
        accuracy_table([problem("x", answer=None)], {"x": None})


def test_breakdown_scores_each_value_in_reading_order():
    by_grade = breakdown(PROBLEMS, {"n1": 0, "n2": 1, "s1": 0, "l1": 0}, "grade")
    assert list(by_grade) == ["grade3", "grade10", "grade12"]
    assert by_grade["grade10"] == {"num_questions": 2, "accuracy": 50.0}


def test_breakdown_by_an_unknown_field_lists_the_known_ones():
    with pytest.raises(ValueError, match="'color' cannot be broken down; expected one of subject, topic"):
        breakdown(PROBLEMS, {}, "color")


def test_identical_rationales_score_one_hundred():
    texts = ["Solution: the anvil is heavy."]
    assert rationale_scores(texts, texts) == {"bleu1": 100.0, "bleu4": 100.0, "rougeL": 100.0, "similarity": None}


def test_rationale_scores_equal_a_calculation_by_hand():
    # Tokens "The cat sat down" / "The cat sat here now": precisions 3/4, 2/3, 1/2, 0/1;
    # brevity exp(1 - 5/4). LCS 3 of 4 and of 5 words: F = 2 * 3 / 9.
    scores = rationale_scores(["The cat.sat down."], ["The cat sat here now."])
    assert scores["bleu1"] == pytest.approx(100 * 0.75 * np.exp(-0.25), abs=0.005)
    assert scores["bleu4"] == 0.0
    assert scores["rougeL"] == pytest.approx(66.67)


def test_bleu_4_is_the_brevity_times_the_geometric_mean_of_four_precisions():
    # 5 tokens against 6 with the last one wrong: precisions 4/5, 3/4, 2/3, 1/2.
    expected = 100 * np.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert rationale_scores(["a b c d x"], ["a b c d e f"])["bleu4"] == pytest.approx(expected, abs=0.005)


def test_repeated_words_count_no_more_often_than_in_the_reference():
    assert rationale_scores(["the the the the"], ["the cat sat"])["bleu1"] == 25.0


def test_empty_rationale_scores_zero_and_is_not_left_out():
    scores = rationale_scores(["", "the anvil is heavy"], ["the anvil is heavy"] * 2)
    assert scores == {"bleu1": 50.0, "bleu4": 50.0, "rougeL": 50.0, "similarity": None}


def test_pair_without_a_reference_is_left_out():
    assert rationale_scores(["x", "the anvil"], ["", "the anvil"])["rougeL"] == 100.0
    assert rationale_scores(["x"], [" "])["rougeL"] is None


def test_rationales_and_references_of_different_number_are_refused():
    with pytest.raises(ValueError, match="2 rationales but 1 references"):
        rationale_scores(["a", "b"], ["a"])


def test_similarity_model_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        rationale_scores(["a"], ["a"], similarity_model="models/minilm")


def test_similarity_is_the_mean_cosine_of_the_embeddings(monkeypatch):
    class FakeEncoder:
        vectors = {"same": [1.0, 0.0], "other": [0.0, 1.0], "between": [0.6, 0.8]}

        def __init__(self, path):
            assert path == "models/minilm"

        def encode(self, texts, normalize_embeddings):
            assert normalize_embeddings
            return np.array([self.vectors[text] for text in texts])

    fake = types.SimpleNamespace(SentenceTransformer=FakeEncoder)
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    scores = rationale_scores(["same", "other"], ["same", "between"], similarity_model="models/minilm")
    assert scores["similarity"] == 90.0


def test_report_has_the_shape_of_the_scores_file():
    texts = {"n1": "Solution: it falls down here."}
    report = score_report(PROBLEMS[:1], {"n1": 0}, split="test", rationales=texts, references=texts)
    assert list(report) == ["split", "num_questions", "accuracy", "rationale", "parse_failure_rate"]
    assert report["split"] == "test" and report["num_questions"] == 1 and report["parse_failure_rate"] == 0.0
    assert report["rationale"] == {"bleu1": 100.0, "bleu4": 100.0, "rougeL": 100.0, "similarity": None}
    assert json.loads(json.dumps(report)) == report


def test_report_without_rationales_has_null_scores_for_them():
    report = score_report(PROBLEMS, dict.fromkeys(("n1", "n2", "s1", "l1")), split="val")
    assert report["rationale"] == {"bleu1": None, "bleu4": None, "rougeL": None, "similarity": None}
    assert report["parse_failure_rate"] == 100.0


def test_rationale_without_a_reference_is_named():
    with pytest.raises(ValueError, match=r"1 of 1 questions have no reference rationale \(first: n1\)"):
        score_report(PROBLEMS[:1], {"n1": 0}, split="test", rationales={"n1": "because"})


def test_guesses_raise_the_accuracy_and_not_the_parse_rate():
    problems = [problem(f"q{number}") for number in range(500)]
    report = score_report(problems, {item.qid: None for item in problems}, split="test", guess_seed=0)
    assert 14 < report["accuracy"]["AVG"] < 26  # one letter of five, binomial sd 1.8
    assert report["parse_failure_rate"] == 100.0


def test_published_rows_have_all_columns_and_their_averages():
    assert all(tuple(row) == COLUMNS for row in PUBLISHED.values())
    assert PUBLISHED["MM-CoT base (later)"]["AVG"] == 85.31 and PUBLISHED["Human"]["AVG"] == 88.40


def test_published_predictions_of_gpt_3_score_as_known():
    # 75.14 and 66.27: counted from ScienceQA's own result file on a subset of 350 test questions.
    folder = os.environ.get("MMCOT_SCIENCEQA_DIR")
    if not folder:
        pytest.skip("MMCOT_SCIENCEQA_DIR is not set")
    records = json.loads(pathlib.Path(folder, "problems.json").read_text())
    results = json.loads(pathlib.Path(folder, "predictions_gpt3_QCM-ALE.json").read_text())["results"]
    problems = [Sample.from_scienceqa(qid, record) for qid, record in records.items() if record["split"] == "test"]
    table = accuracy_table(problems, results)
    assert (len(problems), table["AVG"], table["IMG"]) == (350, 75.14, 66.27)
