"""Ceilings of MiniSQA: the best possible accuracy from the text alone, computed from the tables of the skills."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from data_shards.mini_sqa.skills import SKILLS, VERSION, Skill


def compute_ceilings(skills: Sequence[Skill] = SKILLS) -> dict[str, Any]:
    """The content of ``ceilings.json``: the best possible accuracy from the text alone.

    ``direct_text`` gives the most probable answer given the text; ``chain_text`` generates the
    most probable next word of the solution until it is complete, and gives its answer.
    """
    return {
        "version": VERSION,
        "per_skill": {
            skill.skill: {"direct_text": _direct_ceiling(skill), "chain_text": _chain_ceiling(skill)}
            for skill in skills
        },
        "about": "Bayes-optimal accuracy from the text alone, of answering directly (direct_text) and of a greedy "
        "chain of thought (chain_text), computed from the probability tables of the generator.",
    }


def _direct_ceiling(skill: Skill) -> float:
    mass: dict[Any, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for fact, share in skill.table:
        mass[skill.visible(fact)][skill.answer(fact)] += share
    return round(sum(max(answers.values()) for answers in mass.values()), 6)


def _chain_ceiling(skill: Skill) -> float:
    groups: dict[Any, list[tuple[list[str], int, float]]] = defaultdict(list)
    for fact, share in skill.table:
        groups[skill.visible(fact)].append((skill.solve(fact).split(), skill.answer(fact), share))
    right = 0.0
    for group in groups.values():
        chosen = _greedy_answer(group)
        right += sum(share for _, answer, share in group if answer == chosen)
    return round(right, 6)


def _greedy_answer(group: list[tuple[list[str], int, float]]) -> int:
    """Return the answer of the solution whose every next word is the most probable one."""
    place = 0
    while len({tuple(words) for words, _, _ in group}) > 1:
        mass: dict[str, float] = defaultdict(float)
        for words, _, share in group:
            mass["".join(words[place : place + 1])] += share
        likeliest = max(mass, key=mass.__getitem__)
        group = [row for row in group if "".join(row[0][place : place + 1]) == likeliest]
        place += 1
    return group[0][1]
