"""Metrics of free answers: a prediction against all accepted texts, from 0 to 1.

    vqa_accuracy("two", ["2", "2", "3"])      # 0.667: "two" is read as "2"
    anls("magnett", ["magnet"])               # 0.857: one of seven characters

This module does not depend on samples, models or files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmcot.texts.answers import normalize

MIN_VQA_MATCHES = 3  # annotators who gave an answer that counts as right in full
ANLS_THRESHOLD = 0.5

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`?!'
_CONTRACTED = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he's isn't it's let's mustn't she'd "
    "should've shouldn't somebody's that's there's they'd they're they've wasn't we've weren't what's where's "
    "who's who've won't would've wouldn't y'all you'd you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in re.findall(r"\S+", _CONTRACTED)}


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Whether the prediction equals an accepted text after ``normalize`` (arXiv:1606.05250)."""
    return float(normalize(prediction) in {normalize(text) for text in references})


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The accuracy of the VQA challenge (arXiv:1505.00468, section 4).

    With several annotators: for each of them left out, min(matches among the others / 3, 1), averaged. With fewer than
    three other annotators a match counts in full as soon as all of them, at least one, would have to agree: the
    divisor is the number of the others. With one accepted text: whether they are equal.
    """
    ours, texts = normalize_vqa(prediction), [normalize_vqa(text) for text in references]
    if len(texts) < 2:
        return float(ours in texts)
    needed = min(MIN_VQA_MATCHES, len(texts) - 1)
    matches = [text == ours for text in texts]
    shares = [min((sum(matches) - left_out) / needed, 1.0) for left_out in matches]
    return sum(shares) / len(shares)


def normalize_vqa(text: str) -> str:
    """Normalise as the VQA challenge's evaluation: case, punctuation, number words, articles and contractions."""
    text = " ".join(text.split()).lower()
    has_comma_number = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        is_alone = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if is_alone or has_comma_number else " ")
    text = re.sub(r"(?<!\d)\.(?!\d)", "", text)
    text = re.sub(r",(?!\d)|(?<!\d),", "", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (arXiv:1907.00490, equation 1): the best over the texts.

    1 - distance / longer length, in lower case; 0 where the distance is half of the length or more.
    """
    return max((_similarity(prediction, text) for text in references), default=0.0)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L's F-measure against the nearest accepted text."""
    from mmcot.metrics.rationale_metrics import rouge_l_of_each

    return max(rouge_l_of_each([prediction] * len(references), list(references)), default=0.0)


def _similarity(first: str, second: str) -> float:
    first, second = " ".join(first.lower().split()), " ".join(second.lower().split())
    longer = max(len(first), len(second))
    if longer == 0:
        return 1.0
    limit = longer * (1 - ANLS_THRESHOLD)
    if abs(len(first) - len(second)) >= limit:
        return 0.0
    distance = _levenshtein(first, second) / longer
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _levenshtein(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for number, character in enumerate(first, start=1):
        before, row[0] = row[0], number
        for column, other in enumerate(second, start=1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (character != other))
    return row[-1]
