"""Metrics of free answers, computed by hand."""

from __future__ import annotations

import pytest

from mmcot.metrics.free_answers import anls, exact_match, normalize_vqa, vqa_accuracy
from mmcot.metrics.metrics import score_report
from mmcot.metrics.table import METRICS, Metric
from mmcot.texts.sample import Sample


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat", "cat"),
        ("Two dogs", "2 dogs"),
        ("1,000", "1,000"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("x-b", "x b"),
        ("dont", "don't"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_the_challenge_does(text, normal):
    assert normalize_vqa(text) == normal


def test_vqa_accuracy_leaves_each_annotator_out_in_turn():
    ten = ["yes"] * 2 + ["no"] * 8
    assert vqa_accuracy("yes", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("no", ten) == 1.0 and vqa_accuracy("maybe", ten) == 0.0
    assert vqa_accuracy("Yes!", ["yes"]) == 1.0 and vqa_accuracy("yes", []) == 0.0
    assert vqa_accuracy("two", ["2", "2", "3"]) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_anls_is_the_best_similarity_and_zero_below_a_half():
    assert anls("magnett", ["x", "magnet"]) == pytest.approx(6 / 7)
    assert anls("Magnet", ["magnet"]) == 1.0 and anls("abcd", ["abxy"]) == 0.0
    assert anls("", [""]) == 1.0 and anls("", ["a"]) == 0.0 and anls("a", []) == 0.0
    assert anls("x" * 100_000, ["y"]) == 0.0  # the lengths decide, without a distance


def test_exact_match_ignores_case_punctuation_and_articles():
    assert exact_match("The map!", ["a Map"]) == 1.0 and exact_match("maps", ["map"]) == 0.0


def test_a_metric_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(METRICS, "length", Metric("length", lambda text, references: len(text) / 10))
    samples = [Sample("f", "How many?", answers=("2", "two"), subject="natural science")]
    scores = score_report(samples, {"f": "two"}, split="test")
    assert scores["answers"] == {
        "exact_match": 100.0,
        "vqa_accuracy": 100.0,
        "anls": 100.0,
        "answer_rougeL": 100.0,
        "length": 30.0,
    }
    assert scores["accuracy"]["AVG"] == 100.0 and scores["accuracy"]["SOC"] is None


def test_scores_of_questions_with_choices_have_no_part_for_free_answers():
    assert "answers" not in score_report([Sample("c", "Hot?", ("a", "b"), 1)], {"c": 1}, split="test")
