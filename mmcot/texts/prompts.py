"""Prompt pairs: the model's input and its target, for every format.

A format is ``INPUT-OUTPUT``, such as ``QCM-E`` (stage one: input question, context and
options, output explanation) or ``QCMG-A`` (stage two: input also a rationale, output
answer). The record is one pair of texts, each on one line:

    source  "Question: Which of these states is farthest north? Context: N/A
             Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma Solution:"
    target  "Solution: To find the answer, look at the compass rose. ..."

The letters: Q question, C context (hint and caption), M the options, G a generated
rationale, L lecture, E explanation (ScienceQA's ``solution``), A answer; P the whole prompt
and T the whole text of a sample that is no question; V the pictures without a word and C as an
output the caption. The texts of questions with choices are
byte for byte those of the published system, because its checkpoints were trained on them.
This includes its irregularities: AL has the solution and AE the lecture, LE ends with an
additional period, a newline in a lecture or solution becomes a backslash and an n, and
``BECAUSE:`` is kept where the lecture or solution after it is empty.

This module does not depend on tokens, files or pictures.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from mmcot.errors import InputError
from mmcot.texts.sample import Part, Sample, choice_letter

_QUESTION = "Question: {question}\n"
_CONTEXT = "Context: {context}\n"
_OPTIONS = "Options: {options}\n"
_QCM = _QUESTION + _CONTEXT + _OPTIONS

INPUTS: Mapping[str, str] = MappingProxyType(
    {
        "QCM": _QCM,
        "CQM": _CONTEXT + _QUESTION + _OPTIONS,
        "QM": _QUESTION + _OPTIONS,
        "QC": _QUESTION + _CONTEXT,
        "QCMG": _QCM + "{rationale}\n",
        "CQMG": _CONTEXT + _QUESTION + _OPTIONS + "{rationale}\n",
        "QCML": _QCM + "BECAUSE: {lecture}\n",
        "QCME": _QCM + "BECAUSE: {solution}\n",
        "QCMLE": _QCM + "BECAUSE: {lecture} {solution}\n",
        "QCLM": _QUESTION + _CONTEXT + "BECAUSE: {lecture}\n" + _OPTIONS,
        "QCEM": _QUESTION + _CONTEXT + "BECAUSE: {solution}\n" + _OPTIONS,
        "QCLEM": _QUESTION + _CONTEXT + "BECAUSE: {lecture} {solution}\n" + _OPTIONS,
        "QCMA": _QCM + "Answer: The answer is {answer}.\n",
        "QCA": _QUESTION + _CONTEXT + "Answer: The answer is {answer}. \nBECAUSE:",
        "P": "{prompt}",
        "V": "",
    }
)

OUTPUTS: Mapping[str, str] = MappingProxyType(
    {
        "A": "The answer is {answer}.",
        "E": "Solution: {solution}",
        "LE": "Solution: {lecture} {solution}.",
        "AL": "The answer is {answer}. BECAUSE: {solution}",
        "AE": "The answer is {answer}. BECAUSE: {lecture}",
        "ALE": "The answer is {answer}. BECAUSE: {lecture} {solution}",
        "AEL": "The answer is {answer}. BECAUSE: {solution} {lecture}",
        "LA": "{lecture} The answer is {answer}.",
        "EA": "{solution} The answer is {answer}.",
        "LEA": "{lecture} {solution} The answer is {answer}.",
        "ELA": "{solution} {lecture} The answer is {answer}.",
        "T": "{text}",
        "C": "{caption}",
    }
)

PAPER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "QCM→A": "QCM-A",  # no reasoning
        "QCM→RA": "QCM-LEA",  # rationale, then answer, in one text
        "QCM→AR": "QCM-ALE",  # answer, then explanation, in one text
        "QCM→R": "QCM-E",  # stage one of two (its older form: QCM-LE)
        "QCMR→A": "QCMG-A",  # stage two of two
    }
)

IMAGE_MARKER = "<image>"  # where a picture is in the prompt of a document
PICTURE_MARK = "\ufdd0"  # the same, for a model that reads pictures there: a code point that is no character
_KINDS_IN_WORDS = {"pair": "an image-text pair", "document": "a document"}
_GOLD_RATIONALE = "Solution: {lecture} {solution}"  # the rationale in QCMG where none is given


def build_pair(
    problem: Sample,
    format: str,
    *,
    use_caption: bool = False,
    rationale: str | None = None,
    marks_pictures: bool = False,
) -> tuple[str, str]:
    """Build the model's input text and its target text.

    A question with a free answer has no options in its prompt, and its answer is the first accepted text:
    "The answer is seven." An image-text pair and a document have the format ``P-T``: the prompt is the pair's
    instruction, or all parts of the document before its last text, with ``<image>`` for a picture and
    "Role: text" for a text that somebody speaks; the target is the pair's text, or the document's last.

    Args:
        format: ``INPUT-OUTPUT`` of ``INPUTS`` and ``OUTPUTS``, or a name of the paper
            (``PAPER_NAMES``, with ``→`` or ``->``).
        use_caption: append the picture's caption to the hint.
        rationale: the rationale in QCMG and CQMG, verbatim (a stage-one text starts with
            ``Solution:``); None uses the gold lecture and solution. The other inputs do
            not contain it.
        marks_pictures: put ``PICTURE_MARK`` where the model reads a picture: in a document where the picture is, in
            other samples where question, hint or choices have ``<image>``, or else once for each picture before the
            text.

    Returns:
        (source, target). The target is ``""`` where it needs the answer and the problem
        has none, so that a question without an answer still has a source.

    Raises:
        ValueError: the format is unknown, or its input needs the answer (QCMA, QCA) and
            the problem has none, or the sample is of a kind without the fields of the format, or its text has
            another number of ``<image>`` than it has pictures.
    """
    input_part, output_part = split_format(format)
    if problem.kind in ("pair", "document") and (input_part, output_part) != ("P", "T"):
        raise InputError(
            f"sample {problem.qid} is {_KINDS_IN_WORDS[problem.kind]}, and the format {format!r} is of a question; "
            "use the format P-T"
        )
    fields = _fields(problem, use_caption=use_caption)
    fields["rationale"] = _GOLD_RATIONALE.format(**fields) if rationale is None else rationale
    if not problem.has_answer and "{answer}" in INPUTS[input_part]:
        raise InputError(
            f"question {problem.qid} has no answer, and the input of format {format!r} contains it; "
            "give the problem its answer or choose an input without A, such as QCM"
        )
    ending = "" if input_part == "V" else {"A": "Answer:", "T": "", "C": ""}.get(output_part, "Solution:")
    template = INPUTS[input_part] if problem.choices else INPUTS[input_part].replace(_OPTIONS, "")
    source, target = _normalize(template.format(**fields) + ending), _target(problem, output_part, fields)
    if not marks_pictures:
        return source, target
    if PICTURE_MARK in source:
        raise InputError(
            f"sample {problem.qid}: its text contains the code point U+FDD0, which marks a picture and is no "
            "character; remove it"
        )
    if problem.kind == "document":
        parts = [PICTURE_MARK if part.image else _part(part) for part in problem.document[:-1]]
        return _normalize(" ".join(parts)), target
    marked = problem if input_part == "V" else _with_marks(problem)
    if marked is problem:
        return " ".join([PICTURE_MARK] * len(problem.images) + ([source] if source else [])), target
    marked_fields = _fields(marked, use_caption=use_caption) | {"rationale": fields["rationale"]}
    return _normalize(template.format(**marked_fields) + ending), target


def _with_marks(problem: Sample) -> Sample:
    """The sample with marks in the place of ``<image>`` in question, hint and choices; itself where there is none."""
    texts = (problem.question, problem.hint, *problem.choices)
    written = sum(text.count(IMAGE_MARKER) for text in texts)
    if not written:
        return problem
    if written != len(problem.images):
        raise InputError(
            f"sample {problem.qid}: its text has {written} {IMAGE_MARKER}, and it has {len(problem.images)} pictures; "
            f"write {IMAGE_MARKER} once for each picture, or nowhere, to put the pictures before the text"
        )
    question, hint, *choices = (text.replace(IMAGE_MARKER, f" {PICTURE_MARK} ") for text in texts)
    return dataclasses.replace(problem, question=question, hint=hint, choices=tuple(choices))


def gold_rationale(problem: Sample, format: str) -> str:
    """The target of stage one in ``format``: the gold rationale.

    Args:
        format: a whole format such as ``QCM-E``, or its output part alone (``E``).
    """
    output_part = format if format in OUTPUTS else split_format(format)[1]
    return _target(problem, output_part, _fields(problem, use_caption=False))


def split_format(format: str) -> tuple[str, str]:
    """Split a format, or a name of the paper, into its input and output parts.

    Raises:
        ValueError: one of the parts is unknown; the message names the nearest format.
    """
    name = PAPER_NAMES.get(format.replace("->", "→"), format)
    input_part, _, output_part = name.partition("-")
    if input_part in INPUTS and output_part in OUTPUTS:
        return input_part, output_part
    known = [f"{first}-{last}" for first in INPUTS for last in OUTPUTS] + list(PAPER_NAMES)
    nearest = difflib.get_close_matches(format.upper(), known, n=1, cutoff=0.0)[0]
    raise InputError(
        f"format {format!r} is unknown; expected INPUT-OUTPUT with an input of {', '.join(INPUTS)} and an output of "
        f"{', '.join(OUTPUTS)} (or, as in the paper, {', '.join(PAPER_NAMES)}); did you mean {nearest!r}?"
    )


def _fields(problem: Sample, *, use_caption: bool) -> dict[str, str]:
    context = " ".join([problem.hint, problem.caption if use_caption else ""]).strip()
    options = " ".join(f"({choice_letter(index)}) {choice}" for index, choice in enumerate(problem.choices))
    fields = {
        "question": problem.question,
        "context": context or "N/A",
        "options": options,
        "answer": _answer(problem),
        "text": problem.choices[problem.answer] if problem.answer is not None else "".join(problem.accepted[:1]),
        "lecture": problem.lecture.replace("\n", "\\n"),
        "solution": problem.solution.replace("\n", "\\n"),
        "caption": problem.caption,
    }
    return fields | {"prompt": _prompt(problem, fields)}


def _answer(problem: Sample) -> str:
    """The answer as a target names it: the letter of a choice, or the first accepted text; "" where it is unknown."""
    if problem.kind == "choices":
        return "" if problem.answer is None else f"({problem.answer_letter})"
    return "".join(problem.accepted[:1])


def _prompt(problem: Sample, fields: Mapping[str, str]) -> str:
    if problem.kind == "document":
        return " ".join(_part(part) for part in problem.document[:-1])
    if problem.kind == "pair":
        return problem.question
    return (_QCM if problem.choices else _QUESTION + _CONTEXT).format(**fields)


def _part(part: Part) -> str:
    if part.image:
        return IMAGE_MARKER
    return f"{part.role.capitalize()}: {part.text}" if part.role else part.text


def _target(problem: Sample, output_part: str, fields: dict[str, str]) -> str:
    if not problem.has_answer and ("{answer}" in OUTPUTS[output_part] or output_part == "T"):
        return ""
    if output_part == "T":
        return _normalize(fields["text"])
    return _normalize(OUTPUTS[output_part].format(**fields).replace("Answer:", ""))


def _normalize(text: str) -> str:
    """Join the words of a text with single spaces."""
    return " ".join(text.split())
