"""Generating MiniSQA: a small, image-dependent science quiz in ScienceQA's layout.

A row of ``problems.json``, by question id, has exactly ScienceQA's fields:

    "17": {"question": "Will these magnets attract or repel each other?", "choices": ["attract", "repel"],
           "answer": 0, "hint": "Ada found two magnets at school on Monday.", "image": "image.png",
           "task": "closed choice", "grade": "grade3", "subject": "natural science", "topic": "physics",
           "category": "Magnets", "skill": "Predict whether two magnets attract or repel",
           "lecture": "A red tile is ...", "solution": "The inner poles are south and north. ...", "split": "train"}

``ceilings.json`` contains the best possible accuracy from the text alone, computed from the
generator's tables (``ceilings.py``). The same questions may have a free answer instead of choices, their pictures may
be image-text pairs, and ``episodes.py`` draws documents. This module does not depend on shards, prompts, tokens or
models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_shards.mini_sqa.ceilings import compute_ceilings
from data_shards.mini_sqa.episodes import MAX_SHOTS, draw_episodes
from data_shards.mini_sqa.skills import SKILLS, VERSION, Paint, Skill, accepted_answers, skills_named
from data_shards.sources.pictures import open_picture
from mmcot.errors import InputError

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
    form: str = "choices",
    skills: Sequence[str] | None = None,
    telling_captions: bool = False,
    max_shots: int = MAX_SHOTS,
) -> None:
    """Write the data set to a folder; files of the same name are overwritten.

    Args:
        shuffle_choices: each row has its own order of choices, so that a letter must be looked up; without it, all
            choices of a skill have one order and a letter always means the same word.
        extra_choices: a row has 0 to this many choices of other skills in addition to its own, and none twice as
            often as each other number (at most ``MAX_CHOICES`` in all). They carry no information, because all
            choices of the row's own skill are present.
        form: one of ``FORMS``: questions with choices, the same questions with free answers, the pictures with their
            captions as image-text pairs, or documents (``episodes.py``).
        skills: names of the skills, each of which gets an equal share; None for all. Captions are of skills with a
            picture; episodes have none.
        telling_captions: every caption states the hidden fact, not one in ten; questions and pictures stay the same.
        max_shots: the largest number of pictures with a word in an episode.

    The same arguments give the same texts and the same pixels. No two rows of all splits
    share question, hint and choices, and no two pictures are equal.

    Raises:
        ValueError: a size is negative, or larger than the number of different rows there are; the form or a skill is
            unknown, or does not go with the others.
    """
    root, chosen = Path(output_dir), chosen_skills(form, skills, telling_captions=telling_captions)
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    for name, size in sizes.items():
        if size < 0:
            raise InputError(f"num_{name} ({size}) must be 0 or more; give a number of questions")
    problems: dict[str, dict[str, Any]] = {}
    captions: dict[str, str] = {}
    splits: dict[str, list[str]] = {}
    lists: dict[str, list[str]] = {}
    seen = _Seen()
    for split, size in sizes.items():
        splits[split] = [str(len(problems) + 1 + index) for index in range(size)]
        if form == "episodes":
            rng = random.Random(f"mini_sqa-episodes-{VERSION}-{seed}-{split}")
            rows = (Row(*row) for row in draw_episodes(rng, split, size, max_shots=max_shots, pictures=seen.pictures))
        else:
            rows = _draw_split(split, size, seed=seed, seen=seen, skills=chosen, telling=telling_captions)
        for qid, row in zip(splits[split], rows, strict=True):
            if form == "choices":
                choices = random.Random(f"choices-{seed}-{qid}")
                record = _with_extra_choices(row.record, choices, extra_choices)
                problems[qid] = _with_shuffled_choices(record, choices) if shuffle_choices else record
            else:
                problems[qid] = _IN_FORM[form](row)
            if row.caption and form != "captions":  # there it is the text
                captions[qid] = row.caption
            for name in row.lists:
                lists.setdefault(name, []).append(qid)
            for name, tiles in row.pictures.items():
                _write_picture(root / "images" / split / qid / name, tiles)
    _write_json(root / "problems.json", problems)
    _write_json(root / "captions.json", {"captions": captions})
    _write_json(root / "pid_splits.json", _with_mini_splits(splits) | lists)
    if form in ("choices", "free") and not telling_captions:
        _write_json(root / "ceilings.json", compute_ceilings(chosen))


def chosen_skills(form: str, skills: Sequence[str] | None, *, telling_captions: bool) -> tuple[Skill, ...]:
    """Return the skills of a data set in the order of ``SKILLS``.

    Raises:
        ValueError: the form or a skill is unknown, or does not go with the others.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} of MiniSQA is unknown; expected one of {', '.join(FORMS)}")
    if form == "episodes" and (skills or telling_captions):
        raise InputError("episodes of MiniSQA have neither skills nor captions; leave out skills and telling_captions")
    return skills_named(skills, with_picture=form == "captions")


