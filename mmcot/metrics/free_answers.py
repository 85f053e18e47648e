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
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
    "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll "
    "you're you've"
)
_CONTRACTIONS = {  # without one of its apostrophes: the word
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
}


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
    """Normalise as the VQA challenge's evaluation: case, punctuation, number words, articles and contractions.

    A mark with a space beside it, or in a text with a number such as 1,000, is removed; another becomes a space. A
    period stays before a digit.

    Differs from the reference: an answer of articles or marks alone ("A", "?") keeps them.
    """
    text = " ".join(text.split()).lower().replace("\u2019", "'")
    has_comma_number = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in _PUNCTUATION:
        is_alone = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_alone or has_comma_number else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", plain).split()]
    kept = [word for word in words if word not in ("a", "an", "the")] or words or [text]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


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
    """The edit distance, with a column of the matrix as the bits of two integers (Hyyroe 2003): fast for long texts."""
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for place, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << place
    last, every = 1 << (len(first) - 1), (1 << len(first)) - 1
    rises, falls, distance = every, 0, len(first)  # where the column grows or falls by one from row to row
    for character in second:
        equal = places.get(character, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        grows, shrinks = falls | (every & ~(diagonal | rises)), rises & diagonal
        distance += bool(grows & last) - bool(shrinks & last)
        grows, shrinks = (grows << 1 | 1) & every, (shrinks << 1) & every
        rises, falls = shrinks | (every & ~(diagonal | grows)), grows & diagonal
    return distance
