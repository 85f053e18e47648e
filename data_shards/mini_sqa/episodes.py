"""Episodes: documents in which two new words must be learned from pictures.

    <image> dax <image> wug <image> dax          a dax is red and a wug is blue here; the last picture is red

Every episode gives two colours two of ``WORDS``; shapes, places and shades are noise. 2 to ``max_shots`` pictures with
their word come first, in random order, each colour at least once; the word of one more picture is to be written. Text
alone leaves two words, equally likely. An eighth of the training documents only names a colour (``<image> red``), so
that colours can be learned first. Half of the test episodes are of two colours that are in no other document. The
lists ``naming`` and ``episodes`` (of train), ``known-colours`` and ``new-colours`` (of test) name these parts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_shards.mini_sqa.paint import (
    BLUE,
    DARK,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    YELLOW,
    Colour,
    paint_shape,
)
from mmcot.errors import InputError

MIN_SHOTS, MAX_SHOTS = 2, 8  # pictures with their word
NAMING_SHARE = 1 / 8  # of the training documents
NAMING, EPISODES, KNOWN, NEW = "naming", "episodes", "known-colours", "new-colours"
WORDS = (
    *("blick", "dax", "fep", "gorp", "kiv", "lum", "mib", "nop"),
    *("pilk", "rud", "sarn", "toma", "vash", "wug", "yim", "zup"),
)
COLOURS: dict[str, Colour] = {
    "red": RED,
    "blue": BLUE,
    "green": GREEN,
    "yellow": YELLOW,
    "purple": PURPLE,
    "orange": ORANGE,
}
NEW_COLOURS: dict[str, Colour] = {"teal": TEAL, "black": DARK}  # in test episodes alone
_MAX_DRAWS = 200  # for one picture


def most_shots(max_pictures: int) -> int:
    """Return the largest number of shots whose pictures and the last one are at most ``max_pictures``.

    Raises:
        ValueError: there is no room for the fewest shots.
    """
    if max_pictures < MIN_SHOTS + 1:
        raise InputError(
            f"data.max_pictures ({max_pictures}) must be at least {MIN_SHOTS + 1} for episodes of MiniSQA, which have "
            f"{MIN_SHOTS} to {MAX_SHOTS} pictures with a word and one more; set it, such as to {MAX_SHOTS + 1}"
        )
    return min(MAX_SHOTS, max_pictures - 1)


def draw_episodes(
    rng: random.Random, split: str, size: int, *, max_shots: int, pictures: set[bytes]
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray], tuple[str, ...]]]:
    """Yield the documents of a split as (record, tiles of its pictures by name, its lists), in random order.

    Args:
        max_shots: 2 to ``MAX_SHOTS``.
        pictures: all pictures so far, so that no two are equal.
    """
    num_naming = round(size * NAMING_SHARE) if split == "train" else 0
    num_new = size // 2 if split == "test" else 0
    kinds = [NAMING] * num_naming + [NEW] * num_new + [KNOWN] * (size - num_naming - num_new)
    rng.shuffle(kinds)
    for kind in kinds:
        if kind == NAMING:
            colours = [rng.choice(list(COLOURS))]
            words = colours
        else:
            colours, words = _draw_episode(rng, list(NEW_COLOURS if kind == NEW else COLOURS), max_shots)
        palette = COLOURS | NEW_COLOURS
        tiles = {f"{number}.png": _draw_picture(rng, palette[name], pictures) for number, name in enumerate(colours)}
        lists = {"train": (NAMING if kind == NAMING else EPISODES,), "test": (kind,)}.get(split, ())
        yield _record(kind, list(zip(tiles, words, strict=True)), split), tiles, lists


def _draw_episode(rng: random.Random, colours: list[str], max_shots: int) -> tuple[list[str], list[str]]:
    """Draw the colours of an episode's pictures, the one to be named last, and their words."""
    two, words = rng.sample(colours, 2), rng.sample(WORDS, 2)
    shots = [*two, *rng.choices(two, k=rng.randint(MIN_SHOTS, max_shots) - MIN_SHOTS)]
    rng.shuffle(shots)
    shown = [*shots, rng.choice(two)]
    return shown, [words[two.index(colour)] for colour in shown]


def _draw_picture(rng: random.Random, colour: Colour, pictures: set[bytes]) -> np.ndarray:
    for _ in range(_MAX_DRAWS):
        tiles = paint_shape(rng, (colour,))
        if tiles.tobytes() not in pictures:
            pictures.add(tiles.tobytes())
            return tiles
    raise InputError(f"no new picture in {_MAX_DRAWS} draws; expected all to differ: generate fewer episodes")


def _record(kind: str, shown: list[tuple[str, str]], split: str) -> dict[str, Any]:
    """The record of pictures with their words, by name of the picture."""
    return {
        "document": [part for name, word in shown for part in ({"image": name}, {"text": word})],
        "image": [name for name, _ in shown],
        "task": "document",
        "topic": "colours" if kind == NAMING else f"{len(shown) - 1} shots",
        "category": kind,
        "skill": "Name a colour" if kind == NAMING else "Learn a new word for a colour",
        "split": split,
    }
