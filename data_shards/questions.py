"""A data set to build shards from, whatever form it came in.

    questions.problems["train"][0]          # a Problem
    questions.pictures(problem)             # [Path("images/train/1/image.png")]

Text is in memory, pictures stay where they are until ``pictures(problem)`` names them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmcot.problem import Problem, ProblemError

SPLITS = ("train", "val", "test")
Picture = Path | bytes  # a file, or the encoded picture itself


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions by split, and where their pictures are.

    ``pictures`` gives, for each name in ``problem.images``, a file that may or may not
    exist, or the encoded bytes. ``lists`` are further lists of qids (trainval, mini
    splits); ``ceilings`` are bounds that a generator knows; ``notes`` are sentences for
    the person who builds.
    """

    problems: dict[str, list[Problem]]
    pictures: Callable[[Problem], Sequence[Picture]]
    lists: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    ceilings: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for split in SPLITS:
            for problem in self.problems[split]:
                if problem.qid in seen:
                    raise ProblemError(
                        f"question {problem.qid!r} is in {seen[problem.qid]!r} and in {split!r}; "
                        "every question has an id of its own and belongs to one split"
                    )
                seen[problem.qid] = split
                if problem.answer is None:
                    raise ProblemError(f"question {problem.qid}: the answer is missing; training and scoring need it")
