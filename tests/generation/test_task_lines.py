"""The lines of a task's file, made of texts written by hand."""

from __future__ import annotations

import pytest

from data_shards.errors import ShardError
from data_shards.generated_texts import Task, list_tasks, verified_files, write_task
from data_shards.generation_ledger import read_ledger
from data_shards.rationale_reader import read_rationales
from data_shards.reader import SplitReader
from data_shards.text_lines import read_lines
from launcher.generation.task_lines import (
    add_counts,
    answers_of,
    count_lines,
    describe_summary,
    line_shape,
    task_lines,
)
from launcher.generation.text_tasks import write_split_texts
from launcher.stages.jobs import GenerationJob
from mmcot.decoding.requests import GeneratedText
from mmcot.texts.sample import Sample


def generated(text, *log_probs, finish="eos"):
    return GeneratedText(text, len(log_probs), finish, log_probs)


def sample(**fields):
    return Sample(qid="10", question="Which?", choices=("north", "south"), answer=0, **fields)


FOUR = [
    generated("It is  hot.", -1.0, -2.0),
    generated("It is cold.", -0.5, -0.25),
    generated("It is hot.", -0.5, -1.5, finish="length"),
    generated("Perhaps.", -0.125),
]


def test_one_candidate_has_the_line_that_it_always_had():
    lines = task_lines("rationale", ["10", "11"], [[FOUR[0]], [generated("Why.", finish="length")]], search="none")
    assert lines == [
        {"qid": "10", "rationale": "It is  hot.", "num_tokens": 2, "finish": "eos"},
        {"qid": "11", "rationale": "Why.", "num_tokens": 0, "finish": "length"},
    ]


def test_without_a_search_the_first_candidate_is_the_text_and_all_are_kept():
    (line,) = task_lines("rationale", ["10"], [FOUR], search="none")
    assert line.pop("candidates") == [
        {"candidate": 0, "rationale": "It is  hot.", "num_tokens": 2, "finish": "eos", "log_prob": -3.0},
        {"candidate": 1, "rationale": "It is cold.", "num_tokens": 2, "finish": "eos", "log_prob": -0.75},
        {"candidate": 2, "rationale": "It is hot.", "num_tokens": 2, "finish": "length", "log_prob": -2.0},
        {"candidate": 3, "rationale": "Perhaps.", "num_tokens": 1, "finish": "eos", "log_prob": -0.125},
    ]
    assert line == {"qid": "10", "rationale": "It is  hot.", "num_tokens": 2, "finish": "eos", "log_prob": -3.0}


def test_texts_without_answers_vote_by_their_words():
    (line,) = task_lines("rationale", ["10"], [FOUR], search="vote")
    assert (line["rationale"], line["log_prob"], line["finish"]) == ("It is hot.", -2.0, "length")
    assert line["agreement"] == 0.5 and len(line["candidates"]) == 4


@pytest.mark.parametrize(("format", "has_answer"), [("QCM-E", False), ("QCM-LE", False), ("V-C", False)])
def test_a_stage_of_rationales_or_captions_has_no_answers_to_vote_by(format, has_answer):
    assert (answers_of(format, [sample()]) is not None) == has_answer


def test_texts_with_answers_vote_by_these():
    texts = [
        generated("Up. The answer is (A).", -5.0),
        generated("Down. The answer is (B).", -0.5),
        generated("North. The answer is (A).", -4.0),
        generated("The answer is (Q).", -0.1),
        generated("The answer is (Q).", -0.1),
    ]
    answer_of = answers_of("QCM-LEA", [sample()])
    (line,) = task_lines("answer", ["10"], [texts], search="vote", answer_of=answer_of)
    assert line["answer"] == "North. The answer is (A)." and line["agreement"] == 0.4


def test_free_answers_that_the_score_takes_for_the_same_are_one():
    free = Sample(qid="1", question="Who?", answers=("the fox",))
    answer_of = answers_of("QCM-A", [free])
    assert answer_of(0, "The answer is The fox.") == answer_of(0, "The answer is fox.") == "fox"
    assert answer_of(0, "A fox.") is None


