"""The eight skills of MiniSQA: what is asked, what is hidden, how it is shown and solved.

A skill's hidden fact, such as the inner poles ``("south", "north")`` of two magnets,
fixes picture, solution and answer. Everything else (names, places, wording, tints,
grey tiles) is nuisance: drawn apart from the fact and never part of the solution.

    MAGNETS.table    = ((("south", "south"), 0.36), (("north", "south"), 0.30), ...)
    MAGNETS.solve(("south", "north")) = "The left magnet shows its south pole and ..."
    MAGNETS.paint(rng, ("south", "north")) -> 8 x 8 tiles of RGB, uint8

This module knows neither files nor splits nor quotas.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Hashable

import numpy as np

GRID = 8  # tiles a side
Fact = tuple[Hashable, ...]
Colour = tuple[int, int, int]

WORDS: dict[str, tuple[str, ...]] = {
    "name": (
        "Ada", "Amir", "Anna", "Ben", "Bo", "Cleo", "Dan", "Dora", "Eli", "Emma", "Finn", "Gus", "Hana", "Hugo", "Ian",
        "Ida", "Jack", "June", "Kai", "Kim", "Leo", "Lily", "Max", "Maya", "Nina", "Noah", "Omar", "Otto", "Pia", "Ravi",
        "Rosa", "Sam", "Sara", "Tara", "Theo", "Uma", "Vera", "Will", "Yuri", "Zoe",
    ),
    "place": (
        "at school", "at home", "in the lab", "in the kitchen", "in the garden", "in the library", "at the museum",
        "in the hall", "on the porch", "by the window", "near the lake", "in the park", "at the farm", "in the attic",
        "at the fair", "in the workshop",
    ),
    "time": (
        "this morning", "after lunch", "on Monday", "on Friday", "before dinner", "at noon", "in spring", "last week",
        "on Sunday", "in the evening",
    ),
    "island": (
        "Arbo", "Balto", "Corvo", "Delos", "Elba", "Faro", "Goro", "Hydra", "Ilos", "Juno", "Kilda", "Lundy", "Mora",
        "Naxos", "Orkla", "Paros", "Rhum", "Skye", "Tiree", "Unst",
    ),
    "plant": ("pea plant", "bean plant", "rose bush", "tomato plant", "corn plant", "tulip", "daisy", "melon plant"),
    "trait": ("tall stems", "red petals", "round seeds", "smooth leaves", "yellow pods", "long roots"),
    "verb": ("paint", "clean", "mend", "pack", "open"),
    "object": ("boat", "box", "cart", "chair", "door", "drum", "kite", "lamp", "sled", "table", "tent", "wagon"),
    "likeness": (
        "quiet as a mouse", "busy as a bee", "brave as a lion", "cold as ice", "light as a feather", "strong as an ox",
        "sly as a fox", "bright as the sun", "tall as a tree", "fast as the wind",
    ),
    "thing": ("wind", "sun", "moon", "rain", "river", "sea", "fog", "snow", "fire", "storm"),
    "deed": ("whispered to", "sang to", "smiled at", "winked at", "called to", "laughed at", "danced for", "waved to"),
    "count": ("a million", "a billion", "ten thousand", "a thousand"),
    "excess": ("waited {count} years", "told {count} jokes", "carried {count} tons", "ate {count} cakes"),
}  # fmt: skip

RED, BLUE, GREEN, YELLOW = (220, 40, 40), (40, 60, 220), (40, 160, 60), (245, 210, 40)
PURPLE, ORANGE, TEAL, DARK = (140, 50, 190), (240, 130, 30), (30, 160, 170), (35, 35, 45)


@dataclasses.dataclass(frozen=True)
class Skill:
    """One kind of question; ``table`` holds each hidden fact with its probability.

    ``ask(rng, fact)`` gives question and hint, ``paint(rng, fact)`` the tiles
    [8, 8, 3] (None: no picture), ``visible(fact)`` what the text tells of the fact.
    """

    skill: str
    subject: str
    topic: str
    category: str
    grade: str
    lecture: str
    choices: tuple[str, ...]
    table: tuple[tuple[Fact, float], ...]
    ask: Callable[[random.Random, Fact], tuple[str, str]]
    solve: Callable[[Fact], str]
    answer: Callable[[Fact], int]
    visible: Callable[[Fact], Hashable] = lambda fact: None
    paint: Callable[[random.Random, Fact], np.ndarray] | None = None
    scenes: tuple[str, ...] = ()
    key_fact: Callable[[Fact], str] | None = None
    lecture_rate: float = 1.0


def fill(rng: random.Random, template: str, **fixed: str) -> str:
    """Replace each ``{slot}`` by its fixed word, or by a word of ``WORDS`` (no word twice for one slot)."""
    used: set[str] = set()
    while (start := template.find("{")) >= 0:
        end = template.index("}", start)
        slot = template[start + 1 : end]
        word = fixed.get(slot) or rng.choice([word for word in WORDS[slot] if word not in used])
        used.add(word)
        template = template[:start] + word + template[end + 1 :]
    return template


def _asker(questions: tuple[str, ...], hints: tuple[str, ...] = ("",)) -> Callable[[random.Random, Fact], tuple[str, str]]:
    """Ask by templates in which ``{0}``, ``{1}`` stand for the parts of the fact (only what the text may tell)."""

    def ask(rng: random.Random, fact: Fact) -> tuple[str, str]:
        parts = {str(index): str(part) for index, part in enumerate(fact)}
        return fill(rng, rng.choice(questions), **parts), fill(rng, rng.choice(hints), **parts)

    return ask


# ---- pictures: 8 x 8 tiles on a light ground


def _ground(rng: random.Random) -> np.ndarray:
    tiles = np.empty((GRID, GRID, 3), np.uint8)
    tiles[:] = [rng.randrange(243, 256) for _ in range(3)]
    return tiles


def _jitter(rng: random.Random, colour: Colour, amount: int = 12) -> Colour:
    return tuple(min(255, max(0, part + rng.randint(-amount, amount))) for part in colour)  # type: ignore[return-value]


def _distract(rng: random.Random, tiles: np.ndarray, free: list[tuple[int, int]], most: int = 4) -> None:
    """Put up to ``most`` pale grey tiles, which mean nothing, on free places."""
    for row, column in rng.sample(free, rng.randint(0, most)):
        tiles[row, column] = rng.randrange(196, 226)


def _places(rows: range | tuple[int, ...], columns: range | tuple[int, ...]) -> list[tuple[int, int]]:
    return [(row, column) for row in rows for column in columns]


def _paint_magnets(rng: random.Random, fact: Fact) -> np.ndarray:
    tiles, row = _ground(rng), rng.randrange(GRID)
    colours = {"north": _jitter(rng, RED), "south": _jitter(rng, BLUE)}
    other = {"north": "south", "south": "north"}
    for column, pole in ((1, other[fact[0]]), (2, fact[0]), (5, fact[1]), (6, other[fact[1]])):
        tiles[row, column] = colours[pole]
    _distract(rng, tiles, _places(tuple(r for r in range(GRID) if r != row), range(GRID)))
    return tiles


def _paint_bars(rng: random.Random, fact: Fact) -> np.ndarray:
    tiles, top = _ground(rng), _jitter(rng, DARK)
    body = _jitter(rng, rng.choice(((150, 190, 240), (170, 220, 170), (240, 190, 150), (210, 180, 235))))
    for column, height in zip((2, 5), fact, strict=True):
        tiles[GRID - height :, column] = body
        tiles[GRID - height, column] = top
    _distract(rng, tiles, _places(range(GRID), (0, 1, 3, 4, 6, 7)))
    return tiles


def _paint_thermometers(rng: random.Random, fact: Fact) -> np.ndarray:
    tiles, top = _ground(rng), _jitter(rng, (120, 10, 20))
    liquid, glass = _jitter(rng, (245, 150, 150)), rng.randrange(228, 240)
    for column, degrees in zip((1, 6), fact, strict=True):
        row = GRID - degrees // 10
        tiles[1:, column] = glass
        tiles[row:, column] = liquid
        tiles[row, column] = top
    _distract(rng, tiles, _places(range(GRID), (0, 2, 3, 4, 5, 7)))
    return tiles


def _side(fact: Fact) -> str:
    """Where the asked direction lies on the sheet; a compass that points down turns everything round."""
    direction, compass, _ = fact
    upright = compass == "up"
    return {"north": ("bottom", "top"), "east": ("left", "right")}[direction][upright]


def _paint_map(rng: random.Random, fact: Fact) -> np.ndarray:
    tiles, side, colour = _ground(rng), _side(fact), fact[2]
    order = {"red": ("red", "blue"), "blue": ("blue", "red"), "green": ("green", "yellow"), "yellow": ("yellow", "green")}
    pair = order[colour] if side in ("top", "left") else order[colour][::-1]
    vertical = pair if side in ("top", "bottom") else rng.choice((("red", "blue"), ("blue", "red")))
    horizontal = pair if side in ("left", "right") else rng.choice((("green", "yellow"), ("yellow", "green")))
    lands = {"red": RED, "blue": BLUE, "green": GREEN, "yellow": YELLOW}
    start, stop = rng.choice(((2, 5), (3, 6), (2, 6)))
    for rows, land in zip((slice(0, 2), slice(6, 8)), vertical, strict=True):
        tiles[rows, start:stop] = _jitter(rng, lands[land])
    start, stop = rng.choice(((2, 5), (3, 6), (2, 6)))
    for columns, land in zip((slice(0, 2), slice(6, 8)), horizontal, strict=True):
        tiles[start:stop, columns] = _jitter(rng, lands[land])
    tiles[3:5, 3:5] = rng.randrange(196, 226)
    tiles[3 if fact[1] == "up" else 4, 3:5] = _jitter(rng, DARK)
    _distract(rng, tiles, _places((0, 1, 6, 7), (0, 1, 6, 7)))
    return tiles


def _paint_food_web(rng: random.Random, fact: Fact) -> np.ndarray:
    tiles, row, column = _ground(rng), rng.randrange(GRID), rng.randrange(1, 4)
    animal = {"mouse": PURPLE, "rabbit": ORANGE, "goose": TEAL}[fact[0]]
    tiles[row, column] = _jitter(rng, GREEN)
    tiles[row, column + 1] = _jitter(rng, DARK)
    tiles[row, column + 2 : column + 4] = _jitter(rng, animal)
    _distract(rng, tiles, _places(tuple(r for r in range(GRID) if r != row), range(GRID)))
    return tiles


# ---- solutions and answers that need more than a template


def _solve_magnets(fact: Fact) -> str:
    alike = "alike, so the magnets repel" if fact[0] == fact[1] else "different, so the magnets attract"
    return f"The inner poles are {fact[0]} and {fact[1]}. They are {alike}."


def _solve_pair(template: str) -> Callable[[Fact], str]:
    """A comparison: ``{0}`` and ``{1}`` are the two amounts, ``{2}`` the side with more."""
    return lambda fact: template.format(*fact, "left" if fact[0] > fact[1] else "right")


def _solve_food_web(fact: Fact) -> str:
    hunter = "owl" if fact[0] == "mouse" else "fox"
    return f"The grass feeds the {fact[0]}. The {fact[0]} feeds the {hunter}."


def _solve_trait(fact: Fact) -> str:
    shown = "recessive" if fact[0] == "tt" else "dominant"
    return f"The alleles are {fact[0]}, so the plant shows the {shown} form."


def _ask_language(question: str, sentence: Callable[[random.Random, Fact], str]):  # noqa: ANN202
    """The sentence stands in the question or, as often, in the hint."""

    def ask(rng: random.Random, fact: Fact) -> tuple[str, str]:
        text = sentence(rng, fact)
        return (f"{question}\n{text}", "") if rng.random() < 0.5 else (question, text)

    return ask


def _tense_sentence(rng: random.Random, fact: Fact) -> str:
    verb = {"past": "{verb}ed", "present": "{verb}s", "future": "will {verb}"}[fact[0]]
    return fill(rng, f"{{name}} {verb} the {{object}} {{place}}.")


def _figure_sentence(rng: random.Random, fact: Fact) -> str:
    templates = {
        "simile": "{name} was as {likeness} {place}.",
        "personification": "The {thing} {deed} {name} {place}.",
        "hyperbole": "{name} {excess} {place}.",
    }
    return fill(rng, templates[fact[0]])


_TENSE_SIGNS = {"past": "has happened", "present": "happens now", "future": "will happen"}
_FIGURE_SIGNS = {
    "simile": "compares two things",
    "personification": "gives a human deed to a thing",
    "hyperbole": "says far too much",
}

MAGNETS = Skill(
    skill="Predict whether two magnets attract or repel", subject="natural science", topic="physics",
    category="Magnets", grade="grade3",
    lecture="A red tile is a north pole, a blue tile a south pole. Poles that are different attract; poles that are alike repel.",
    choices=("attract", "repel"),
    table=((("south", "south"), 0.36), (("north", "south"), 0.30), (("south", "north"), 0.30), (("north", "north"), 0.04)),
    ask=_asker(
        ("Will these magnets attract or repel each other?", "What will these two magnets do?",
         "How do the two magnets in the picture act on each other?"),
        ("{name} found two magnets {place} {time}.", "{name} laid two magnets in a row {place} {time}.",
         "{name} showed two magnets to {name} {place}."),
    ),
    solve=_solve_magnets, answer=lambda fact: int(fact[0] == fact[1]), paint=_paint_magnets,
    scenes=("A picture of two magnets.", "Two bars in a row.", "Red and blue tiles in a row."),
    key_fact=lambda fact: f"Two magnets, the left one showing its {fact[0]} pole and the right one its {fact[1]} pole.",
)  # fmt: skip

BARS = Skill(
    skill="Compare the concentrations of two solutions", subject="natural science", topic="chemistry",
    category="Solutions", grade="grade6",
    lecture="Each tile of a bar is one particle. The solution with more particles in the same space is more concentrated.",
    choices=("the left jar", "the right jar"),
    table=(((2, 3), 0.35), *(((left, right), 0.65 / 8) for left in (3, 4, 5, 6) for right in (1, 2))),
    ask=_asker(
        ("Which jar holds the stronger solution?", "Which jar has more particles?", "Which of these jars is more concentrated?"),
        ("{name} filled two jars {place} {time}.", "{name} mixed two jars of salt water {place} {time}.",
         "{name} and {name} compare two jars {place}."),
    ),
    solve=_solve_pair("The left jar has {0} particles and the right jar has {1}. So the {2} jar has more."),
    answer=lambda fact: int(fact[1] > fact[0]), paint=_paint_bars,
    scenes=("A chart with two bars.", "A picture of two jars.", "Two stacks of tiles side by side."),
    key_fact=lambda fact: f"Two jars, the left one with {fact[0]} particles and the right one with {fact[1]}.",
)  # fmt: skip

MAP = Skill(
    skill="Read a map with a compass", subject="social science", topic="geography", category="Maps", grade="grade2",
    lecture="The dark part of the compass points to the north. If it points down, north is at the bottom of the "
            "map and east at the left.",
    choices=("the red land", "the blue land", "the green land", "the yellow land"),
    table=tuple(
        ((direction, compass, colour), share * 0.5 / 2)
        for direction, colours in (("north", ("red", "blue")), ("east", ("green", "yellow")))
        for compass, share in (("up", 0.7), ("down", 0.3)) for colour in colours
    ),
    ask=_asker((
        "{name} has a map of {island}. Which land lies farthest {0}?",
        "{name} sails to {island} {time}. Which land is farthest {0}?",
        "{name} and {name} drew {island}. Which land is in the {0}?",
    )),
    solve=lambda fact: f"The compass points {fact[1]}, so {fact[0]} is at the {_side(fact)}. The {_side(fact)} land is {fact[2]}.",
    answer=lambda fact: ("red", "blue", "green", "yellow").index(fact[2]), visible=lambda fact: fact[0], paint=_paint_map,
    scenes=("A map of an island.", "A map with four lands.", "A drawing of an island with a compass."),
    key_fact=lambda fact: f"A map with a compass that points {fact[1]} and a {fact[2]} land at the {_side(fact)}.",
)  # fmt: skip

TRAIT = Skill(
    skill="Tell a dominant from a recessive form", subject="natural science", topic="biology", category="Genes to traits",
    grade="grade8",
    lecture="A plant with at least one dominant allele T shows the dominant form of a trait.",
    choices=("the dominant form", "the recessive form"),
    table=((("TT",), 0.25), (("Tt",), 0.30), (("tt",), 0.45)),
    ask=_asker(
        ("Which form of the trait does the plant show?", "Which form of the trait is seen?", "Which form shows up?"),
        ("{name} grows a {plant} {place}. Its alleles for {trait} are {0}.", "The alleles for {trait} of the {plant} {place} are {0}.",
         "{name} grows a {plant}. Its alleles for {trait} are {0}."),
    ),
    solve=_solve_trait, answer=lambda fact: int(fact[0] == "tt"), visible=lambda fact: fact,
)  # fmt: skip

FOOD_WEB = Skill(
    skill="Follow a food web", subject="natural science", topic="ecology", category="Ecosystems", grade="grade5",
    lecture="An arrow goes from the food to its eater. The purple animal is a mouse, the orange one a rabbit, the teal one "
            "a goose. Owls hunt mice; foxes hunt rabbits and geese.",
    choices=("the owl", "the fox"),
    table=((("mouse",), 0.40), (("rabbit",), 0.30), (("goose",), 0.30)),
    ask=_asker(
        ("Which hunter lives on the grass in the end?", "Which hunter needs the grass?", "Who starves if the grass dies?"),
        ("{name} drew a food web {place} {time}.", "{name} studies a food web {place} {time}.",
         "{name} and {name} made a food web {place}."),
    ),
    solve=_solve_food_web, answer=lambda fact: int(fact[0] != "mouse"), paint=_paint_food_web,
    scenes=("A drawing of a food web.", "An arrow between two tiles.", "A picture of grass and an animal."),
    key_fact=lambda fact: f"An arrow from the grass to a {fact[0]}.",
)  # fmt: skip

THERMOMETERS = Skill(
    skill="Compare two temperatures", subject="natural science", topic="physics", category="Heat", grade="grade4",
    lecture="The dark tile marks the top of the liquid. Each tile is 10 degrees. Heat flows out of the warmer cup.",
    choices=("the left cup", "the right cup"),
    table=(((50, 30), 0.34), *(((left, right), 0.66 / 6) for left in (10, 20, 30) for right in (40, 60))),
    ask=_asker(
        ("Which cup is warmer?", "From which cup does heat flow?", "Which of these cups is hotter?"),
        ("{name} measures two cups {place} {time}.", "{name} left two cups of tea {place} {time}.",
         "{name} and {name} put a thermometer in each of two cups {place}."),
    ),
    solve=_solve_pair("The left cup is at {0} degrees and the right cup is at {1}. So the {2} cup is warmer."),
    answer=lambda fact: int(fact[1] > fact[0]), paint=_paint_thermometers,
    scenes=("A picture of two thermometers.", "Two thermometers side by side.", "Two cups are measured."),
    key_fact=lambda fact: f"A thermometer at {fact[0]} degrees beside one at {fact[1]} degrees.",
)  # fmt: skip

TENSE = Skill(
    skill="Identify the tense of a sentence", subject="language science", topic="verbs", category="Verb tense", grade="grade4",
    lecture="A verb in the past tense tells what has happened, in the present what happens, in the future what will happen.",
    choices=("past", "present", "future"),
    table=((("past",), 0.34), (("present",), 0.33), (("future",), 0.33)),
    ask=_ask_language("Which tense does the sentence use?", _tense_sentence),
    solve=lambda fact: f"The verb tells what {_TENSE_SIGNS[fact[0]]}, so the tense is {fact[0]}.",
    answer=lambda fact: ("past", "present", "future").index(fact[0]), visible=lambda fact: fact, lecture_rate=0.8,
)  # fmt: skip

FIGURE = Skill(
    skill="Identify a figure of speech", subject="language science", topic="figurative language",
    category="Literary devices", grade="grade10",
    lecture="A simile compares with like or as, personification makes a thing act like a person, and hyperbole exaggerates.",
    choices=("simile", "personification", "hyperbole"),
    table=((("simile",), 0.34), (("personification",), 0.33), (("hyperbole",), 0.33)),
    ask=_ask_language("Which figure of speech does the text use?", _figure_sentence),
    solve=lambda fact: f"The text {_FIGURE_SIGNS[fact[0]]}, so it is {fact[0]}.",
    answer=lambda fact: ("simile", "personification", "hyperbole").index(fact[0]), visible=lambda fact: fact, lecture_rate=0.8,
)  # fmt: skip

SKILLS = (MAGNETS, BARS, MAP, TRAIT, FOOD_WEB, THERMOMETERS, TENSE, FIGURE)