def content_sha256(data_dir: str | Path) -> str:
    """Return one hash over the three text files and the decoded pixels of the pictures, in qid order."""
    root, digest = Path(data_dir), hashlib.sha256()
    for name in ("problems.json", "pid_splits.json", "captions.json"):
        digest.update((root / name).read_bytes())
    problems = json.loads((root / "problems.json").read_text(encoding="utf-8"))
    for qid in sorted(problems, key=int):
        names = problems[qid]["image"] or []
        for name in [names] if isinstance(names, str) else names:
            path = root / "images" / problems[qid]["split"] / qid / name
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


@dataclasses.dataclass
class _Seen:
    """The texts and pictures of all splits so far, so that no two are equal."""

    texts: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)
    pictures: set[bytes] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Row:
    """A drawn row: its record, pictures by name, further lists of its split, and what is known about its question."""

    record: dict[str, Any]
    pictures: dict[str, np.ndarray]
    lists: tuple[str, ...] = ()
    caption: str = ""
    accepted: tuple[str, ...] = ()


def _draw_split(split: str, size: int, *, seed: int, seen: _Seen, skills: Sequence[Skill], telling: bool) -> list[Row]:
    """Draw all rows of a split, shuffled."""
    rng = random.Random(f"mini_sqa-{VERSION}-{seed}-{split}")
    rows = []
    for skill, num_rows in zip(skills, _quota([1] * len(skills), size), strict=True):
        counts = _quota([share for _, share in skill.table], num_rows)
        facts = [fact for (fact, _), count in zip(skill.table, counts, strict=True) for _ in range(count)]
        rng.shuffle(facts)
        num_telling = _quota([FACT_CAPTION_SHARE, 1 - FACT_CAPTION_SHARE], num_rows)[0]
        for index, fact in enumerate(facts):
            question, hint = _draw_text(rng, skill, fact, seen.texts)
            caption, pictures = "", {}
            if skill.paint is not None:
                pictures = {"image.png": _draw_tiles(rng, skill, skill.paint, fact, seen.pictures)}
                scene = "" if index < num_telling else rng.choice(skill.scenes)
                caption = skill.key_fact(fact) if telling or not scene else scene
            record = _record(rng, skill, fact, question, hint, split)
            accepted = tuple(accepted_answers(skill, record["answer"]))
            rows.append(Row(record, pictures, caption=caption, accepted=accepted))
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


def _with_extra_choices(record: dict[str, Any], rng: random.Random, most: int) -> dict[str, Any]:
    own = record["choices"]
    others = sorted({choice for skill in SKILLS for choice in skill.choices} - set(own))
    number = rng.choice((0, *range(min(most, MAX_CHOICES - len(own)) + 1)))
    return record | {"choices": own + rng.sample(others, number)}


def _with_shuffled_choices(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    order = list(range(len(record["choices"])))
    rng.shuffle(order)
    return record | {"choices": [record["choices"][index] for index in order], "answer": order.index(record["answer"])}


def _with_free_answer(row: Row) -> dict[str, Any]:
    kept = {name: value for name, value in row.record.items() if name not in ("choices", "answer")}
    return kept | {"answers": list(row.accepted), "task": "free answer"}


def _as_pair(row: Row) -> dict[str, Any]:
    """The picture and its caption, without the question on it."""
    kept = ("image", "grade", "subject", "topic", "category", "skill", "split")
    return {"text": row.caption, **{name: row.record[name] for name in kept}, "task": "caption"}


_IN_FORM: dict[str, Callable[[Row], dict[str, Any]]] = {
    "free": _with_free_answer,
    "captions": _as_pair,
    "episodes": lambda row: row.record,
}
FORMS = ("choices", *_IN_FORM)


def _write_picture(path: Path, tiles: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = tiles.repeat(TILE_PIXELS, axis=0).repeat(TILE_PIXELS, axis=1)
    Image.fromarray(pixels).save(path)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
