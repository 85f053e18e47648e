"""Counts and lengths of a data set, without building shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_shards.sources.forms import read_questions
from data_shards.sources.question_set import SPLITS, QuestionSet
from mmcot.texts.prompts import build_pair
from mmcot.texts.sample import Sample

MOST_NAMED = 3  # of the absent pictures
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


def describe_questions(path: Path, *, tokenizer: str | None = None) -> list[str]:
    """Describe a data set in lines: questions, pictures, contexts, lists, and lengths by prompt format.

    Args:
        tokenizer: Hugging Face id or folder to count tokens with; without one, words are counted.
    """
    questions = read_questions(path)
    everything = [problem for split in SPLITS for problem in questions.problems[split]]
    lines = [f"{path}: {len(everything):,} questions", *questions.notes]
    if empty := [split for split in SPLITS if not questions.problems[split]]:
        lines.append(f"note: no question in {', '.join(empty)}; `mmcot run` needs train, val and test")
    parts = {"all": everything, **questions.problems}
    lines.append(f"{'':<24}" + "".join(f"{name:>10}" for name in parts))
    for label, test in _COUNTED.items():
        lines.append(f"{label:<24}" + "".join(f"{sum(map(test, part)):>10,}" for part in parts.values()))
    kinds = {problem.kind for problem in everything}
    for kind, label in _KINDS.items():
        if kind in kinds and kinds != {"choices"}:
            lines.append(f"{label:<24}" + "".join(f"{_num_of_kind(part, kind):>10,}" for part in parts.values()))
    lines.append(f"{'picture absent':<24}" + "".join(f"{_num_absent(questions, part):>10,}" for part in parts.values()))
    if named := _absent(questions, everything)[:MOST_NAMED]:
        lines.append("absent pictures, the first: " + "; ".join(named))
    lines += [f"list {name}: {len(qids):,} questions" for name, qids in questions.lists.items()]
    unit, count = _counter(tokenizer)
    lines.append(f"\nlengths in {unit:<15}" + "".join(f"{name:>10}" for name in ("mean", "median", "95%", "longest")))
    formats = {format: list(filter(is_question, everything)) for format in FORMATS}
    formats |= {"P-T": [problem for problem in everything if not is_question(problem)]}
    for format, problems in formats.items():
        if not problems:
            continue
        pairs = [build_pair(problem, format) for problem in problems]
        for side, texts in (("source", [source for source, _ in pairs]), ("target", [target for _, target in pairs])):
            lines.append(f"{format + ' ' + side:<26}" + _statistics(count(texts)))
    return lines


_COUNTED: dict[str, Callable[[Sample], bool]] = {
    "questions": lambda problem: True,
    "with image": lambda problem: bool(problem.images),
    "with text context (hint)": lambda problem: bool(problem.hint),
    "with both": lambda problem: bool(problem.images and problem.hint),
    "with neither": lambda problem: not problem.images and not problem.hint,
    "with caption": lambda problem: bool(problem.caption),
    "without a rationale": lambda problem: not problem.solution,
}


def _num_of_kind(problems: Sequence[Sample], kind: str) -> int:
    return sum(problem.kind == kind for problem in problems)


def _num_absent(questions: QuestionSet, problems: Sequence[Sample]) -> int:
    return len(_absent(questions, problems))


def _absent(questions: QuestionSet, problems: Sequence[Sample]) -> list[str]:
    """The questions that name pictures of which none exists, each with the first of them."""
    return [
        f"{problem.images[0]} of question {problem.qid}"
        for problem in problems
        if problem.images
        and not any(isinstance(picture, bytes) or picture.is_file() for picture in questions.pictures(problem))
    ]


def _counter(tokenizer: str | None) -> tuple[str, Callable[[list[str]], np.ndarray]]:
    if tokenizer is None:
        return "words", lambda texts: np.array([len(text.split()) for text in texts])
    from mmcot.texts.tokenizer import open_tokenizer

    loaded = open_tokenizer(tokenizer)
    return "tokens", lambda texts: np.array([len(ids) for ids in loaded(texts).input_ids])


def _statistics(lengths: np.ndarray) -> str:
    values = (lengths.mean(), np.median(lengths), np.percentile(lengths, 95), lengths.max())
    return "".join(f"{value:>10,.0f}" for value in values)
