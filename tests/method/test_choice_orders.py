"""Choices that are changed: the right one stays right, and letters move as the change says."""

from __future__ import annotations

import random

import pytest

from launcher.stages.samples import with_permuted_choices
from mmcot.texts.choice_orders import CHANGES, change_choices
from mmcot.texts.sample import Sample

OTHERS = ("owl", "fox", "b")


def problem_of(*choices, answer=0, qid="7"):
    return Sample(qid=qid, question="Which?", choices=choices, answer=answer)


def changed(problem, change, seed=0):
    return change_choices(problem, change, rng=random.Random(seed), others=OTHERS)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(20))
def test_the_right_choice_stays_right_under_every_change(change, seed):
    for number in (2, 3, 4, 5):
        for answer in range(number):
            found = changed(problem_of(*"abcde"[:number], answer=answer), change, seed)
            assert found is None or found.choices[found.answer] == "abcde"[answer]


def test_reversing_and_rotating_keep_all_choices():
    assert changed(problem_of("a", "b", "c"), "reversed").choices == ("c", "b", "a")
    assert changed(problem_of("a", "b", "c"), "rotated").choices == ("b", "c", "a")


def test_one_distractor_is_replaced_removed_or_added_and_never_doubled():
    problem = problem_of("a", "b", "c", answer=1)
    replaced, removed, added = (changed(problem, f"one {what}") for what in ("replaced", "removed", "added"))
    assert len(set(replaced.choices)) == 3 and len(set(replaced.choices) - set(problem.choices)) == 1
    assert len(removed.choices) == 2 and set(removed.choices) < set(problem.choices)
    assert len(set(added.choices)) == 4 and set(added.choices) > set(problem.choices)


def test_no_change_where_it_would_make_another_kind_of_question():
    assert changed(problem_of("a", "b"), "one removed") is None
    assert changed(problem_of("a", "b", "c", "d"), "one added") is None


def test_an_unknown_change_is_refused():
    with pytest.raises(ValueError, match="change 'sorted' is unknown; expected one of as given, reversed"):
        changed(problem_of("a", "b", "c"), "sorted")


def test_training_shows_the_choices_of_a_question_in_an_order_of_seed_qid_and_epoch_alone():
    problem = problem_of("a", "b", "c", "d", answer=2)
    orders = [with_permuted_choices(problem, seed=0, epoch=epoch).choices for epoch in range(50)]
    assert orders == [with_permuted_choices(problem, seed=0, epoch=epoch).choices for epoch in range(50)]
    assert len(set(orders)) > 10
    assert orders != [with_permuted_choices(problem, seed=1, epoch=epoch).choices for epoch in range(50)]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert (
        with_permuted_choices(problem, seed=0, epoch=3).choices[with_permuted_choices(problem, seed=0, epoch=3).answer]
        == "c"
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_question_without_choices_has_no_change(change):
    question = Sample("f", "How many?", answers=("2",))
    changed = change_choices(question, change, rng=random.Random(0), others=["x"])
    assert changed is (question if change == "as given" else None)
