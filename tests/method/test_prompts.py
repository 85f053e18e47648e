"""Prompt pairs, to the byte."""

import hashlib
import json
import os
import pathlib

import pytest

from mmcot.texts.prompts import INPUTS, OUTPUTS, PAPER_NAMES, PICTURE_MARK, build_pair, gold_rationale
from mmcot.texts.sample import Sample

PROBLEM = Sample(
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


def replaced(**changes) -> Sample:
    return Sample.from_record(PROBLEM.to_record() | changes)


def test_every_format_has_an_expected_text_here():
    assert set(SOURCES) | {"QCA", "P", "V"} == set(INPUTS)
    assert set(TARGETS) | {"T", "C"} == set(OUTPUTS)


@pytest.mark.parametrize("name", SOURCES)
def test_source_of_each_input_format_ends_in_answer_or_solution(name):
    assert build_pair(PROBLEM, f"{name}-A")[0] == f"{SOURCES[name]} Answer:"
    assert build_pair(PROBLEM, f"{name}-LE")[0] == f"{SOURCES[name]} Solution:"


def test_source_of_qca_runs_into_its_ending_without_a_space():
    assert build_pair(PROBLEM, "QCA-E")[0] == f"{START} Answer: The answer is (B). BECAUSE:Solution:"


@pytest.mark.parametrize("name", TARGETS)
def test_target_of_each_output_format(name):
    assert build_pair(PROBLEM, f"QCM-{name}")[1] == TARGETS[name]


def test_pictures_and_captions_stand_alone():
    two = replaced(image=["a.png", "b.png"])
    assert build_pair(two, "V-C") == ("", "A tilted scale.")
    assert build_pair(two, "V-C", marks_pictures=True)[0] == f"{PICTURE_MARK} {PICTURE_MARK}"
    assert build_pair(two, "QM-C")[0].endswith("(B) the anvil") and build_pair(two, "V-A")[0] == ""
    assert build_pair(replaced(caption=""), "V-C")[1] == ""


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


@pytest.mark.parametrize("name", ["AL", "AE", "ALE", "AEL"])
def test_because_stays_in_a_target_without_lecture_and_solution(name):
    problem = replaced(solution="", lecture=" \t ")
    assert build_pair(problem, f"QCM-{name}")[1] == gold_rationale(problem, name) == "The answer is (B). BECAUSE:"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(name, f"{START} {OPTIONS} BECAUSE:") for name in ("QCML", "QCME", "QCMLE")],
        *[(name, f"{START} BECAUSE: {OPTIONS}") for name in ("QCLM", "QCEM", "QCLEM")],
    ],
)
def test_because_stays_in_a_source_without_lecture_and_solution(name, expected):
    assert build_pair(replaced(solution="", lecture=""), f"{name}-A")[0] == f"{expected} Answer:"


def test_because_stays_where_only_the_part_that_the_format_reads_is_empty():
    assert build_pair(replaced(solution=""), "QCM-AL")[1] == "The answer is (B). BECAUSE:"
    assert build_pair(replaced(lecture=""), "QCM-AE")[1] == "The answer is (B). BECAUSE:"
    assert build_pair(replaced(lecture=""), "QCML-A")[0] == f"{START} {OPTIONS} BECAUSE: Answer:"


def test_because_at_the_end_of_a_given_rationale_or_solution_stays():
    assert (
        build_pair(PROBLEM, "QCMG-A", rationale="Solution: it sinks BECAUSE: ")[0]
        == f"{START} {OPTIONS} Solution: it sinks BECAUSE: Answer:"
    )
    assert build_pair(replaced(solution="It sinks BECAUSE:\n"), "QCM-E")[1] == "Solution: It sinks BECAUSE:\\n"


