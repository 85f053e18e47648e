"""Reading the chosen option out of generated text."""

import pytest

from mmcot.texts.answers import guess_answer, parse_answer


def test_answer_is_read_wherever_it_stands():
    assert parse_answer("The answer is (B).", 4) == 1
    assert parse_answer("An anvil sinks. The answer is (A). BECAUSE: it is heavy.", 2) == 0


@pytest.mark.parametrize("text", ["", "B", "The answer is B.", "the answer is (B).", "The answer is (b)."])
def test_text_without_the_known_words_has_no_answer(text):
    assert parse_answer(text, 4) is None


def test_two_answers_are_none_even_where_they_agree():
    assert parse_answer("The answer is (A). The answer is (B).", 4) is None
    assert parse_answer("The answer is (A). The answer is (A).", 4) is None


def test_letter_beyond_the_last_choice_is_no_answer():
    assert parse_answer("The answer is (D).", 4) == 3
    assert parse_answer("The answer is (D).", 3) is None


def test_guess_depends_on_seed_and_question_alone():
    guesses = [guess_answer(str(qid), 5, 0) for qid in range(50)]
    assert guesses == [guess_answer(str(qid), 5, 0) for qid in range(50)]
    assert guesses != [guess_answer(str(qid), 5, 1) for qid in range(50)]


def test_guess_is_among_five_letters_and_none_beyond_the_choices():
    guesses = [guess_answer(str(qid), 3, 0) for qid in range(2000)]
    assert set(guesses) == {0, 1, 2, None}
    assert 0.36 < guesses.count(None) / 2000 < 0.44  # two letters of five, binomial sd 0.011
