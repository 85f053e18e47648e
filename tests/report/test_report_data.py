"""What the report reads off a run, before any page."""

from __future__ import annotations

import math

from PIL import Image

from data_shards.atomic_files import commit_json, sha256_of_file
from launcher.config.loading import load_settings
from launcher.report.questions import choose_qids, find_pictures, judge, to_data_uri
from launcher.report.run_facts import agreement_with_intervals, curves_of, thin, wilson
from launcher.runs.journal import Journal, JournalReader
from launcher.runs.run_dir import RunDir
from mmcot.texts.prompts import gold_rationale
from mmcot.texts.sample import Sample


def test_an_interval_is_wilsons():
    assert wilson(8, 10) == (49.02, 94.33)  # the textbook's example, by R's binom.confint(8, 10, method='wilson')
    assert wilson(10, 10)[1] == 100.0 and wilson(0, 10)[0] == 0.0


def test_a_long_curve_is_thinned_to_its_extremes():
    points = [(step, math.sin(step) + (100 if step == 777 else 0)) for step in range(10_000)]
    kept = thin(points, limit=100)
    assert len(kept) <= 100 and kept[0] == points[0] and kept[-1] == points[-1] and points[777] in kept
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})


def test_of_a_repeated_step_the_first_value_counts_and_what_is_not_finite_is_null(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    for step, loss in ((1, 3.0), (2, float("nan")), (1, 9.0), (3, float("inf"))):
        journal.log(step, {"loss": loss})
    curve = curves_of(JournalReader(tmp_path / "m.jsonl").read())["loss"]
    assert curve == {"steps": [1, 2, 3], "values": [3.0, None, None], "num_points": 3}


def test_wrong_ones_are_chosen_first_and_always_the_same():
    qids = [str(number) for number in range(50)]
    chosen = choose_qids(qids, lambda qid: qid in ("7", "31"), 10)
    assert (
        set(chosen[:2]) == {"7", "31"}
        and len(chosen) == 10
        and chosen == choose_qids(reversed(qids), lambda qid: qid in ("7", "31"), 10)
    )


def test_a_large_picture_becomes_a_small_one():
    uri = to_data_uri(Image.effect_noise((1200, 600), 60).convert("RGB"))
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 60_000


def test_a_rationale_is_right_word_for_word_and_an_unread_answer_is_wrong():
    problem = Sample(qid="1", question="?", choices=("a", "b"), answer=0, solution="The land is red.")
    said = {
        "1": {"rationale": "Solution:  The land\nis red.", "answer_text": "The answer is (A).", "prediction": 0},
        "2": {"rationale": "Solution: The land is blue.", "answer_text": "what", "prediction": None},
        "3": {"rationale": "Solution: The land is red."},  # not answered yet
        "4": {"rationale": "of another data set", "prediction": 0},
    }
    judged = judge(said, dict.fromkeys("123", problem), lambda problem: gold_rationale(problem, "QCM-E"))
    assert [judged[qid]["rationale_right"] for qid in "123"] == [True, False, True] and set(judged) == set("123")
    assert [judged[qid]["right"] for qid in "123"] == [True, False, None]
    assert judged["1"]["rouge_l"] == 1.0 and judged["2"]["rouge_l"] == 0.8  # four of five words in common


def test_pictures_of_a_data_set_that_has_changed_are_not_taken(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"qid": "a", "question": "?", "choices": ["x", "y"], "answer": 0, "split": "test"}\n')
    commit_json(tmp_path / "shards" / "inputs.json", {"files": {rows.name: sha256_of_file(rows)}})
    settings = load_settings(preset="demo", overrides=[f"data.path={rows}"])
    found = [find_pictures(RunDir(tmp_path / "runs" / "a"), settings, tmp_path / "shards")]
    rows.write_text(rows.read_text().replace("?", "!"))
    found.append(find_pictures(RunDir(tmp_path / "runs" / "a"), settings, tmp_path / "shards"))
    assert found[0] is not None and found[1] is None


def test_accuracy_by_agreement_has_wilsons_interval_and_is_empty_without_a_vote():
    part = {"up_to": 0.25, "num_questions": 8, "num_right": 3, "accuracy": 37.5}
    section = {"mean": 0.2, "bins": [part]}
    assert agreement_with_intervals({"accuracy": {}}) == {}
    low, high = wilson(3, 8)
    assert agreement_with_intervals({"rationale_agreement": section}) == {
        "rationale_agreement": {"mean": 0.2, "bins": [part | {"low": low, "high": high}]}
    }
