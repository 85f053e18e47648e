"""Agreement of candidates, from the files of texts to predictions, scores and metrics."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.atomic_files import commit_json, sha256_of_file
from data_shards.errors import ShardError
from data_shards.generated_texts import Task, close_output, open_output, write_task
from data_shards.text_lines import read_lines
from launcher.config.chains import CHAINS
from launcher.evaluation.agreement import agreement_lines, agreement_report, flat_agreement, read_agreements
from launcher.evaluation.predictions import PREDICTION, score, write_predictions
from launcher.pipeline.scoring import flat_scores
from launcher.runs.records import read_scores
from mmcot.errors import InputError
from mmcot.texts.sample import Sample

TASK = Task("test", "test-000000", 0, 4)
QIDS = ("a", "b", "c", "d")
PROBLEMS = {
    qid: Sample(qid=qid, question="Which?", choices=("north", "south"), answer=0, solution="Up.", grade="grade3")
    for qid in QIDS
}
AGREEMENTS = (1.0, 0.75, 0.25, 1.0)
LETTERS = "AABB"  # a and b are right


def write_output(folder, field, texts, agreements):
    open_output(folder, {})
    lines = [
        {"qid": qid, field: text, "num_tokens": 1, "finish": "eos", **({} if share is None else {"agreement": share})}
        for qid, text, share in zip(QIDS, texts, agreements, strict=True)
    ]
    path = write_task(folder, TASK, lines)
    close_output(
        folder, files={TASK.file_name: {"sha256": sha256_of_file(path), "num_samples": len(lines)}}, summary={}
    )
    return folder


def predict(folder, *, agreements=AGREEMENTS, rationale_agreements=None):
    answers = write_output(folder / "parts", "answer", [f"The answer is ({letter})." for letter in LETTERS], agreements)
    rationales = dict.fromkeys(QIDS, "Up.")
    return write_predictions(
        folder / "test.jsonl",
        parts_dir=answers,
        tasks=[TASK],
        problems=PROBLEMS,
        texts={"rationales": rationales},
        chain=CHAINS["two-stage"],
        format="QCMG-A",
        rationale_agreements=rationale_agreements or {},
    )


def scores_of(lines):
    return score(lines, PROBLEMS, split="test", gold_reasons=lambda sample: sample.solution)


def test_predictions_have_the_agreements_of_answer_and_rationale(tmp_path):
    lines = predict(tmp_path, rationale_agreements={"a": 0.5, "b": 0.5, "c": 1.0, "d": 1.0})
    assert [line["agreement"] for line in lines] == list(AGREEMENTS)
    assert [line["rationale_agreement"] for line in lines] == [0.5, 0.5, 1.0, 1.0]
    assert read_lines(tmp_path / "test.jsonl", PREDICTION) == lines


def test_predictions_and_scores_without_a_vote_are_what_they_always_were(tmp_path):
    lines = predict(tmp_path, agreements=(None,) * 4)
    assert set(lines[0]) == {"qid", "rationale", "answer_text", "prediction"}
    assert not any("agreement" in name for name in scores_of(lines))
    assert not any("agreement" in name for name in flat_scores(scores_of(lines)))
    assert agreement_lines(scores_of(lines)) == []


def test_accuracy_is_told_for_each_quarter_of_agreement_with_its_questions(tmp_path):
    scores = scores_of(predict(tmp_path))
    assert scores["agreement"] == {
        "mean": 0.75,
        "bins": [
            {"up_to": 0.25, "num_questions": 1, "num_right": 0, "accuracy": 0.0},
            {"up_to": 0.5, "num_questions": 0, "num_right": 0, "accuracy": None},
            {"up_to": 0.75, "num_questions": 1, "num_right": 1, "accuracy": 100.0},
            {"up_to": 1.0, "num_questions": 2, "num_right": 1, "accuracy": 50.0},
        ],
    }
    assert agreement_lines(scores) == [
        "agreement of answers 0.75; accuracy up to 0.25: 0.0 (1), 0.75: 100.0 (1), 1: 50.0 (2)"
    ]


def test_every_score_of_agreement_has_a_name_in_mlflow(tmp_path):
    scores = scores_of(predict(tmp_path, rationale_agreements=dict.fromkeys(QIDS, 0.5)))
    assert flat_agreement(scores) == {
        "test_agreement": 0.75,
        "test_accuracy_at_agreement_25": 0.0,
        "test_accuracy_at_agreement_50": None,
        "test_accuracy_at_agreement_75": 100.0,
        "test_accuracy_at_agreement_100": 50.0,
        "test_rationale_agreement": 0.5,
        "test_accuracy_at_rationale_agreement_25": None,
        "test_accuracy_at_rationale_agreement_50": 50.0,
        "test_accuracy_at_rationale_agreement_75": None,
        "test_accuracy_at_rationale_agreement_100": None,
    }
    assert flat_agreement(scores).items() <= flat_scores(scores).items()


@given(st.lists(st.tuples(st.sampled_from(QIDS), st.integers(0, 5), st.booleans()), min_size=1))
def test_every_question_is_in_one_bin_and_all_bins_make_the_whole_accuracy(votes):
    lines = [{"qid": qid, "agreement": count / 5, "prediction": int(not right)} for qid, count, right in votes]
    report = agreement_report(lines, PROBLEMS, key="agreement")
    assert sum(part["num_questions"] for part in report["bins"]) == len(votes)
    assert sum(part["num_right"] for part in report["bins"]) == sum(right for *_, right in votes)


def test_agreements_are_read_from_verified_files_where_there_was_a_vote(tmp_path):
    folder = write_output(tmp_path / "rationales", "rationale", ["Up."] * 4, AGREEMENTS)
    assert read_agreements(folder, "test") == dict(zip(QIDS, AGREEMENTS, strict=True))
    assert read_agreements(folder, "val") == {}
    without = write_output(tmp_path / "greedy", "rationale", ["Up."] * 4, (None,) * 4)
    assert read_agreements(without, "test") == {}
    path = folder / TASK.file_name
    path.write_text(path.read_text().replace("0.75", "0.50"))
    with pytest.raises(ShardError, match="is missing or not what was written"):
        read_agreements(folder, "test")


def test_scores_with_agreement_are_read_and_altered_ones_named(tmp_path):
    path, scores = tmp_path / "scores.json", scores_of(predict(tmp_path))
    commit_json(path, scores)
    assert read_scores(path) == json.loads(json.dumps(scores))
    commit_json(path, scores | {"agreement": {"mean": 75, "bins": []}})
    with pytest.raises(InputError, match="the key 'agreement', the key 'mean' is 75, expected a number from 0 to 1"):
        read_scores(path)
