"""Repetition in generated texts, measured without a reference."""

from __future__ import annotations

NGRAM = 4  # words
MIN_NGRAMS = 8  # a shorter text is not counted as repetitive
MAX_REPEATED_SHARE = 0.5


def repeated_share(text: str) -> float:
    """The share of a text's 4-grams of words that occur earlier in it: 0 is none, near 1 is a loop.

    The measure of arXiv:1908.04319 (seq-rep-4), over words.
    """
    words = text.split()
    ngrams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def is_repetitive(text: str) -> bool:
    """Whether a text of some length repeats itself."""
    long_enough = len(text.split()) >= MIN_NGRAMS + NGRAM - 1
    return long_enough and repeated_share(text) > MAX_REPEATED_SHARE
