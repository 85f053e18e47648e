"""MiniSQA: the layout, the quotas, and that nothing is shared between its splits."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from data_shards.mini_sqa import skills as mini_sqa_skills
from data_shards.mini_sqa.generate import (
    compute_ceilings,
    content_sha256,
    write_mini_sqa,
)
from mmcot.metrics.metrics import accuracy_table
from mmcot.texts.sample import Sample

SIZES = {"train": 1600, "val": 160, "test": 400}
FIELDS = {
    "question",
    "choices",
    "answer",
    "hint",
    "image",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
    "split",
}
# content_sha256 of write_mini_sqa(num_train=40, num_val=16, num_test=16, seed=0); it changes
# only together with VERSION.
GOLDEN_SHA256 = "d865b977d9c6127adc139cc49b53e8a3f14ed0947beb0cd4da529ce86b5119d6"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini_sqa")
    write_mini_sqa(folder, **{f"num_{split}": size for split, size in SIZES.items()}, seed=3)
    return folder


@pytest.fixture(scope="module")
def problems(data_dir):
    return _read(data_dir, "problems.json")


def _read(data_dir, name):
    return json.loads((data_dir / name).read_text(encoding="utf-8"))


def _by_skill(problems, split="train"):
    rows = defaultdict(list)
    for record in problems.values():
        if record["split"] == split:
            rows[record["skill"]].append(record)
    return rows


def _told(record):
    """What the text of a row tells of its hidden fact, found without the generator."""
    if record["image"] is None:
        return record["solution"]
    return next((word for word in ("north", "east") if word in record["question"]), "")


def _right(record):
    """The right choice in words; its letter says nothing, because every row has an order of its own."""
    return record["choices"][record["answer"]]


def test_every_record_has_exactly_the_fields_of_scienceqa_and_is_a_problem(problems):
    for qid, record in problems.items():
        assert set(record) == FIELDS
        assert Sample.from_scienceqa(qid, record).answer_letter in "ABCDE"


def test_qids_run_over_all_splits_and_the_splits_list_them(data_dir, problems):
    splits = _read(data_dir, "pid_splits.json")
    assert list(problems) == [str(number) for number in range(1, sum(SIZES.values()) + 1)]
    assert {split: len(splits[split]) for split in SIZES} == SIZES
    assert all(problems[qid]["split"] == split for split in SIZES for qid in splits[split])
    assert splits["trainval"] == splits["train"] + splits["val"]
    for split, size in SIZES.items():
        assert splits[f"mini{split}"] == splits[split][: size // 10]


def test_every_question_with_a_picture_has_a_64_pixel_file_and_a_caption_and_no_other_has(data_dir, problems):
    captions = _read(data_dir, "captions.json")["captions"]
    pictured = {qid for qid, record in problems.items() if record["image"] is not None}
    assert set(captions) == pictured
    files = {path.relative_to(data_dir / "images").as_posix() for path in (data_dir / "images").rglob("*.png")}
    assert files == {f"{problems[qid]['split']}/{qid}/image.png" for qid in pictured}
    with Image.open(data_dir / "images" / next(iter(files))) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_the_eight_skills_have_equal_shares_of_every_split(problems):
    for split, size in SIZES.items():
        assert [len(rows) for rows in _by_skill(problems, split).values()] == [size // 8] * 8


def test_hidden_facts_come_by_quota_and_not_by_chance(problems):
    rows = _by_skill(problems)
    for skill in mini_sqa_skills.SKILLS:
        intended = Counter()
        for fact, share in skill.table:
            intended[skill.solve(fact)] += share
        counts = Counter(record["solution"] for record in rows[skill.skill])
        for solution, share in intended.items():
            assert abs(counts[solution] - share * len(rows[skill.skill])) < 2


def test_one_caption_in_ten_tells_the_key_fact(data_dir, problems):
    captions = _read(data_dir, "captions.json")["captions"]
    generic = {scene for skill in mini_sqa_skills.SKILLS for scene in skill.scenes}
    telling = [qid for qid, caption in captions.items() if caption not in generic and problems[qid]["split"] == "train"]
    assert len(telling) == 5 * 20


def test_no_two_rows_share_their_text(problems):
    texts = [(record["question"], record["hint"], *record["choices"]) for record in problems.values()]
    assert len(set(texts)) == len(texts)


def test_no_two_pictures_are_equal(data_dir):
    pictures = []
    for path in sorted((data_dir / "images").rglob("*.png")):
        with Image.open(path) as image:
            pictures.append(np.asarray(image).tobytes())
    assert len(pictures) == sum(SIZES.values()) * 5 // 8
    assert len(set(pictures)) == len(pictures)


def test_no_word_of_an_image_question_gives_the_answer_away(problems):
    groups = defaultdict(list)
    for record in problems.values():
        if record["image"] is not None:
            groups[record["skill"], _told(record)].append(record)
    for records in groups.values():
        commonest = Counter(_right(record) for record in records).most_common(1)[0][0]
        share = np.mean([_right(record) == commonest for record in records])
        words = defaultdict(list)
        for record in records:
            for word in set(f"{record['question']} {record['hint']}".split()):
                words[word].append(_right(record) == commonest)
        for word, outcomes in words.items():
            deviation = (np.mean(outcomes) - share) * (len(outcomes) / (share * (1 - share))) ** 0.5
            assert abs(deviation) < 4.5, word  # standard deviations; some hundreds of words are looked at


def test_ceilings_match_a_count_over_the_written_rows(data_dir, problems):
    ceilings = _read(data_dir, "ceilings.json")["per_skill"]
    assert ceilings == compute_ceilings()["per_skill"]
    for skill, records in _by_skill(problems).items():
        direct = chain = 0
        for told in {_told(record) for record in records}:
            group = [record for record in records if _told(record) == told]
            direct += max(Counter(map(_right, group)).values())
            written = ""
            while remaining := [r for r in group if r["solution"].startswith(written) and r["solution"] != written]:
                written += Counter(record["solution"][len(written)] for record in remaining).most_common(1)[0][0]
            answer = next(_right(record) for record in group if record["solution"] == written)
            chain += sum(_right(record) == answer for record in group)
        assert direct / len(records) == pytest.approx(ceilings[skill]["direct_text"], abs=0.02)
        assert chain / len(records) == pytest.approx(ceilings[skill]["chain_text"], abs=0.02)


def test_without_the_picture_a_chain_answers_worse_than_no_chain():
    per_skill = compute_ceilings()["per_skill"].values()
    direct = np.mean([skill["direct_text"] for skill in per_skill])
    chain = np.mean([skill["chain_text"] for skill in per_skill])
    assert direct == pytest.approx(0.75125)  # by hand: (3 + .60 + .65 + .50 + .60 + .66) / 8
    assert chain == pytest.approx(0.62375)  # by hand: (3 + .40 + .35 + .50 + .40 + .34) / 8


def test_every_column_of_the_score_table_is_filled(problems):
    test_problems = [Sample.from_scienceqa(qid, row) for qid, row in problems.items() if row["split"] == "test"]
    table = accuracy_table(test_problems, {problem.qid: problem.answer for problem in test_problems})
    assert len(table) == 9
    assert set(table.values()) == {100.0}


def test_some_language_rows_have_neither_lecture_nor_hint_and_solutions_are_short(problems):
    language = [record for record in problems.values() if record["subject"] == "language science"]
    assert any(not record["lecture"] and not record["hint"] for record in language)
    assert max(len(record["solution"].split()) for record in problems.values()) < 35


def test_nuisance_words_stay_out_of_the_solutions(problems):
    names = set(mini_sqa_skills.WORDS["name"]) | set(mini_sqa_skills.WORDS["island"])
    assert not any(names & set(record["solution"].replace(".", "").split()) for record in problems.values())


def test_a_small_draw_has_its_golden_content(tmp_path):
    write_mini_sqa(tmp_path, num_train=40, num_val=16, num_test=16, seed=0)
    assert content_sha256(tmp_path) == GOLDEN_SHA256


def test_the_same_arguments_write_the_same_content_and_another_seed_does_not(tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        write_mini_sqa(tmp_path / name, num_train=33, num_val=7, num_test=0, seed=seed)
    first, again, other = (content_sha256(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again != other


def test_an_exhausted_space_of_texts_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    for slot, words in (("name", ("Ada", "Ben")), ("place", ("at home",)), ("time", ("at noon",))):
        monkeypatch.setitem(mini_sqa_skills.WORDS, slot, words)
    with pytest.raises(ValueError, match="no new question text for the skill .* generate fewer questions"):
        write_mini_sqa(tmp_path, num_train=800, num_val=0, num_test=0)


def test_a_negative_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_val \(-1\) must be 0 or more"):
        write_mini_sqa(tmp_path, num_val=-1)


def test_by_default_every_question_has_an_order_of_its_choices_of_its_own(tmp_path):
    for name, options in (("fixed", {"shuffle_choices": False}), ("default", {})):
        write_mini_sqa(tmp_path / name, num_train=160, num_val=0, num_test=0, seed=5, **options)
    fixed, shuffled = (json.loads((tmp_path / name / "problems.json").read_text()) for name in ("fixed", "default"))
    assert all(
        sorted(fixed[qid]["choices"]) == sorted(shuffled[qid]["choices"])
        and _right(fixed[qid]) == _right(shuffled[qid])
        for qid in fixed
    )
    kept = sum(fixed[qid]["choices"] == shuffled[qid]["choices"] for qid in fixed)
    assert 15 < kept < 75  # a half of two choices, a sixth of three, fewer of more
    left_out = {"choices", "answer"}
    assert all(
        {k: v for k, v in fixed[qid].items() if k not in left_out}
        == {k: v for k, v in shuffled[qid].items() if k not in left_out}
        for qid in fixed
    )


def test_half_of_the_questions_bring_choices_of_other_skills_beside_all_of_their_own(tmp_path):
    for name, most in (("none", 0), ("two", 2)):
        write_mini_sqa(
            tmp_path / name, num_train=400, num_val=0, num_test=0, seed=5, shuffle_choices=False, extra_choices=most
        )
    plain, extended = (json.loads((tmp_path / name / "problems.json").read_text()) for name in ("none", "two"))
    own = {skill.skill: skill.choices for skill in mini_sqa_skills.SKILLS}
    everywhere = {choice for choices in own.values() for choice in choices}
    extra = []
    for qid, record in extended.items():
        assert tuple(plain[qid]["choices"]) == own[record["skill"]]
        assert (
            record["choices"][: len(plain[qid]["choices"])] == plain[qid]["choices"]
            and record["answer"] == plain[qid]["answer"]
        )
        extra.append(record["choices"][len(plain[qid]["choices"]) :])
        assert set(extra[-1]) <= everywhere - set(own[record["skill"]])
    assert max(map(len, extra)) == 2 and max(len(record["choices"]) for record in extended.values()) == 5
    assert 0.4 < sum(map(bool, extra)) / len(extra) < 0.6
