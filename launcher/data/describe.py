"""Counts and lengths of a data set, without building shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.sources.folder_files import ignored_files
from data_shards.sources.forms import form_of, read_questions
from data_shards.sources.question_set import SPLITS, QuestionSet
from data_shards.sources.table_rows import SUFFIXES
from mmcot.texts.prompts import build_pair
from mmcot.texts.sample import Sample

MOST_NAMED, MOST_FILES = 3, 20  # of the absent pictures, and of the files
_STATISTICS = ("mean", "median", "95%", "longest")
FORMATS = ("QCM-E", "QCM-LE", "QCMG-A")
_KINDS = {
    "choices": "with choices",
    "free": "with a free answer",
    "pair": "image-text pairs",
    "document": "documents",
}


def is_question(sample: Sample) -> bool:
    """Whether the formats of questions fit a sample; pairs and documents have the format P-T alone."""
    return sample.kind in ("choices", "free")


def describe_questions(
    path: Path, *, tokenizer: str | None = None, columns: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Describe a data set as JSON types: files, questions, pictures, contexts, lists, and lengths by prompt format.

    Args:
        tokenizer: Hugging Face id or folder to count tokens with; without one, words are counted.
        columns: the columns of fields that have other names.

    Raises:
        InputError: the data set is not valid; the message has all faults.
    """
    form, questions = form_of(path), read_questions(path, columns=columns)
    everything = [problem for split in SPLITS for problem in questions.problems[split]]
    parts = {"all": everything, **questions.problems}
    counts = {label: {name: sum(map(test, part)) for name, part in parts.items()} for label, test in _COUNTED.items()}
    kinds = {problem.kind for problem in everything}
    if kinds - {"choices"}:
        counts |= {
            label: {name: sum(problem.kind == kind for problem in part) for name, part in parts.items()}
            for kind, label in _KINDS.items()
            if kind in kinds
        }
    absent = {name: _absent(questions, part) for name, part in parts.items()}
    counts["picture absent"] = {name: len(named) for name, named in absent.items()}
    unit, count = _counter(tokenizer)
    read = form.content_files(path)
    ignored = ignored_files(path, read, SUFFIXES) if path.is_dir() else []
    return {
        "path": str(path),
        "form": form.label,
        "read": [_name_in(path, file) for file in read],
        "not_read": [{"file": file.name, "reason": reason} for file, reason in ignored],
        "notes": list(questions.notes),
        "counts": counts,
        "absent_pictures": absent["all"][:MOST_NAMED],
        "lists": {name: len(qids) for name, qids in questions.lists.items()},
        "lengths_in": unit,
        "lengths": _lengths(everything, count),
    }


def description_lines(facts: dict[str, Any]) -> list[str]:
    """A description of ``describe_questions`` as lines for people."""
    parts = {name: number for name, number in facts["counts"]["questions"].items() if name != "all"}
    lines = [f"{facts['path']}: {facts['counts']['questions']['all']:,} questions", *facts["notes"]]
    lines.append(f"read: {_listed(facts['read'])}")
    lines += [f"not read: {each['file']} ({each['reason']})" for each in facts["not_read"][:MOST_FILES]]
    if (more := len(facts["not_read"]) - MOST_FILES) > 0:
        lines.append(f"not read: {more:,} more")
    if empty := [split for split, number in parts.items() if not number]:
        lines.append(f"note: no question in {', '.join(empty)}; `mmcot run` needs train, val and test")
    lines.append(f"{'':<24}" + "".join(f"{name:>10}" for name in ("all", *parts)))
    for label, numbers in facts["counts"].items():
        lines.append(f"{label:<24}" + "".join(f"{number:>10,}" for number in numbers.values()))
    if facts["absent_pictures"]:
        lines.append("absent pictures, the first: " + "; ".join(facts["absent_pictures"]))
    lines += [f"list {name}: {number:,} questions" for name, number in facts["lists"].items()]
    lines.append(f"\nlengths in {facts['lengths_in']:<15}" + "".join(f"{name:>10}" for name in _STATISTICS))
    for side, values in facts["lengths"].items():
        lines.append(f"{side:<26}" + "".join(f"{value:>10,.0f}" for value in values.values()))
    return lines


def _name_in(path: Path, file: Path) -> str:
    return str(file.relative_to(path)) if file != path and file.is_relative_to(path) else str(file)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_FILES
    return ", ".join(names[:MOST_FILES]) + (f" and {more:,} more" if more > 0 else "")


def _lengths(everything: list[Sample], count: Callable[[list[str]], np.ndarray]) -> dict[str, dict[str, float]]:
    formats = {format: list(filter(is_question, everything)) for format in FORMATS}
    formats |= {"P-T": [problem for problem in everything if not is_question(problem)]}
    lengths = {}
    for format, problems in formats.items():
        if problems:
            pairs = [build_pair(problem, format) for problem in problems]
            lengths[f"{format} source"] = _statistics(count([source for source, _ in pairs]))
            lengths[f"{format} target"] = _statistics(count([target for _, target in pairs]))
    return lengths


_COUNTED: dict[str, Callable[[Sample], bool]] = {
    "questions": lambda problem: True,
    "with image": lambda problem: bool(problem.images),
    "with text context (hint)": lambda problem: bool(problem.hint),
    "with both": lambda problem: bool(problem.images and problem.hint),
    "with neither": lambda problem: not problem.images and not problem.hint,
    "with caption": lambda problem: bool(problem.caption),
    "without a rationale": lambda problem: not problem.solution,
}


def _absent(questions: QuestionSet, problems: Sequence[Sample]) -> list[str]:
    """The questions that name pictures of which none exists, each with the first of them."""
    return [
        f"{problem.images[0]} of question {problem.qid}"
        for problem in problems
        if problem.images
        and not any(isinstance(picture, bytes) or os.path.isfile(picture) for picture in questions.pictures(problem))
    ]


def _counter(tokenizer: str | None) -> tuple[str, Callable[[list[str]], np.ndarray]]:
    if tokenizer is None:
        return "words", lambda texts: np.array([len(text.split()) for text in texts])
    from mmcot.texts.text_ids import encode_texts
    from mmcot.texts.tokenizer import open_tokenizer

    loaded = open_tokenizer(tokenizer)
    return "tokens", lambda texts: np.array([len(ids) for ids in encode_texts(loaded, texts)])


def _statistics(lengths: np.ndarray) -> dict[str, float]:
    values = (lengths.mean(), np.median(lengths), np.percentile(lengths, 95), lengths.max())
    return dict(zip(_STATISTICS, map(float, values), strict=True))
