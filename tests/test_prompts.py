"""Prompt pairs, to the byte."""

import hashlib
import json
import os
import pathlib

import pytest

from mmcot.problem import Problem
from mmcot.prompts import INPUTS, OUTPUTS, PAPER_NAMES, build_pair, gold_rationale

PROBLEM = Problem(
    qid="1",
    question="Which object is  heavier?",
    choices=("the feather", "the anvil"),
    answer=1,
    hint="Two things lie on a scale.",
    images=("image.png",),
    lecture="Weight is a force.\nA scale measures it.",
    solution="The anvil sinks.",
    caption="A tilted scale.",
)
START = "Question: Which object is heavier? Context: Two things lie on a scale."
OPTIONS = "Options: (A) the feather (B) the anvil"
LECTURE = "Weight is a force.\\nA scale measures it."
SOLUTION = "The anvil sinks."

SOURCES = {
    "QCM": f"{START} {OPTIONS}",
    "CQM": f"Context: Two things lie on a scale. Question: Which object is heavier? {OPTIONS}",
    "QM": f"Question: Which object is heavier? {OPTIONS}",
    "QC": START,
    "QCMG": f"{START} {OPTIONS} Solution: {LECTURE} {SOLUTION}",
    "CQMG": f"Context: Two things lie on a scale. Question: Which object is heavier? {OPTIONS}"
    f" Solution: {LECTURE} {SOLUTION}",
    "QCML": f"{START} {OPTIONS} BECAUSE: {LECTURE}",
    "QCME": f"{START} {OPTIONS} BECAUSE: {SOLUTION}",
    "QCMLE": f"{START} {OPTIONS} BECAUSE: {LECTURE} {SOLUTION}",
    "QCLM": f"{START} BECAUSE: {LECTURE} {OPTIONS}",
    "QCEM": f"{START} BECAUSE: {SOLUTION} {OPTIONS}",
    "QCLEM": f"{START} BECAUSE: {LECTURE} {SOLUTION} {OPTIONS}",
    "QCMA": f"{START} {OPTIONS} Answer: The answer is (B).",
}

TARGETS = {
    "A": "The answer is (B).",
    "E": f"Solution: {SOLUTION}",
    "LE": f"Solution: {LECTURE} {SOLUTION}.",
    "AL": f"The answer is (B). BECAUSE: {SOLUTION}",
    "AE": f"The answer is (B). BECAUSE: {LECTURE}",
    "ALE": f"The answer is (B). BECAUSE: {LECTURE} {SOLUTION}",
    "AEL": f"The answer is (B). BECAUSE: {SOLUTION} {LECTURE}",
    "LA": f"{LECTURE} The answer is (B).",
    "EA": f"{SOLUTION} The answer is (B).",
    "LEA": f"{LECTURE} {SOLUTION} The answer is (B).",
    "ELA": f"{SOLUTION} {LECTURE} The answer is (B).",
}


def replaced(**changes) -> Problem:
    return Problem.from_record(PROBLEM.to_record() | changes)


def test_every_format_has_an_expected_text_here():
    assert set(SOURCES) | {"QCA"} == set(INPUTS)
    assert set(TARGETS) == set(OUTPUTS)


@pytest.mark.parametrize("name", SOURCES)
def test_source_of_each_input_format_ends_in_answer_or_solution(name):
    assert build_pair(PROBLEM, f"{name}-A")[0] == f"{SOURCES[name]} Answer:"
    assert build_pair(PROBLEM, f"{name}-LE")[0] == f"{SOURCES[name]} Solution:"


def test_source_of_qca_runs_into_its_ending_without_a_space():
    assert build_pair(PROBLEM, "QCA-E")[0] == f"{START} Answer: The answer is (B). BECAUSE:Solution:"


@pytest.mark.parametrize("name", TARGETS)
def test_target_of_each_output_format(name):
    assert build_pair(PROBLEM, f"QCM-{name}")[1] == TARGETS[name]


def test_an_output_with_the_answer_among_others_is_prompted_by_solution():
    assert build_pair(PROBLEM, "QCM-ALE")[0].endswith(" Solution:")


def test_caption_follows_the_hint_when_asked_for():
    source, _ = build_pair(PROBLEM, "QCM-A", use_caption=True)
    assert "Context: Two things lie on a scale. A tilted scale. Options:" in source


