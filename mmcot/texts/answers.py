"""From the text the model wrote to the choice it meant.

    "The answer is (B)."                       -> 1
    "Maps have ... The answer is (A)."         -> 0
    "The answer is (A). The answer is (B)."    -> None  (two answers)
    "B"                                        -> None  (no answer in the known words)

This module knows nothing of models or scores.
"""

from __future__ import annotations

import random
import re

ANSWER_PATTERN = re.compile(r"The answer is \(([A-Z])\)")
NUM_GUESSED_LETTERS = 5  # the published system guesses among A-E, however many choices there are


def parse_answer(text: str, num_choices: int) -> int | None:
    """Read the index of the chosen option out of generated text.

    Differs from the reference: there an unreadable answer becomes a guess, and a letter
    beyond the last choice stays an index; here both are None, which counts as wrong.

    Returns:
        The zero-based index, or None unless the text says ``The answer is (X)`` exactly
        once and X is the letter of a choice.
    """
    letters = ANSWER_PATTERN.findall(text)
    if len(letters) != 1:
        return None
    index = ord(letters[0]) - ord("A")
    return index if index < num_choices else None


def split_reasons(text: str) -> str:
    """The reasons of a text that holds an answer too, before it or after it (behind ``BECAUSE:``)."""
    match = ANSWER_PATTERN.search(text)
    if match is None:
        return text.strip()
    after = text[match.end() :].lstrip(". ").removeprefix("BECAUSE:")
    return (text[: match.start()].strip() + " " + after.strip()).strip()


def guess_answer(qid: str, num_choices: int, seed: int) -> int | None:
    """Guess as the published system does where it cannot read an answer.

    It draws one of five letters whatever the number of choices, so a question with three
    of them is guessed right one time in five. The draw here depends on ``seed`` and
    ``qid`` alone: neither the order nor the number of the questions changes it.

    Returns:
        The guessed index, or None where the guess is the letter of no choice (wrong).
    """
    index = random.Random(f"{seed}:{qid}").randrange(NUM_GUESSED_LETTERS)
    return index if index < num_choices else None
