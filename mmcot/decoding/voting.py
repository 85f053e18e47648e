"""Choosing one of several sampled texts by a vote of their answers: self-consistency (Wang et al., arXiv:2203.11171).

    vote(answers=[1, 0, None, 1], log_probs=[-3.1, -0.2, -0.1, -2.5])     # Vote(chosen=3, agreement=0.5)

Differs from the reference: the result is one of the sampled texts instead of an answer alone, the likeliest of those
with the most frequent answer; equal numbers of votes are decided by the likeliest text instead of at random.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(frozen=True)
class Vote:
    """The index of the chosen text, and the share of all texts that have its answer, 0 where none has one."""

    chosen: int
    agreement: float


def vote(answers: Sequence[Hashable | None], log_probs: Sequence[float]) -> Vote:
    """Choose the likeliest of the texts whose answer has the most votes; the first of equally likely ones.

    A text without an answer has no vote and counts as one that disagrees. Where none has an answer, the likeliest of
    all texts is chosen.

    Args:
        answers: of each text; None where it has none.
        log_probs: of each text, natural logarithm, summed over its tokens.

    Raises:
        ValueError: there is no text, or the lengths differ.
    """
    if not answers or len(answers) != len(log_probs):
        raise ValueError(
            f"answers ({len(answers)}) and log_probs ({len(log_probs)}) must be of the same texts, 1 or more"
        )
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    eligible = [index for index, answer in enumerate(answers) if votes[answer] == most]
    return Vote(max(eligible, key=log_probs.__getitem__), most / len(answers))
