"""The common form of a data set of any kinds of samples, from which shards are built.

    questions.problems["train"][0]          # a Sample
    questions.pictures(problem)             # [Path("images/train/1/image.png")]

Texts are in memory; pictures stay on disk, and ``pictures(problem)`` returns their files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.strict_json import read_json_file
from mmcot.errors import InputError
from mmcot.texts.sample import Sample, SampleError

SPLITS = ("train", "val", "test")
Picture = Path | bytes  # a file, or the encoded picture itself


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions by split, and their pictures.

    ``pictures`` gives, for each name in ``problem.images``, a file that may not exist, or the
    encoded bytes. ``lists`` are further lists of qids (trainval, mini splits); ``ceilings``
    are accuracy bounds of a generated data set; ``notes`` are human-readable sentences that
    the build reports.
    """

    problems: dict[str, list[Sample]]
    pictures: Callable[[Sample], Sequence[Picture]]
    lists: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    ceilings: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for split in SPLITS:
            for problem in self.problems[split]:
                if problem.qid in seen:
                    other = seen[problem.qid]
                    where = f"twice in {split!r}" if other == split else f"in {other!r} and in {split!r}"
                    raise SampleError(
                        f"question {problem.qid!r} is {where}; give every question a qid of its own, in one split"
                    )
                seen[problem.qid] = split
                if not problem.has_answer:
                    raise SampleError(f"question {problem.qid}: the answer is missing; training and scoring need it")


def with_captions(questions: QuestionSet, path: str | Path) -> QuestionSet:
    """Return the same questions with the captions of a file, ``{"captions": {qid: text}}``.

    A question that the file does not name has no caption.

    Raises:
        ValueError: the file contains no captions.
    """
    content = read_json_file(path)
    captions = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise InputError(f'{path} contains no captions; expected {{"captions": {{qid: text}}}}')
    problems = {
        split: [
            dataclasses.replace(problem, caption=captions.get(problem.qid, "")) for problem in questions.problems[split]
        ]
        for split in questions.problems
    }
    known = {problem.qid for split in problems for problem in problems[split]}
    left_out = sum(qid not in known for qid in captions)
    note = f"captions of {path}: {sum(qid in captions for qid in known):,} of {len(known):,} questions" + (
        f", {left_out:,} of unknown questions left out" if left_out else ""
    )
    return dataclasses.replace(questions, problems=problems, notes=(*questions.notes, note))


def with_lists(questions: QuestionSet, lists: Mapping[str, str]) -> QuestionSet:
    """Return the same data set with other lists of its questions as splits, such as ``{"train": "minitrain"}``.

    Raises:
        ValueError: there is no such list, or it names an unknown question.
        SampleError: a question would be in two splits.
    """
    by_qid = {problem.qid: problem for split in SPLITS for problem in questions.problems[split]}
    known = {split: [problem.qid for problem in questions.problems[split]] for split in SPLITS} | questions.lists
    problems = {}
    for split in SPLITS:
        name = lists.get(split, split)
        if name not in known:
            raise InputError(f"data.splits {split}: there is no list {name!r}; this data set has {', '.join(known)}")
        problems[split] = [dataclasses.replace(by_qid[qid], split=split) for qid in known[name]]
    return dataclasses.replace(
        questions, problems=problems, pictures=lambda problem: questions.pictures(by_qid[problem.qid])
    )
