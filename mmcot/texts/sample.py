"""One multiple-choice question, the type that all packages share.

A problem is a record of ScienceQA's ``problems.json`` with its question id and the caption
of its picture:

    Sample(qid="1", question="Which of these states is farthest north?",
            choices=("West Virginia", "Louisiana", "Arizona", "Oklahoma"), answer=0,
            hint="", images=("image.png",), grade="grade2", subject="social science",
            lecture="Maps have four cardinal directions ...", solution="To find ...",
            split="train", caption="An aerial view of a painting of a forest.", ...)

This module reads no files: ``images`` are names, and the code that opens a picture checks
whether it can be read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

QID_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
MAX_CHOICES = 26  # the answer letter is one of A-Z

_TEXT_FIELDS = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution", "split")


class SampleError(ValueError):
    """A question that is not valid; the message names its qid and field."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A question with its choices, its gold answer and the reasons for it.

    ``answer`` is the zero-based index into ``choices``, or None where it is unknown (a
    question to predict). ``images`` names the pictures in reading order; it is empty for a
    question without one.
    """

    qid: str
    question: str
    choices: tuple[str, ...]
    answer: int | None = None
    hint: str = ""
    images: tuple[str, ...] = ()
    task: str = ""
    grade: str = ""
    subject: str = ""
    topic: str = ""
    category: str = ""
    skill: str = ""
    lecture: str = ""
    solution: str = ""
    split: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        if not QID_PATTERN.fullmatch(self.qid):
            raise SampleError(
                f"question id {self.qid!r} must consist of letters, digits, '_' and '-' alone "
                "(it becomes a file name in a shard, and a dot would end it); rename it"
            )
        if not self.question.strip():
            raise SampleError(f"question {self.qid}: the field 'question' is empty; give it a text")
        if not 2 <= len(self.choices) <= MAX_CHOICES:
            raise SampleError(
                f"question {self.qid}: {len(self.choices)} choices; expected 2 to {MAX_CHOICES} (one letter each)"
            )
        if self.answer is not None and not 0 <= self.answer < len(self.choices):
            raise SampleError(
                f"question {self.qid}: answer {self.answer} is no index into its {len(self.choices)} choices; "
                f"expected 0 to {len(self.choices) - 1}"
            )

    @classmethod
    def from_scienceqa(cls, qid: str, record: dict[str, Any], caption: str = "") -> Sample:
        """Build a problem from a record of ``problems.json``.

        ``record["image"]`` may be null, one file name, or a list of them; keys that
        ScienceQA does not have are ignored.

        Raises:
            SampleError: a field is missing or of the wrong type or range.
        """
        for field in ("question", "choices", "answer"):
            if field not in record:
                raise SampleError(f"question {qid}: the field {field!r} is missing; every question needs one")
        answer = record["answer"]
        if answer is not None and (isinstance(answer, bool) or not isinstance(answer, int)):
            raise SampleError(f"question {qid}: answer {answer!r} must be the index of the right choice, such as 0")
        choices = record["choices"]
        if not isinstance(choices, (list, tuple)) or not all(isinstance(choice, str) for choice in choices):
            raise SampleError(f"question {qid}: choices {choices!r} must be a list of texts")
        texts = {field: record.get(field) or "" for field in _TEXT_FIELDS}
        for field, value in {"question": record["question"], **texts}.items():
            if not isinstance(value, str):
                raise SampleError(f"question {qid}: the field {field!r} is {value!r}; expected a text")
        return cls(
            qid=str(qid),
            question=record["question"],
            choices=tuple(choices),
            answer=answer,
            images=_image_names(qid, record.get("image")),
            caption=caption or record.get("caption") or "",
            **texts,
        )

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Sample:
        """Read a record of ``to_record``."""
        return cls.from_scienceqa(str(record.get("qid", "")), record)

    def to_record(self) -> dict[str, Any]:
        """The problem as JSON types, in ScienceQA's field names, with qid and caption."""
        record = dataclasses.asdict(self)
        images = record.pop("images")
        record["choices"] = list(self.choices)
        record["image"] = None if not images else images[0] if len(images) == 1 else list(images)
        return record

    def with_choices_in_order(self, order: Sequence[int]) -> Sample:
        """Return the same question with its choices in another order: the new choice i is the old ``order[i]``."""
        answer = None if self.answer is None else list(order).index(self.answer)
        return dataclasses.replace(self, choices=tuple(self.choices[index] for index in order), answer=answer)

    @property
    def answer_letter(self) -> str:
        """The gold answer as its letter, such as ``"B"``."""
        if self.answer is None:
            raise SampleError(f"question {self.qid} has no gold answer")
        return choice_letter(self.answer)


def choice_letter(index: int) -> str:
    """The letter of a choice: 0 is ``"A"``."""
    return chr(ord("A") + index)


def _image_names(qid: str, image: Any) -> tuple[str, ...]:
    names = () if image in (None, "") else (image,) if isinstance(image, str) else tuple(image)
    for name in names:
        if not isinstance(name, str) or name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise SampleError(f"question {qid}: picture {name!r} must be a file name inside the data folder")
    return names