def test_each_question_is_answered_from_its_own_choices():
    two, three = sample(), Sample(qid="11", question="Which?", choices=("a", "b", "c"), answer=0)
    answer_of = answers_of("QCM-A", [two, three])
    assert [answer_of(index, "The answer is (C).") for index in range(2)] == [None, 2]


def test_candidates_without_log_probabilities_are_refused():
    texts = [GeneratedText("a", 2, "eos"), GeneratedText("b", 2, "eos")]
    with pytest.raises(ValueError, match="a candidate of 2 tokens has 0 log-probabilities"):
        task_lines("rationale", ["10"], [texts], search="none")


def test_counts_are_of_the_chosen_texts_with_the_candidates_beside_them():
    first = count_lines("rationale", task_lines("rationale", ["10"], [FOUR], search="vote"))
    assert first == {
        "num_samples": 1,
        "num_tokens": 2,
        "num_truncated": 1,
        "num_empty": 0,
        "num_repetitive": 0,
        "num_candidates": 4,
        "agreement": 0.5,
    }
    same = [[generated("yes", -1.0)] * 4] * 3
    total = add_counts([first, count_lines("rationale", task_lines("rationale", ["1", "2", "3"], same, search="vote"))])
    assert (total["num_samples"], total["num_candidates"], total["agreement"]) == (4, 16, 0.875)
    assert describe_summary(total) == (
        "4 texts of 16 candidates, 5 tokens; 1 cut at the length limit, 0 empty, 0 repetitive; mean agreement 0.875"
    )


def test_counts_without_candidates_are_those_that_they_always_were():
    counts = count_lines("rationale", task_lines("rationale", ["10"], [[FOUR[0]]], search="none"))
    assert set(counts) == {"num_samples", "num_tokens", "num_truncated", "num_empty", "num_repetitive"}
    assert add_counts([counts, counts]) == {name: 2 * value for name, value in counts.items()}
    assert describe_summary(counts) == "1 texts, 2 tokens; 0 cut at the length limit, 0 empty, 0 repetitive"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agreement": 1.5}, "the key 'agreement' is 1.5, expected a number from 0 to 1"),
        ({"log_prob": "-1"}, "the key 'log_prob' is '-1', expected a finite number"),
        ({"candidates": [{"candidate": 0}]}, "the key 'candidates', entry 1, the key 'rationale' is missing"),
    ],
)
def test_an_altered_line_is_named(tmp_path, change, message):
    (line,) = task_lines("rationale", ["10"], [FOUR], search="vote")
    good, bad = (
        write_task(tmp_path, Task("val", "val-000000", at, 1), [each]) for at, each in enumerate((line, line | change))
    )
    assert read_lines(good, line_shape("rationale")) == [line]
    with pytest.raises(ShardError, match=message):
        read_lines(bad, line_shape("rationale"))


def test_a_step_of_committed_candidates_is_closed_with_its_counts_and_its_ledger(tiny_settings, tiny_data, tmp_path):
    job = GenerationJob(
        stage="rationale",
        settings=tiny_settings,
        model_dir="none is opened",
        shards_dir=str(tiny_data.path),
        output_dir=str(tmp_path),
    )
    reader = SplitReader(tiny_data.path, "val")
    tasks = list_tasks(tiny_data.path, ["val"], task_samples=tiny_settings.generation.task_samples)
    for task in tasks:
        numbers = reader.samples_of_shard(task.shard)[task.start : task.start + task.num_samples]
        qids = [reader.qid(number) for number in numbers]
        lines = task_lines("rationale", qids, [FOUR] * len(qids), search="vote")
        write_task(tmp_path, task, lines, weights="w", seed=3)
    files, summary = write_split_texts(job, ["val"], {"candidates": 4})
    assert verified_files(tmp_path).keys() == files.keys() and len(files) == len(tasks)
    assert (summary["num_samples"], summary["num_candidates"], summary["agreement"]) == (16, 64, 0.5)
    texts = list(read_ledger(tmp_path))
    assert [(text.qid, text.candidate) for text in texts] == [(str(qid), at) for qid in reader.qids for at in range(4)]
    assert {(text.weights, text.seed) for text in texts} == {("w", 3)}
    assert set(read_rationales(tmp_path, "val").values()) == {"It is hot."}
