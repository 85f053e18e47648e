"""A data set to build shards from, whatever form it came in.

    questions = read_questions("path/to/ScienceQA")     # a folder in ScienceQA's layout
    questions = read_questions("mine.jsonl")             # or .csv, or a folder with train.jsonl, val.jsonl, ...
    questions = read_questions("my-dataset-on-disk")     # saved by Hugging Face's `save_to_disk`
    questions.problems["train"][0].question

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


def read_questions(path: str | Path) -> QuestionSet:
    """Read a data set in whichever of the known forms it is.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ProblemError: a question cannot be used; the message names it.
        ValueError: the form is none of the known ones.
    """
    from data_shards import hf_dataset, scienceqa, tables  # each knows one form

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data.path {path} does not exist; give a folder or file that does")
    for form in (scienceqa, hf_dataset, tables):
        if form.recognizes(path):
            return form.read(path)
    found = sorted(child.name for child in path.iterdir())[:8] if path.is_dir() else path.suffix
    raise ValueError(
        f"{path} is in no known form (found {found}); expected a folder with problems.json and pid_splits.json "
        "(ScienceQA), a folder saved by datasets' save_to_disk, a .jsonl or .csv file, or a folder with train.jsonl, "
        "val.jsonl and test.jsonl"
    )
