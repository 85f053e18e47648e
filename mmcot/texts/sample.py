"""One training sample, the type that all packages share.

A sample is one of four kinds (``Sample.kind``):

    "choices"    a question with 2 to 26 choices, as in ScienceQA's ``problems.json``
    "free"       a question with a free answer; ``answers`` are all that are accepted, the first is trained on
    "pair"       pictures and the text that describes them, with an optional instruction in ``question``
    "document"   texts and pictures in reading order, texts with optional roles; the last text is the target

    Sample(qid="1", question="Which of these states is farthest north?",
           choices=("West Virginia", "Louisiana", "Arizona", "Oklahoma"), answer=0,
           hint="", images=("image.png",), grade="grade2", subject="social science",
           lecture="Maps have four cardinal directions ...", solution="To find ...",
           split="train", caption="An aerial view of a painting of a forest.", ...)
    Sample(qid="2", question="How many magnets are there?", answers=("2", "two"), images=("image.png",))
    Sample(qid="3", text="Two red magnets.", images=("image.png",))
    Sample.of_document("4", [Part(image="a.png"), Part("What is this?", role="user"), Part("A map.", role="assistant")])

This module reads no files: ``images`` are names, and the code that opens a picture checks
whether it can be read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from mmcot.errors import InputError

QID_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
MAX_CHOICES = 26  # the answer letter is one of A-Z
KINDS = ("choices", "free", "pair", "document")

TEXT_FIELDS = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution", "split")
_TEXTS = (*TEXT_FIELDS, "caption")


class SampleError(InputError):
    """A sample that is not valid; the message names its qid and field."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a document: a text, with the role that speaks it if there is one, or the file name of a picture."""

    text: str = ""
    role: str = ""
    image: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A sample of one of four kinds, with what is known about it.

    ``answer`` is the zero-based index into ``choices``, or None where it is unknown (a
    question to predict). ``images`` names the pictures in reading order; it is empty for a
    sample without one. ``answers`` is None unless the question has a free answer, and empty where
    that answer is unknown; ``text`` is None unless the sample is a pair, and "" where its text is unknown. The last
    part of a document has the text "" where it is unknown.
    """

    qid: str
    question: str = ""
    choices: tuple[str, ...] = ()
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
    answers: tuple[str, ...] | None = None
    text: str | None = None
    document: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not QID_PATTERN.fullmatch(self.qid):
            raise SampleError(
                f"question id {self.qid!r} must consist of letters, digits, '_' and '-' alone "
                "(it becomes a file name in a shard, and a dot would end it); rename it"
            )
        kind = self.kind
        if bool(self.choices) + (self.answers is not None) + (self.text is not None) + bool(self.document) > 1:
            fields = ("choices", "answers", "text", "document")
            given = [name for name in fields if getattr(self, name) not in ((), None)]
            raise SampleError(
                f"question {self.qid}: the fields {' and '.join(map(repr, given))} are of different kinds of samples; "
                "give choices, or accepted answers, or the text of an image-text pair, or a document"
            )
        if kind == "document":
            _check_document(self)
        elif kind == "pair":
            if not self.images:
                raise SampleError(f"sample {self.qid}: a text without a picture; an image-text pair needs 'image'")
        elif not self.question.strip():
            raise SampleError(f"question {self.qid}: the field 'question' is empty; give it a text")
        if kind == "free":
            if any(not answer.strip() for answer in self.answers or ()):
                raise SampleError(f"question {self.qid}: an accepted answer is empty; give it a text, or leave it out")
        elif kind == "choices" and not all(map(str.strip, self.choices)):
            raise SampleError(f"question {self.qid}: one of the choices {list(self.choices)} is empty; give it a text")
        elif kind == "choices" and not 2 <= len(self.choices) <= MAX_CHOICES:
            raise SampleError(
                f"question {self.qid}: the number of choices is {len(self.choices)}; expected 2 to {MAX_CHOICES} (one "
                "letter each)"
            )
        if self.answer is not None and not 0 <= self.answer < len(self.choices):
            raise SampleError(
                f"question {self.qid}: answer {self.answer} is no index into its {len(self.choices)} choices; "
                f"expected 0 to {len(self.choices) - 1}"
            )

    @classmethod
    def of_document(cls, qid: str, parts: Sequence[Part], **fields: Any) -> Sample:
        """Build an interleaved document; its pictures are those of its parts."""
        images = tuple(part.image for part in parts if part.image)
        return cls(qid=qid, document=tuple(parts), images=images, **fields)

    @property
    def kind(self) -> str:
        """One of ``KINDS``; what the fields that are set describe."""
        if self.document:
            return "document"
        if self.text is not None:
            return "pair"
        return "choices" if self.answers is None else "free"

    @property
    def accepted(self) -> tuple[str, ...]:
        """The texts that are right as a whole, the first the target; none for a question with choices."""
        if self.kind == "free":
            return self.answers or ()
        text = self.document[-1].text if self.document else self.text
        return (text,) if text and text.strip() else ()

    @property
    def has_answer(self) -> bool:
        """Whether the gold answer is known, so that the sample can be trained on and scored."""
        return self.answer is not None if self.kind == "choices" else bool(self.accepted)

    @classmethod
    def from_scienceqa(cls, qid: str, record: dict[str, Any], caption: str = "") -> Sample:
        """Build a question with choices from a record of ``problems.json``.

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
        texts: dict[str, Any] = _texts(qid, record) | ({"caption": caption} if caption else {})
        return cls(
            qid=str(qid),
            question=_text(qid, "question", record["question"]),
            choices=_choices(qid, record["choices"]),
            answer=answer,
            images=_image_names(qid, record.get("image")),
            **texts,
        )

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Sample:
        """Read a record of ``to_record``, of any kind.

        The kind is that of the field the record has: ``document`` (a list of ``{"text", "role"}`` and
        ``{"image"}``), ``text``, ``answers`` (a list), else ``choices``.

        Raises:
            SampleError: a field is missing or of the wrong type or range.
        """
        qid = str(record.get("qid", ""))
        if record.get("document") is not None:
            parts = _read_document(qid, record["document"])
            fields: dict[str, Any] = dict(_texts(qid, record))
            return cls.of_document(qid, parts, **fields)
        if record.get("answers") is None and record.get("text") is None:
            return cls.from_scienceqa(qid, record)
        fields = {"question": _text(qid, "question", record.get("question") or ""), **_texts(qid, record)}
        if record.get("choices"):
            fields["choices"] = _choices(qid, record["choices"])
        if record.get("answers") is not None:
            answers = record["answers"]
            if not isinstance(answers, (list, tuple)) or not all(isinstance(answer, str) for answer in answers):
                raise SampleError(f"question {qid}: answers {answers!r} must be a list of accepted texts")
            fields["answers"] = tuple(answers)
        if record.get("text") or record.get("answers") is None:
            fields["text"] = _text(qid, "text", record["text"])
        return cls(qid, images=_image_names(qid, record.get("image")), **fields)

    def to_record(self) -> dict[str, Any]:
        """The sample as JSON types, in ScienceQA's field names, with qid and caption."""
        record = dataclasses.asdict(self)
        images = record.pop("images")
        kinds_fields = {name: record.pop(name) for name in ("answers", "text", "document")}
        record["choices"] = list(self.choices)
        record["image"] = None if not images else images[0] if len(images) == 1 else list(images)
        if self.kind != "choices":
            del record["choices"], record["answer"]
        if self.kind == "free":
            record["answers"] = list(self.answers or ())
        elif self.kind == "pair":
            record["text"] = self.text
        elif self.kind == "document":
            record["document"] = [
                {key: value for key, value in part.items() if value} or {"text": ""}
                for part in kinds_fields["document"]
            ]
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


