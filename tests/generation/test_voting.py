"""The vote of sampled texts: its rules by hand, and what holds for all votes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcot.decoding.voting import Vote, vote

ANSWERS = st.none() | st.integers(0, 3) | st.sampled_from(["yes", "no"])
LOG_PROBS = st.floats(-50, 0) | st.sampled_from([-1.0, -2.0])  # equal ones occur
TEXTS = st.lists(st.tuples(ANSWERS, LOG_PROBS), min_size=1, max_size=9)


def vote_of(texts):
    return vote(*map(list, zip(*texts, strict=True)))


def test_most_votes_win_and_the_likeliest_text_of_the_winners_is_chosen():
    assert vote([1, 0, 1, None], [-3.0, -0.1, -2.5, -0.2]) == Vote(2, 0.5)


def test_a_tie_goes_to_the_answer_with_the_likeliest_text():
    assert vote([0, 1, 0, 1], [-2.0, -9.0, -2.0, -1.0]) == Vote(3, 0.5)


def test_equally_likely_texts_are_decided_by_their_number():
    assert vote([1, 0, 0, 1], [-2.0, -2.0, -2.0, -2.0]) == Vote(0, 0.5)


def test_without_any_answer_the_likeliest_text_is_chosen_without_agreement():
    assert vote([None, None, None], [-3.0, -1.0, -2.0]) == Vote(1, 0.0)


def test_one_answer_that_can_be_read_wins_over_likelier_texts_without_one():
    assert vote([None, 0, None, None], [-1.0, -9.0, -1.0, -1.0]) == Vote(1, 0.25)


@pytest.mark.parametrize(("answers", "log_probs"), [([], []), ([1, 2], [-1.0])])
def test_texts_that_do_not_fit_are_refused(answers, log_probs):
    with pytest.raises(ValueError, match="must be of the same texts"):
        vote(answers, log_probs)


@given(ANSWERS, LOG_PROBS)
def test_one_candidate_is_the_text_itself(answer, log_prob):
    assert vote([answer], [log_prob]) == Vote(0, float(answer is not None))


@given(TEXTS)
def test_agreement_is_the_share_of_the_chosen_answer_and_no_other_has_more(texts):
    found = vote_of(texts)
    answer = texts[found.chosen][0]
    counts = [sum(other == each for other, _ in texts) for each, _ in texts if each is not None]
    assert 0 <= found.agreement <= 1
    assert found.agreement * len(texts) == pytest.approx(max(counts, default=0))
    if answer is not None:
        assert sum(other == answer for other, _ in texts) == max(counts)


@given(TEXTS)
def test_no_text_with_the_chosen_answer_is_likelier(texts):
    answer, log_prob = texts[vote_of(texts).chosen]
    assert log_prob == max(other_log_prob for other, other_log_prob in texts if other == answer)


@given(TEXTS, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_matters_only_where_they_are_equally_likely(texts, random):
    shuffled = random.sample(texts, len(texts))
    first, second = vote_of(texts), vote_of(shuffled)
    assert first.agreement == second.agreement
    assert texts[first.chosen][1] == shuffled[second.chosen][1]
    if len({log_prob for _, log_prob in texts}) == len(texts):
        assert texts[first.chosen] == shuffled[second.chosen]


@given(TEXTS, st.permutations(range(4)))
def test_the_names_of_the_answers_do_not_matter(texts, names):
    renamed = [(names[answer] if isinstance(answer, int) else answer, log_prob) for answer, log_prob in texts]
    assert vote_of(renamed) == vote_of(texts)