def test_caption_alone_becomes_the_context():
    assert "Context: A tilted scale. Options:" in build_pair(replaced(hint=""), "QCM-A", use_caption=True)[0]


def test_missing_context_is_written_as_not_available():
    assert "Context: N/A Options:" in build_pair(replaced(hint=""), "QCM-A")[0]


def test_given_rationale_is_read_verbatim_in_place_of_the_gold_one():
    source, _ = build_pair(PROBLEM, "QCMG-A", rationale="Solution: I think {so}.")
    assert source == f"{START} {OPTIONS} Solution: I think {{so}}. Answer:"


def test_empty_rationale_is_not_replaced_by_the_gold_one():
    assert build_pair(PROBLEM, "QCMG-A", rationale="")[0] == f"{START} {OPTIONS} Answer:"


def test_rationale_changes_nothing_in_formats_that_do_not_read_it():
    assert build_pair(PROBLEM, "QCM-A", rationale="Solution: no.") == build_pair(PROBLEM, "QCM-A")


def test_the_word_answer_with_a_colon_is_removed_from_the_target_only():
    problem = replaced(solution="Answer: the anvil.")
    source, target = build_pair(problem, "QCME-E")
    assert target == "Solution: the anvil."
    assert "BECAUSE: Answer: the anvil." in source


def test_reason_is_not_announced_where_none_follows():
    assert build_pair(replaced(solution=""), "QCM-AL")[1] == "The answer is (B)."
    assert build_pair(replaced(solution="", lecture=""), "QCM-ALE")[1] == "The answer is (B)."


def test_empty_solution_leaves_its_heading():
    assert build_pair(replaced(solution=""), "QCM-E")[1] == "Solution:"


def test_question_without_answer_has_a_source_and_an_empty_target():
    problem = replaced(answer=None)
    assert build_pair(problem, "QCM-A") == (f"{START} {OPTIONS} Answer:", "")
    assert build_pair(problem, "QCM-E")[1] == f"Solution: {SOLUTION}"


def test_input_that_shows_the_answer_refuses_a_question_without_one():
    with pytest.raises(ValueError, match=r"question 1 has no answer.*'QCMA-E'.*such as QCM"):
        build_pair(replaced(answer=None), "QCMA-E")


@pytest.mark.parametrize("name", PAPER_NAMES)
def test_names_of_the_paper_are_understood_with_either_arrow(name):
    expected = build_pair(PROBLEM, PAPER_NAMES[name])
    assert build_pair(PROBLEM, name) == build_pair(PROBLEM, name.replace("→", "->")) == expected


def test_unknown_format_is_named_with_the_nearest_and_all_known_ones():
    with pytest.raises(ValueError, match="'qcm-le' is unknown.*CQMG.*ELA.*did you mean 'QCM-LE'"):
        build_pair(PROBLEM, "qcm-le")


def test_gold_rationale_is_the_stage_one_target():
    assert gold_rationale(PROBLEM, "QCM-E") == gold_rationale(PROBLEM, "E") == TARGETS["E"]
    assert gold_rationale(PROBLEM, "QCM-LE") == TARGETS["LE"]


# sha256 over lines "qid<TAB>source<TAB>target<LF>" in numeric qid order, made with the
# published system's own prompt code on a subset of 1,218 ScienceQA questions.
@pytest.mark.parametrize(
    ("name", "use_caption", "expected"),
    [
        ("QCM-E", False, "9fd656a036e026ed10161b0b946e6e433e8e51a9b6a3dcfc1607ec0fb29e53cb"),
        ("QCMG-A", True, "ea5d04df5d6733e1385c04c8806a27fd1d32eebf77c079b1a20d8369ae1c633e"),
    ],
)
def test_real_questions_give_the_published_texts(name, use_caption, expected):
    folder = os.environ.get("MMCOT_SCIENCEQA_DIR")
    if not folder:
        pytest.skip("MMCOT_SCIENCEQA_DIR is not set")
    records = json.loads(pathlib.Path(folder, "problems.json").read_text())
    captions = json.loads(pathlib.Path(folder, "captions.json").read_text())["captions"]
    digest = hashlib.sha256()
    for qid in sorted(records, key=int):
        problem = Problem.from_scienceqa(qid, records[qid], captions.get(qid, ""))
        source, target = build_pair(problem, name, use_caption=use_caption)
        digest.update(f"{qid}\t{source}\t{target}\n".encode())
    assert digest.hexdigest() == expected
