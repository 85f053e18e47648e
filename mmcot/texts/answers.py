"""Parsing the chosen option from generated text.

    "The answer is (B)."                       -> 1
    "Maps have ... The answer is (A)."         -> 0
    "The answer is (A). The answer is (B)."    -> None  (two answers)
    "B"                                        -> None  (no answer in the known form)

This module does not depend on models or scores.
"""

from __future__ import annotations

import random
import re

ANSWER_PATTERN = re.compile(r"The answer is \(([A-Z])\)")
NUM_GUESSED_LETTERS = 5  # the published system guesses among A-E for any number of choices


def parse_answer(text: str, num_choices: int) -> int | None:
    """Parse the index of the chosen option from generated text.

    Differs from the reference: the reference replaces an answer that cannot be parsed by a
    guess, and keeps the index of a letter beyond the last choice. This function returns None
    for both, which counts as wrong.

    Returns:
        The zero-based index, or None unless the text contains ``The answer is (X)`` exactly
        once and X is the letter of a choice.
    """
    letters = ANSWER_PATTERN.findall(text)
    if len(letters) != 1:
        return None
    index = ord(letters[0]) - ord("A")
    return index if index < num_choices else None


def split_reasons(text: str) -> str:
    """Return the reasons of a text that also contains an answer; they precede it or follow ``BECAUSE:``."""
    match = ANSWER_PATTERN.search(text)
    if match is None:
        return text.strip()
    after = text[match.end() :].lstrip(". ").removeprefix("BECAUSE:")
    return (text[: match.start()].strip() + " " + after.strip()).strip()


def guess_answer(qid: str, num_choices: int, seed: int) -> int | None:
    """Guess as the published system does where it cannot parse an answer.

    It draws one of five letters for any number of choices, so the guess for a question with
    three choices is right one time in five. The guess depends on ``seed`` and ``qid`` alone,
    not on the order or the number of the questions.

    Returns:
        The guessed index, or None where the guess is the letter of no choice (wrong).
    """
    index = random.Random(f"{seed}:{qid}").randrange(NUM_GUESSED_LETTERS)
    return index if index < num_choices else None
