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
import string

from mmcot.texts.sample import Sample

ANSWER_PATTERN = re.compile(r"The answer is \(([A-Z])\)")
FREE_ANSWER = "The answer is "
FREE_PATTERN = re.compile(r"The answer is .*?(?=BECAUSE:|$)", re.DOTALL)
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


def parse_prediction(sample: Sample, text: str, *, output: str = "A") -> int | str | None:
    """Parse the answer to a sample of any kind from generated text.

    Args:
        output: the output part of the prompt format; with T the whole text is the answer.

    Returns:
        The index of the choice; for the other kinds the answer's text. None where it cannot be read.
    """
    if sample.kind == "choices" and output != "T":
        return parse_answer(text, len(sample.choices))
    if sample.kind == "choices":
        same = [index for index, choice in enumerate(sample.choices) if normalize(choice) == normalize(text)]
        return same[0] if len(same) == 1 else None
    if sample.kind == "free" and output != "T":
        _, *after = text.split(FREE_ANSWER)
        answer = after[0].partition("BECAUSE:")[0].strip().removesuffix(".") if len(after) == 1 else ""
        return answer.strip() or None
    return text.strip() or None


def is_right(sample: Sample, prediction: int | str | None) -> bool:
    """Whether a prediction is the gold choice, or equals an accepted text after ``normalize``."""
    if sample.kind == "choices":
        return prediction is not None and prediction == sample.answer
    return isinstance(prediction, str) and normalize(prediction) in {normalize(text) for text in sample.accepted}


def normalize(text: str) -> str:
    """Lower case without punctuation, articles and repeated white space (SQuAD's evaluation, arXiv:1606.05250).

    Differs from the reference: a text of articles or punctuation alone ("A", "?") keeps them, or all such texts would
    be equal.
    """
    text = text.lower()
    plain = "".join(character for character in text if character not in string.punctuation)
    for kept in (re.sub(r"\b(a|an|the)\b", " ", plain), plain, text):
        if words := kept.split():
            return " ".join(words)
    return ""


def split_reasons(text: str, *, is_free: bool = False) -> str:
    """Return the reasons of a text that also contains an answer; they precede it or follow ``BECAUSE:``.

    Args:
        is_free: whether the answer is a free text instead of a letter.
    """
    match = (FREE_PATTERN if is_free else ANSWER_PATTERN).search(text)
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