def test_white_space_of_a_given_rationale_becomes_single_spaces_on_one_line():
    source, _ = build_pair(PROBLEM, "QCMG-A", rationale=" Solution:  one\n\ttwo   three \n")
    assert source == f"{START} {OPTIONS} Solution: one two three Answer:"


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
        ("CQM-A", False, "ba736e9f803e28aa123e0cd7ea5c45199192ddf44a5962c945a04117d23fddac"),
        ("CQMG-A", False, "adeb1da21f2514c6172ef14364da211d332bb0cc84817380aac5dda825f51663"),
        ("CQMG-A", True, "07a2847c96162c9ce5fd3da21591609ac0b7ddca9d10450df319293d58f4f08c"),
        ("QCM-AEL", False, "67e1cd7ca0fbea385a8777c1919ac9a8eb53718e63b841060bde03a47a682818"),
        ("QCM-AE", False, "c173eda6e85fd4485b4c77ca5ef22c17af850882af79dec004bcf7933b8156ed"),
        ("QCM-ALE", False, "15c8e4921529044cb761978f7f82c598bc4bf784789e592233e9fb842624b439"),
        ("QCM-AL", False, "143d4a05ae1578439bcdc3b76c854a11416d77e9d13a76de331a19582b3dfefc"),
        ("QCM-A", False, "5506740aa46ad04e5696fcf670193b0fd57b4c690b772fe3c915001d20c7aff5"),
        ("QCM-EA", False, "97eb3612147193edef9733ee6625c3c99a99555516b2c1dabbc53c24accd6cea"),
        ("QCM-ELA", False, "b01a8fcdf9e13de07f1a989262d210dc1bda986365d419b54cbc935ff0190fd4"),
        ("QCM-E", False, "9fd656a036e026ed10161b0b946e6e433e8e51a9b6a3dcfc1607ec0fb29e53cb"),
        ("QCM-LA", False, "e845291d3b9363e550933b9c7318d08aa9c9e93cb3dd79f001b6effd8391c1a4"),
        ("QCM-LEA", False, "54c36af034b885473cbba7edae77281ab9237a24a983a88afe9d697987de02c9"),
        ("QCM-LE", False, "eb76c92cdcd656108c317cd373de38564fb3a2e3245dd4f79454af9de1b1adc6"),
        ("QCME-A", False, "4286d83b3985bc552f2d2cedcde5a97e23612f658c70b9e30f6962d1c2872d24"),
        ("QCMG-A", False, "8f2ce966b38b982d07f9c365a0f1e5b9800eadbf92221d5e187b0c341e362497"),
        ("QCMG-A", True, "ea5d04df5d6733e1385c04c8806a27fd1d32eebf77c079b1a20d8369ae1c633e"),
        ("QCML-A", False, "6a50ac9acac441fb7807dabb25f4c8caeada28aeb710cc3b504b1dbe40ff47c6"),
        ("QCMLE-A", False, "41c413264191876b00c5b4945c29b9ee4da3ab328cf2b27cc06f8960005f74ef"),
        ("QM-A", False, "d6a4949a3c669ac06d9ec1a6268a3d94929c1e3f26f1580429d3c4108273c7f6"),
    ],
)
def test_real_questions_give_the_published_texts(name, use_caption, expected):
    assert hash_of_pairs(name, use_caption=use_caption, rationale_of=lambda record: None) == expected


@pytest.mark.parametrize("use_caption", [False, True])
@pytest.mark.parametrize("inputs", ["QCMG", "CQMG"])
def test_the_gold_rationale_given_as_a_text_makes_the_same_pairs(inputs, use_caption):
    def gold(record):
        return "Solution: {lecture} {solution}".format(
            **{key: record[key].replace("\n", "\\n") for key in ("lecture", "solution")}
        )

    given = hash_of_pairs(f"{inputs}-A", use_caption=use_caption, rationale_of=gold)
    assert given == hash_of_pairs(f"{inputs}-A", use_caption=use_caption, rationale_of=lambda record: None)


def hash_of_pairs(name, *, use_caption, rationale_of):
    """The hash over all real questions; the test is skipped where they are not."""
    folder = os.environ.get("MMCOT_SCIENCEQA_DIR")
    if not folder:
        pytest.skip("MMCOT_SCIENCEQA_DIR is not set")
    records = json.loads(pathlib.Path(folder, "problems.json").read_text())
    captions = json.loads(pathlib.Path(folder, "captions.json").read_text())["captions"]
    digest = hashlib.sha256()
    for qid in sorted(records, key=int):
        problem = Sample.from_scienceqa(qid, records[qid], captions.get(qid, ""))
        source, target = build_pair(problem, name, use_caption=use_caption, rationale=rationale_of(records[qid]))
        digest.update(f"{qid}\t{source}\t{target}\n".encode())
    return digest.hexdigest()
