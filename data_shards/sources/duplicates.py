"""Duplicate questions, within a split or across splits.

Two questions are duplicates if question, context and choices are equal, two image-text pairs if question and text are,
and two documents if all their texts are. A free question's accepted answers are not compared. Where both have
pictures, the pictures may still differ, so these are listed separately.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from itertools import combinations

from mmcot.texts.sample import Sample


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Questions with the same text by pair of splits ("train", "test"), one tuple of qids per text."""

    without_picture: dict[tuple[str, str], list[tuple[str, ...]]]
    with_picture: dict[tuple[str, str], list[tuple[str, ...]]]


def find_duplicates(problems: Iterable[Sample]) -> Duplicates:
    """Find questions with the same text; memory is a hash and an id per question."""
    groups: dict[tuple[bytes, bool], list[tuple[str, str]]] = {}
    for problem in problems:
        text = "\x1f".join(_texts(problem))
        key = (hashlib.sha256(text.encode()).digest()[:16], bool(problem.images))
        groups.setdefault(key, []).append((problem.split, problem.qid))
    found: tuple[dict, dict] = ({}, {})
    for (_, has_picture), members in groups.items():
        splits = sorted({split for split, _ in members})
        pairs = [(split, split) for split in splits if sum(s == split for s, _ in members) > 1]
        for pair in [*pairs, *combinations(splits, 2)]:
            qids = tuple(qid for split, qid in members if split in pair)
            found[has_picture].setdefault(pair, []).append(qids)
    return Duplicates(*found)


def _texts(problem: Sample) -> tuple[str, ...]:
    """The texts that are equal in duplicates."""
    if problem.kind == "choices":
        return (problem.question, problem.hint, *problem.choices)
    parts = (f"{part.role}\x1e{part.text}" for part in problem.document)
    return (problem.kind, problem.question, problem.hint, problem.text or "", *parts)
