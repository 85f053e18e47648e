"""The common form of a data set of any kinds of samples, from which shards are built.

    questions.problems["train"][0]          # a Sample
    questions.pictures(problem)             # [Path("images/train/1/image.png")]

Texts are in memory; pictures stay on disk, and ``pictures(problem)`` returns their files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.strict_json import read_json_file
from mmcot.errors import Faults, InputError
from mmcot.texts.sample import Sample, SampleError

SPLITS = ("train", "val", "test")
Picture = Path | bytes  # a file, or the encoded picture itself


class Place(NamedTuple):
    """Where a sample was read: a file, with the line, or with the member or key in it."""

    file: str
    line: int | None = None
    member: str | None = None

    def of(self, error: InputError) -> InputError:
        """Return the error with this place."""
        return error.at(self.file, line=self.line, member=self.member)

    def within(self, other: Place) -> str:
        """This place in words, without the file if it is that of the other place."""
        parts = [self.file] if self.file != other.file else []
        parts += [f"line {self.line}"] if self.line is not None else []
        return ", ".join([*parts, *([self.member] if self.member else [])]) or "another question"


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions by split, and their pictures.

    ``pictures`` gives, for each name in ``problem.images``, a file that may not exist, or the
    encoded bytes. ``lists`` are further lists of qids (trainval, mini splits); ``ceilings``
    are accuracy bounds of a generated data set; ``notes`` are human-readable sentences that
    the build reports; ``places`` are the fields of ``Place`` of each sample by qid, for messages;
    ``held`` are the samples whose pictures are all in the files that determine the texts.
    """

    problems: dict[str, list[Sample]]
    pictures: Callable[[Sample], Sequence[Picture]]
    lists: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    ceilings: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    places: Mapping[str, tuple[str, int | None, str | None]] = dataclasses.field(default_factory=dict)
    held: Collection[str] = ()

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


def answered(questions: QuestionSet, *, leave_out: bool = False) -> QuestionSet:
    """Return the same data set without the samples whose answer is unknown, with a note on their number.

    Such a sample can be neither trained on nor scored.

    Args:
        leave_out: leave them out of the training split too, where they are otherwise refused.

    Raises:
        InputError: training samples have no answer; all of them are told.
    """
    everything = [sample for split in SPLITS for sample in questions.problems[split]]
    unanswered = {sample.qid for sample in everything if not sample.has_answer}
    if not unanswered:
        return questions
    faults, problems = Faults(), {}
    for split, samples in questions.problems.items():
        problems[split] = [sample for sample in samples if sample.qid not in unanswered]
    for sample in questions.problems["train"] if not leave_out else ():
        if sample.qid in unanswered:
            error = SampleError(
                f"question {sample.qid}: the answer is missing; training needs it: add it, remove the question, or set "
                "data.unanswered=leave-out to train without it"
            )
            place = questions.places.get(sample.qid)
            faults.add(Place(*place).of(error) if place else error)
    faults.raise_any()
    notes = [
        f"{num_left_out:,} questions of {split} have no answer and are left out"
        for split in SPLITS
        if (num_left_out := len(questions.problems[split]) - len(problems[split]))
    ]
    lists = {name: [qid for qid in qids if qid not in unanswered] for name, qids in questions.lists.items()}
    return dataclasses.replace(questions, problems=problems, lists=lists, notes=(*questions.notes, *notes))


def read_captions(path: str | Path) -> dict[str, str]:
    """Read a file of captions, ``{"captions": {qid: text}}``.

    Raises:
        InputError: the file contains no captions.
    """
    content = read_json_file(path)
    captions = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(captions, dict):
        raise InputError('it contains no captions; expected {"captions": {qid: text}}').at(path)
    if not set(map(type, captions.values())) <= {str}:
        wrong = [qid for qid, text in captions.items() if not isinstance(text, str)]
        raise InputError(f"the caption is {str(captions[wrong[0]])[:80]!r}; expected a text").at(
            path, member=f"question {wrong[0]!r}"
        )
    return captions


def with_captions(questions: QuestionSet, path: str | Path) -> QuestionSet:
    """Return the same questions with the captions of a file, ``{"captions": {qid: text}}``.

    A question that the file does not name has no caption.

    Raises:
        InputError: the file contains no captions.
    """
    captions = read_captions(path)
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
        InputError: there is no such list, or it names an unknown question.
        SampleError: a question would be in two splits.
    """
    by_qid = {problem.qid: problem for split in SPLITS for problem in questions.problems[split]}
    known = {split: [problem.qid for problem in questions.problems[split]] for split in SPLITS} | questions.lists
    problems = {}
    for split in SPLITS:
        name = lists.get(split, split)
        if name not in known:
            raise InputError(f"data.splits {split}: there is no list {name!r}; this data set has {', '.join(known)}")
        if unknown := [qid for qid in known[name] if qid not in by_qid]:
            raise InputError(
                f"data.splits {split}: the list {name!r} names {len(unknown):,} unknown questions, such as "
                f"{unknown[0]!r}; remove them from the list, or add the questions"
            )
        problems[split] = [dataclasses.replace(by_qid[qid], split=split) for qid in known[name]]
    return dataclasses.replace(
        questions, problems=problems, pictures=lambda problem: questions.pictures(by_qid[problem.qid])
    )
