"""Gathering the samples of a data set while it is read, each with its place, and all its faults.

    gathered = Gathering()
    for line, row in rows:
        place = ("train.jsonl", line, None)
        try:
            gathered.add(sample_of_row(qid, row), place)
        except InputError as error:
            gathered.refuse(error, place)
    return gathered.question_set(pictures=...)

All faults are raised together at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data_shards.sources.question_set import SPLITS, Picture, Place, QuestionSet
from mmcot.errors import Faults, InputError
from mmcot.texts.sample import Sample, SampleError

MAX_QID = 95  # bytes: with its suffix it is the name of a member in a tar, at most 100


class Gathering:
    """The samples of a data set by split, their places, and the faults found so far."""

    def __init__(self) -> None:
        self.samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
        self.places: dict[str, tuple[str, int | None, str | None]] = {}  # the fields of a Place
        self.faults = Faults()

    def add(self, sample: Sample, place: tuple[str, int | None, str | None]) -> None:
        """Keep a sample; its place has the fields of ``Place``, as a plain tuple, which is made faster.

        Raises:
            SampleError: its id is taken, or too long.
        """
        if sample.qid in self.places:
            other = Place(*self.places[sample.qid]).within(Place(*place))
            raise SampleError(
                f"the id {sample.qid!r} is also that of {other}; give every question a qid of its own, in one split"
            )
        if len(sample.qid) > MAX_QID:
            raise SampleError(
                f"the id {sample.qid[:24]!r}... has {len(sample.qid)} characters; at most {MAX_QID} are possible, "
                "because it becomes a file name in a tar: shorten it"
            )
        self.places[sample.qid] = place
        self.samples[sample.split].append(sample)

    def refuse(self, error: InputError, place: tuple[str, int | None, str | None]) -> None:
        """Keep a fault, with its place if it has none."""
        self.faults.add(error if error.file else Place(*place).of(error))

    def question_set(
        self, pictures: Callable[[Sample], Sequence[Picture]], *, notes: Sequence[str] = (), **options: Any
    ) -> QuestionSet:
        """Return the data set; ``options`` are further attributes of ``QuestionSet``.

        Raises:
            InputError: the fault, where there is one.
            FaultsError: all faults, where there are several.
        """
        self.faults.raise_any()
        return QuestionSet(self.samples, pictures, places=self.places, notes=tuple(notes), **options)
