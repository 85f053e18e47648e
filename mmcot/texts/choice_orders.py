"""Questions with changed choices, to test whether a model reads the choices or has learned letters.

    changed = change_choices(problem, "reversed", rng=random.Random(0), others=["the owl", "past"])

The question and the right choice stay the same; only its letter and the other choices change.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from mmcot.texts.sample import Sample

CHANGES = ("as given", "reversed", "rotated", "one replaced", "one removed", "one added")
MAX_ADDED_TO = 3  # a choice is added only to a question with at most this many
MIN_REMOVED_FROM = 3


def change_choices(problem: Sample, change: str, *, rng: random.Random, others: Sequence[str]) -> Sample | None:
    """Return the question with one change of ``CHANGES``.

    Args:
        problem: with a gold answer.
        rng: draws the distractor that is replaced or removed, the new choice, and its place.
        others: choices of other skills to draw from.

    Returns:
        The changed question, or None where the change is not possible: a choice can only be removed
        from three or more, and only be added to fewer than four; a sample without choices has none to change.

    Raises:
        ValueError: the change is unknown.
    """
    number = len(problem.choices)
    if not number and change in CHANGES:
        return problem if change == "as given" else None
    distractors = [index for index in range(number) if index != problem.answer]
    strangers = [choice for choice in others if choice not in problem.choices]
    if change == "as given":
        return problem
    if change == "reversed":
        return problem.with_choices_in_order(range(number - 1, -1, -1))
    if change == "rotated":
        return problem.with_choices_in_order([*range(1, number), 0])
    if change == "one removed":
        return None if number < MIN_REMOVED_FROM else _without(problem, rng.choice(distractors))
    if change not in CHANGES:
        raise ValueError(f"change {change!r} is unknown; expected one of {', '.join(CHANGES)}")
    if not strangers or (change == "one added" and number > MAX_ADDED_TO):
        return None
    if change == "one replaced":
        choices = list(problem.choices)
        choices[rng.choice(distractors)] = rng.choice(strangers)
        return dataclasses.replace(problem, choices=tuple(choices))
    place = rng.randint(0, number)
    choices = (*problem.choices[:place], rng.choice(strangers), *problem.choices[place:])
    answer = None if problem.answer is None else problem.answer + (place <= problem.answer)
    return dataclasses.replace(problem, choices=choices, answer=answer)


def _without(problem: Sample, place: int) -> Sample:
    choices = problem.choices[:place] + problem.choices[place + 1 :]
    answer = None if problem.answer is None else problem.answer - (place < problem.answer)
    return dataclasses.replace(problem, choices=choices, answer=answer)
