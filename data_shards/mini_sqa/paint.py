"""The pictures of MiniSQA: 8 x 8 tiles of one colour each, painted from a hidden fact.

The fact determines a few tiles. The background's tint, shades, positions and pale grey
distractor tiles are drawn independently of it. A picture is an array [8, 8, 3], uint8 RGB:

    paint_magnets(rng, ("south", "north"))  # row 4: . red blue . . red blue .

This module handles neither words nor files.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

GRID = 8  # tiles a side
Fact = tuple[Any, ...]
Colour = tuple[int, int, int]

RED, BLUE, GREEN, YELLOW = (220, 40, 40), (40, 60, 220), (12, 150, 90), (243, 200, 12)
PURPLE, ORANGE, TEAL, DARK = (140, 50, 190), (240, 130, 30), (30, 160, 170), (35, 35, 45)


def _ground(rng: random.Random) -> np.ndarray:
    """A light background with a slight tint."""
    tiles = np.empty((GRID, GRID, 3), np.uint8)
    tiles[:] = [rng.randrange(243, 256) for _ in range(3)]
    return tiles


def _jitter(rng: random.Random, colour: Colour, amount: int = 12) -> Colour:
    return tuple(min(255, max(0, part + rng.randint(-amount, amount))) for part in colour)  # type: ignore[return-value]


def _distract(rng: random.Random, tiles: np.ndarray, free: list[tuple[int, int]], most: int = 4) -> None:
    """Paint up to ``most`` pale grey distractor tiles on free places."""
    for row, column in rng.sample(free, rng.randint(0, most)):
        tiles[row, column] = rng.randrange(196, 226)


def _places(rows: range | tuple[int, ...], columns: range | tuple[int, ...]) -> list[tuple[int, int]]:
    return [(row, column) for row in rows for column in columns]


def paint_magnets(rng: random.Random, fact: Fact) -> np.ndarray:
    """Two magnets of two tiles in one row; the inner poles are in columns 2 and 5."""
    tiles, row = _ground(rng), rng.randrange(GRID)
    colours = {"north": _jitter(rng, RED), "south": _jitter(rng, BLUE)}
    other = {"north": "south", "south": "north"}
    for column, pole in ((1, other[fact[0]]), (2, fact[0]), (5, fact[1]), (6, other[fact[1]])):
        tiles[row, column] = colours[pole]
    _distract(rng, tiles, _places(tuple(r for r in range(GRID) if r != row), range(GRID)))
    return tiles


def paint_bars(rng: random.Random, fact: Fact) -> np.ndarray:
    """Two bars of as many tiles as there are particles, the top one dark."""
    tiles, top = _ground(rng), _jitter(rng, DARK)
    body = _jitter(rng, rng.choice(((150, 190, 240), (170, 220, 170), (240, 190, 150), (210, 180, 235))))
    for column, height in zip((2, 5), fact, strict=True):
        tiles[GRID - height :, column] = body
        tiles[GRID - height, column] = top
    _distract(rng, tiles, _places(range(GRID), (0, 1, 3, 4, 6, 7)))
    return tiles


def paint_thermometers(rng: random.Random, fact: Fact) -> np.ndarray:
    """Two glass tubes; the dark tile is the top of the liquid, each tile 10 degrees."""
    tiles, top = _ground(rng), _jitter(rng, (120, 10, 20))
    liquid, glass = _jitter(rng, (245, 150, 150)), rng.randrange(228, 240)
    for column, degrees in zip((1, 6), fact, strict=True):
        row = GRID - degrees // 10
        tiles[1:, column] = glass
        tiles[row:, column] = liquid
        tiles[row, column] = top
    _distract(rng, tiles, _places(range(GRID), (0, 2, 3, 4, 5, 7)))
    return tiles


def map_side(fact: Fact) -> str:
    """The side of the picture in the question's direction; a compass that points down rotates the map."""
    direction, compass, _ = fact
    upright = compass == "up"
    return {"north": ("bottom", "top"), "east": ("left", "right")}[direction][upright]


def paint_map(rng: random.Random, fact: Fact) -> np.ndarray:
    """Four lands at the four sides; the dark half of the compass in the middle points north."""
    tiles, side, colour = _ground(rng), map_side(fact), fact[2]
    lands = {"red": RED, "blue": BLUE, "green": GREEN, "yellow": YELLOW}
    vertical, horizontal = ["red", "blue"], ["green", "yellow"]
    rng.shuffle(vertical)
    rng.shuffle(horizontal)
    pair = vertical if side in ("top", "bottom") else horizontal
    if pair[side in ("bottom", "right")] != colour:
        pair.reverse()
    start, stop = rng.choice(((2, 5), (3, 6), (2, 6)))
    for rows, land in zip((slice(0, 2), slice(6, 8)), vertical, strict=True):
        tiles[rows, start:stop] = _jitter(rng, lands[land])
    start, stop = rng.choice(((2, 5), (3, 6), (2, 6)))
    for columns, land in zip((slice(0, 2), slice(6, 8)), horizontal, strict=True):
        tiles[start:stop, columns] = _jitter(rng, lands[land])
    tiles[2:6, 3:5] = rng.randrange(196, 226)
    tiles[slice(2, 4) if fact[1] == "up" else slice(4, 6), 3:5] = _jitter(rng, DARK)
    _distract(rng, tiles, _places((0, 1, 6, 7), (0, 1, 6, 7)))
    return tiles


def paint_food_web(rng: random.Random, fact: Fact) -> np.ndarray:
    """Grass (green), an arrow (dark) and the animal that eats the grass, side by side."""
    tiles, row, column = _ground(rng), rng.randrange(GRID), rng.randrange(1, 4)
    animal = {"mouse": PURPLE, "rabbit": ORANGE, "goose": TEAL}[fact[0]]
    tiles[row, column] = _jitter(rng, GREEN)
    tiles[row, column + 1] = _jitter(rng, DARK)
    tiles[row, column + 2 : column + 4] = _jitter(rng, animal)
    _distract(rng, tiles, _places(tuple(r for r in range(GRID) if r != row), range(GRID)))
    return tiles


# Places of tiles, (row, column), of shapes up to 3 x 3.
SHAPES = (
    ((0, 0), (0, 1), (1, 0), (1, 1)),
    ((0, 0), (0, 1), (0, 2)),
    ((0, 0), (1, 0), (2, 0)),
    ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1)),
    ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2)),
)


def paint_shape(rng: random.Random, fact: Fact) -> np.ndarray:
    """One shape of a colour ``fact[0]``, (red, green, blue); shape, place and shade are drawn."""
    tiles, shape, colour = _ground(rng), rng.choice(SHAPES), _jitter(rng, fact[0])
    top, left = rng.randrange(GRID - 2), rng.randrange(GRID - 2)
    for row, column in shape:
        tiles[top + row, left + column] = colour
    around = {(top + row, left + column) for row in range(3) for column in range(3)}
    _distract(rng, tiles, [place for place in _places(range(GRID), range(GRID)) if place not in around])
    return tiles
