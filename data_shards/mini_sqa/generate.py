"""Generating MiniSQA: a small, image-dependent science quiz in ScienceQA's layout.

A row of ``problems.json``, by question id, has exactly ScienceQA's fields:

    "17": {"question": "Will these magnets attract or repel each other?", "choices": ["attract", "repel"],
           "answer": 0, "hint": "Ada found two magnets at school on Monday.", "image": "image.png",
           "task": "closed choice", "grade": "grade3", "subject": "natural science", "topic": "physics",
           "category": "Magnets", "skill": "Predict whether two magnets attract or repel",
           "lecture": "A red tile is ...", "solution": "The inner poles are south and north. ...", "split": "train"}

``ceilings.json`` contains the best possible accuracy from the text alone, computed from the
generator's tables. This module does not depend on shards, prompts, tokens or models.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_shards.mini_sqa.skills import SKILLS, Paint, Skill
from data_shards.sources.pictures import open_picture

VERSION: int = 2
TILE_PIXELS = 8
MAX_CHOICES = 5  # as in ScienceQA
FACT_CAPTION_SHARE = 0.1
MAX_DRAWS = 200  # for one row; after that no new row is possible


def write_mini_sqa(
    output_dir: str | Path,
    *,
    num_train: int = 4000,
    num_val: int = 400,
    num_test: int = 800,
    seed: int = 0,
    shuffle_choices: bool = True,
    extra_choices: int = 1,
) -> None:
    """Write the data set to a folder; files of the same name are overwritten.

    Args:
        shuffle_choices: each row has its own order of choices, so that a letter must be looked up; without it, all
            choices of a skill have one order and a letter always means the same word.
        extra_choices: a row has 0 to this many choices of other skills in addition to its own, and none twice as
            often as each other number (at most ``MAX_CHOICES`` in all). They carry no information, because all
            choices of the row's own skill are present.

    The same arguments give the same texts and the same pixels. No two rows of all splits
    share question, hint and choices, and no two pictures are equal.

    Raises:
        ValueError: a size is negative, or larger than the number of different rows there are.
    """
    root = Path(output_dir)
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"num_{name} ({size}) must be 0 or more; give a number of questions")
    problems: dict[str, dict[str, Any]] = {}
    captions: dict[str, str] = {}
    splits: dict[str, list[str]] = {}
    texts: set[tuple[Any, ...]] = set()
    pictures: set[bytes] = set()
    for split, size in sizes.items():
        rows = _draw_split(split, size, seed=seed, texts=texts, pictures=pictures)
        splits[split] = [str(len(problems) + 1 + index) for index in range(len(rows))]
        for qid, (record, caption, tiles) in zip(splits[split], rows, strict=True):
            choices = random.Random(f"choices-{seed}-{qid}")
            record = _with_extra_choices(record, choices, extra_choices)
            problems[qid] = _with_shuffled_choices(record, choices) if shuffle_choices else record
            if tiles is not None:
                captions[qid] = caption
                _write_picture(root / "images" / split / qid / "image.png", tiles)
    _write_json(root / "problems.json", problems)
    _write_json(root / "captions.json", {"captions": captions})
    _write_json(root / "pid_splits.json", _with_mini_splits(splits))
    _write_json(root / "ceilings.json", compute_ceilings())


def compute_ceilings() -> dict[str, Any]:
    """The content of ``ceilings.json``: the best possible accuracy from the text alone.

    ``direct_text`` gives the most probable answer given the text; ``chain_text`` generates the
    most probable next word of the solution until it is complete, and gives its answer.
    """
    return {
        "version": VERSION,
        "per_skill": {
            skill.skill: {"direct_text": _direct_ceiling(skill), "chain_text": _chain_ceiling(skill)}
            for skill in SKILLS
        },
        "about": "Bayes-optimal accuracy from the text alone, of answering directly (direct_text) and of a greedy "
        "chain of thought (chain_text), computed from the probability tables of the generator.",
    }


def content_sha256(data_dir: str | Path) -> str:
    """Return one hash over the three text files and the decoded pixels of the pictures, in qid order."""
    root, digest = Path(data_dir), hashlib.sha256()
    for name in ("problems.json", "pid_splits.json", "captions.json"):
        digest.update((root / name).read_bytes())
    problems = json.loads((root / "problems.json").read_text(encoding="utf-8"))
    for qid in sorted(problems, key=int):
        if problems[qid]["image"] is not None:
            path = root / "images" / problems[qid]["split"] / qid / problems[qid]["image"]
            digest.update(np.asarray(open_picture(path, name=str(path))).tobytes())
    return digest.hexdigest()


def _quota(shares: Sequence[float], total: int) -> list[int]:
    """Distribute a total by shares: floors first, then one each to the largest remainders."""
    exact = [share * total / sum(shares) for share in shares]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: -round(exact[index] - counts[index], 9))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _draw_split(split: str, size: int, *, seed: int, texts: set, pictures: set) -> list[tuple[dict, str, Any]]:
    """Draw all rows of a split as (record, caption, tiles or None), shuffled."""
    rng = random.Random(f"mini_sqa-{VERSION}-{seed}-{split}")
    rows = []
    for skill, num_rows in zip(SKILLS, _quota([1] * len(SKILLS), size), strict=True):
        counts = _quota([share for _, share in skill.table], num_rows)
        facts = [fact for (fact, _), count in zip(skill.table, counts, strict=True) for _ in range(count)]
        rng.shuffle(facts)
        num_telling = _quota([FACT_CAPTION_SHARE, 1 - FACT_CAPTION_SHARE], num_rows)[0]
        for index, fact in enumerate(facts):
            question, hint = _draw_text(rng, skill, fact, texts)
            caption, tiles = "", None
            if skill.paint is not None:
                tiles = _draw_tiles(rng, skill, skill.paint, fact, pictures)
                caption = skill.key_fact(fact) if index < num_telling else rng.choice(skill.scenes)
            rows.append((_record(rng, skill, fact, question, hint, split), caption, tiles))
    rng.shuffle(rows)
    return rows


def _draw_text(rng: random.Random, skill: Skill, fact: tuple, texts: set) -> tuple[str, str]:
    for _ in range(MAX_DRAWS):
        question, hint = skill.ask(rng, fact)
        key = (question, hint, skill.choices)
        if key not in texts:
            texts.add(key)
            return question, hint
    raise _exhausted("question text", skill)


def _draw_tiles(rng: random.Random, skill: Skill, paint: Paint, fact: tuple, pictures: set) -> np.ndarray:
    for _ in range(MAX_DRAWS):
        tiles = paint(rng, fact)
        if tiles.tobytes() not in pictures:
            pictures.add(tiles.tobytes())
            return tiles
    raise _exhausted("picture", skill)


def _exhausted(what: str, skill: Skill) -> ValueError:
    return ValueError(
        f"no new {what} for the skill {skill.skill!r} in {MAX_DRAWS} draws; expected every row of all splits to "
        "differ; generate fewer questions or add words and tints to data_shards/mini_sqa/skills.py"
    )


def _record(rng: random.Random, skill: Skill, fact: tuple, question: str, hint: str, split: str) -> dict[str, Any]:
    return {
        "question": question,
        "choices": list(skill.choices),
        "answer": skill.answer(fact),
        "hint": hint,
        "image": None if skill.paint is None else "image.png",
        "task": "closed choice",
        "grade": skill.grade,
        "subject": skill.subject,
        "topic": skill.topic,
        "category": skill.category,
        "skill": skill.skill,
        "lecture": skill.lecture if rng.random() < skill.lecture_rate else "",
        "solution": skill.solve(fact),
        "split": split,
    }


def _with_mini_splits(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """Add trainval and, of each split, a tenth (rounded up) as its mini split."""
    minis = {f"mini{name}": qids[: math.ceil(len(qids) / 10)] for name, qids in splits.items()}
    return {**splits, "trainval": splits["train"] + splits["val"], **minis}


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


def _with_extra_choices(record: dict[str, Any], rng: random.Random, most: int) -> dict[str, Any]:
    own = record["choices"]
    others = sorted({choice for skill in SKILLS for choice in skill.choices} - set(own))
    number = rng.choice((0, *range(min(most, MAX_CHOICES - len(own)) + 1)))
    return record | {"choices": own + rng.sample(others, number)}


def _with_shuffled_choices(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    order = list(range(len(record["choices"])))
    rng.shuffle(order)
    return record | {"choices": [record["choices"][index] for index in order], "answer": order.index(record["answer"])}


def _write_picture(path: Path, tiles: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = tiles.repeat(TILE_PIXELS, axis=0).repeat(TILE_PIXELS, axis=1)
    Image.fromarray(pixels).save(path)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
