"""A small filled table to begin a data set with: a dozen questions with every field of common use, in all splits."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from mmcot.errors import InputError

FORMS = ("csv", "jsonl")
_FIELDS: tuple[str, ...] = (
    "qid",
    "question",
    "choices",
    "answer",
    "context",
    "image",
    "lecture",
    "rationale",
    "subject",
    "split",
)
_MAGNETS = "Like poles of magnets repel each other, and unlike poles attract each other."
_STATES = "Ice melts at 0 degrees Celsius. Water boils at 100 degrees Celsius."
_ORBITS = "The Earth orbits the Sun once a year. The Moon orbits the Earth once a month."
# question, choices, the right one, context, lecture, rationale, subject, split
_ROWS = [
    (
        "What will these magnets do?",
        ("attract", "repel"),
        "repel",
        "The north pole of one magnet is next to the north pole of the other.",
        _MAGNETS,
        "Two north poles are like poles, so the magnets repel each other.",
        "physics",
        "train",
    ),
    (
        "What will these magnets do?",
        ("attract", "repel"),
        "attract",
        "The north pole of one magnet is next to the south pole of the other.",
        _MAGNETS,
        "A north and a south pole are unlike poles, so the magnets attract each other.",
        "physics",
        "train",
    ),
    (
        "What is water at 20 degrees Celsius?",
        ("a solid", "a liquid", "a gas"),
        "a liquid",
        "",
        _STATES,
        "20 degrees is above 0, where ice melts, and below 100, where water boils.",
        "chemistry",
        "train",
    ),
    (
        "What is water at -5 degrees Celsius?",
        ("a solid", "a liquid", "a gas"),
        "a solid",
        "",
        _STATES,
        "-5 degrees is below 0, where ice melts.",
        "chemistry",
        "train",
    ),
    (
        "Which of them orbits the Sun?",
        ("the Earth", "a cloud", "the sea"),
        "the Earth",
        "",
        _ORBITS,
        "The Earth orbits the Sun once a year.",
        "astronomy",
        "train",
    ),
    (
        "How long does the Moon take to orbit the Earth?",
        ("a day", "a month", "a year"),
        "a month",
        "",
        _ORBITS,
        "The Moon orbits the Earth once a month.",
        "astronomy",
        "train",
    ),
    (
        "What will these magnets do?",
        ("attract", "repel"),
        "repel",
        "The south pole of one magnet is next to the south pole of the other.",
        _MAGNETS,
        "Two south poles are like poles, so the magnets repel each other.",
        "physics",
        "val",
    ),
    (
        "What is water at 120 degrees Celsius?",
        ("a solid", "a liquid", "a gas"),
        "a gas",
        "",
        _STATES,
        "120 degrees is above 100, where water boils.",
        "chemistry",
        "val",
    ),
    (
        "How long does the Earth take to orbit the Sun?",
        ("a day", "a month", "a year"),
        "a year",
        "",
        _ORBITS,
        "The Earth orbits the Sun once a year.",
        "astronomy",
        "val",
    ),
    (
        "What will these magnets do?",
        ("attract", "repel"),
        "attract",
        "The south pole of one magnet is next to the north pole of the other.",
        _MAGNETS,
        "A south and a north pole are unlike poles, so the magnets attract each other.",
        "physics",
        "test",
    ),
    (
        "What is water at 50 degrees Celsius?",
        ("a solid", "a liquid", "a gas"),
        "a liquid",
        "",
        _STATES,
        "50 degrees is above 0, where ice melts, and below 100, where water boils.",
        "chemistry",
        "test",
    ),
    (
        "Which of them orbits the Earth?",
        ("the Sun", "the Moon", "a cloud"),
        "the Moon",
        "",
        _ORBITS,
        "The Moon orbits the Earth once a month.",
        "astronomy",
        "test",
    ),
]


def template_text(form: str) -> str:
    """The table as text, in a form of ``FORMS``.

    Raises:
        InputError: the form is unknown.
    """
    if form not in FORMS:
        raise InputError(f"there is no template in {form!r}; give one of {', '.join(FORMS)}")
    rows = [
        dict(zip(_FIELDS, (f"q{number}", question, choices, answer, context, "", *rest), strict=True))
        for number, (question, choices, answer, context, *rest) in enumerate(_ROWS, start=1)
    ]
    if form == "jsonl":
        return "".join(json.dumps(row | {"image": None}) + "\n" for row in rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"choices": "|".join(row["choices"])} for row in rows)
    return text.getvalue()


def write_template(form: str, path: Path) -> None:
    """Write the table into a new file.

    Raises:
        InputError: the form is unknown or not that of the name, or the file exists or cannot be made.
    """
    text = template_text(form)
    if path.suffix.lower() != f".{form}":
        raise InputError(f"--out {path} does not end with .{form}; a table is read by its ending: give such a name")
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"--out {path} exists; give another name, or remove it") from None
    except OSError as error:
        raise InputError(f"--out {path} cannot be written ({error.strerror}); give another name") from None
