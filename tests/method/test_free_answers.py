"""Metrics of free answers, computed by hand."""

from __future__ import annotations

import random

import pytest

from mmcot.metrics.free_answers import anls, exact_match, normalize_vqa, rouge_l, vqa_accuracy
from mmcot.metrics.metrics import score_report
from mmcot.metrics.table import METRICS, Metric
from mmcot.texts.sample import Sample


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat", "cat"),
        ("Two dogs", "2 dogs"),
        ("1,000", "1000"),
        ("3.", "3"),
        ("U.S.", "us"),
        ("The A", "the a"),
        ("wouldnt\u2019ve", "wouldn't've"),
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


def edit_distance(first, second):
    """By the definition, row by row."""
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, start=1):
        row = [number, *row]
        for column, other in enumerate(second, start=1):
            row[column] = min(row[column + 1] + 1, row[column - 1] + 1, row[column] + (character != other))
        row.pop()
    return row[-1]


def test_anls_follows_from_the_edit_distance_of_random_texts():
    draw = random.Random(0)
    for _ in range(3000):
        first, second = ("".join(draw.choices("abc\u00e9\U0001f600", k=draw.randrange(1, 12))) for _ in range(2))
        share = edit_distance(first, second) / max(len(first), len(second))
        assert anls(first, [second]) == (1 - share if share < 0.5 else 0.0)


def test_texts_of_a_whole_page_are_compared_at_once():
    page = "".join(random.Random(0).choices("abcdefg ", k=20_000)).strip()
    assert anls(page, [f"{page[:9000]}zzz{page[9000:]}"]) == pytest.approx(1 - 3 / 20_000, abs=1e-4)  # 0.3 s


HARD_TEXTS = ("A", "the", "?", "1,000", "\u00c4rger \u2019s", "\u4e8c", "\U0001f600", "x\x00y", "dont", "half \ud800")


@pytest.mark.parametrize("metric", [exact_match, vqa_accuracy, anls, rouge_l])
def test_any_text_scores_one_against_itself_and_an_empty_one_zero(metric):
    for text in HARD_TEXTS:
        if metric is rouge_l and not any(c.isascii() and c.isalnum() for c in text):
            continue  # rouge_score has no words of other scripts
        assert metric(text, [text]) == 1.0
        assert metric("", [text]) == 0.0 and metric(text, []) == 0.0


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