def shortened(value: Any, length: int = 100) -> str:
    """A value for a message, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= length else f"{shown[:length]}..."


def _image_names(qid: str, image: Any) -> tuple[str, ...]:
    if image is not None and not isinstance(image, (str, list, tuple)):
        shown = shortened(image)
        raise SampleError(f"question {qid}: the field 'image' is {shown}; expected a file name, or a list of them")
    names = () if image in (None, "") else (image,) if isinstance(image, str) else tuple(image)
    for name in names:
        if isinstance(name, str) and name.partition(":")[0].lower() in ("data", "http", "https"):
            raise SampleError(
                f"question {qid}: picture {shortened(name, 40)} is an address; save it as a file and give its name"
            )
        if not isinstance(name, str) or name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise SampleError(f"question {qid}: picture {shortened(name)} must be a file name inside the data folder")
    return names


def _texts(qid: str, record: dict[str, Any]) -> dict[str, str]:
    """The optional text fields of a record, and its caption."""
    get = record.get
    texts = {field: "" if (value := get(field)) is None else value for field in _TEXTS}
    if set(map(type, texts.values())) != {str}:
        return {field: _text(qid, field, text) for field, text in texts.items()}
    return texts


def _text(qid: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SampleError(f"question {qid}: the field {field!r} is {shortened(value)}; expected a text")
    return value


def _choices(qid: str, choices: Any) -> tuple[str, ...]:
    if not isinstance(choices, (list, tuple)) or not set(map(type, choices)) <= {str}:
        raise SampleError(f"question {qid}: choices {shortened(choices)} must be a list of texts")
    return tuple(choices)


def _read_document(qid: str, parts: Any) -> list[Part]:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise SampleError(f"sample {qid}: document {parts!r} must be a list of texts and pictures, and not empty")
    read = []
    for number, part in enumerate(parts, start=1):
        place = f"sample {qid}: part {number} of its document is {part!r}"
        if not isinstance(part, dict) or not all(isinstance(value, str) for value in part.values()):
            raise SampleError(f'{place}; expected {{"text": ..., "role": ...}} or {{"image": ...}}')
        if unknown := sorted(part.keys() - {"text", "role", "image"}):
            raise SampleError(f"{place}; the key {unknown[0]!r} is unknown: expected text and role, or image")
        _image_names(qid, part.get("image"))
        read.append(Part(**part))
    return read


def _check_document(sample: Sample) -> None:
    for number, part in enumerate(sample.document, start=1):
        is_unknown = 1 < number == len(sample.document) and not part.text and not part.image
        if (not is_unknown and bool(part.text.strip()) == bool(part.image)) or (part.image and part.role):
            raise SampleError(
                f"sample {sample.qid}: part {number} of its document is {part}; expected a text, with a role if there "
                "is one, or a picture"
            )
    if sample.document[-1].image:
        raise SampleError(f"sample {sample.qid}: its document ends with a picture; the last part is the text to write")
    if sample.images != tuple(part.image for part in sample.document if part.image):
        raise SampleError(
            f"sample {sample.qid}: images {sample.images} are not those of its document; use Sample.of_document"
        )
    if sample.question:
        raise SampleError(f"sample {sample.qid}: a document has no question; make it a part of the document")
