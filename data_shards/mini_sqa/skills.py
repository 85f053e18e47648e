"""The eight skills of MiniSQA: questions, hidden facts, pictures and solutions.

A skill's hidden fact, such as the inner poles ``("south", "north")`` of two magnets,
determines picture, solution and answer. Everything else (names, places, wording, tints,
grey tiles) is noise: drawn independently of the fact, and never part of the solution.

    MAGNETS.table    = ((("south", "south"), 0.36), (("north", "south"), 0.30), ...)
    MAGNETS.solve(("south", "north")) = "The inner poles are south and north. ..."
    MAGNETS.paint(rng, ("south", "north")) -> 8 x 8 tiles of RGB, uint8

This module handles neither files nor splits nor quotas.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from data_shards.mini_sqa.paint import (
    map_side,
    paint_bars,
    paint_food_web,
    paint_magnets,
    paint_map,
    paint_thermometers,
)
from mmcot.errors import InputError

VERSION: int = 2  # of the data set: the same version and arguments give the same content
Fact = tuple[Any, ...]
Ask = Callable[[random.Random, Fact], tuple[str, str]]  # question and hint
Paint = Callable[[random.Random, Fact], np.ndarray]

WORDS: dict[str, tuple[str, ...]] = {
    "name": (
        "Ada",
        "Amir",
        "Anna",
        "Ben",
        "Bo",
        "Cleo",
        "Dan",
        "Dora",
        "Eli",
        "Emma",
        "Finn",
        "Gus",
        "Hana",
        "Hugo",
        "Ian",
        "Ida",
        "Jack",
        "June",
        "Kai",
        "Kim",
        "Leo",
        "Lily",
        "Max",
        "Maya",
        "Nina",
        "Noah",
        "Omar",
        "Otto",
        "Pia",
        "Ravi",
        "Rosa",
        "Sam",
        "Sara",
        "Tara",
        "Theo",
        "Uma",
        "Vera",
        "Walt",
        "Yuri",
        "Zoe",
    ),
    "place": (
        "at school",
        "at home",
        "in the lab",
        "in the kitchen",
        "in the garden",
        "in the library",
        "at the museum",
        "in the hall",
        "on the porch",
        "by the window",
        "near the lake",
        "in the park",
        "at the farm",
        "in the attic",
        "at the fair",
        "in the workshop",
    ),
    "time": (
        "this morning",
        "after lunch",
        "on Monday",
        "on Friday",
        "before dinner",
        "at noon",
        "in spring",
        "last week",
        "on Sunday",
        "in the evening",
    ),
    "island": (
        "Arbo",
        "Balto",
        "Corvo",
        "Delos",
        "Elba",
        "Faro",
        "Goro",
        "Hydra",
        "Ilos",
        "Juno",
        "Kilda",
        "Lundy",
        "Mora",
        "Naxos",
        "Orkla",
        "Paros",
        "Rhum",
        "Skye",
        "Tiree",
        "Unst",
    ),
    "plant": ("pea plant", "bean plant", "rose bush", "tomato plant", "corn plant", "tulip", "daisy", "melon plant"),
    "trait": ("tall stems", "red petals", "round seeds", "smooth leaves", "yellow pods", "long roots"),
    "verb": ("painting", "cleaning", "mending", "packing", "opening", "washing"),
    "object": ("boat", "box", "cart", "chair", "door", "drum", "kite", "lamp", "sled", "table", "tent", "wagon"),
    "likeness": (
        "quiet as a mouse",
        "busy as a bee",
        "brave as a lion",
        "cold as ice",
        "light as a feather",
        "strong as an ox",
        "sly as a fox",
        "bright as the sun",
        "tall as a tree",
        "fast as the wind",
    ),
    "thing": ("wind", "sun", "moon", "rain", "river", "sea", "fog", "snow", "fire", "storm"),
    "deed": ("whispered to", "sang to", "smiled at", "winked at", "called to", "laughed at", "danced for", "waved to"),
    "count": ("a million", "a billion", "ten thousand", "a thousand"),
    "excess": ("waited {count} years", "told {count} jokes", "carried {count} tons", "ate {count} cakes"),
}


@dataclasses.dataclass(frozen=True)
class Skill:
    """One kind of question.

    ``name`` is its name in settings. ``table`` contains each hidden fact with its probability, ``ask(rng, fact)`` gives
    question and hint, ``solve(fact)`` the solution, ``answer(fact)`` the index of the
    right choice, ``visible(fact)`` the part of the fact that the text contains,
    ``paint(rng, fact)`` the tiles [8, 8, 3] (None: no picture). ``scenes`` are captions
    without information, ``key_fact(fact)`` is a caption with the fact; ``lecture_rate`` is
    the share of rows with the lecture.
    """

    name: str
    skill: str
    subject: str
    topic: str
    category: str
    grade: str
    lecture: str
    choices: tuple[str, ...]
    table: tuple[tuple[Fact, float], ...]
    ask: Ask
    solve: Callable[[Fact], str]
    answer: Callable[[Fact], int]
    visible: Callable[[Fact], Hashable] = lambda fact: None
    paint: Paint | None = None
    scenes: tuple[str, ...] = ()
    key_fact: Callable[[Fact], str] = lambda fact: ""
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


def _asker(questions: tuple[str, ...], hints: tuple[str, ...] = ("",)) -> Ask:
    """Ask by templates, in which ``{0}`` is the first part of the fact (only where the text may contain it)."""

    def ask(rng: random.Random, fact: Fact) -> tuple[str, str]:
        fixed = {"0": str(fact[0])}
        return fill(rng, rng.choice(questions), **fixed), fill(rng, rng.choice(hints), **fixed)

    return ask


def _solve_magnets(fact: Fact) -> str:
    alike = "alike, so the magnets repel" if fact[0] == fact[1] else "different, so the magnets attract"
    return f"The inner poles are {fact[0]} and {fact[1]}. They are {alike}."


def _solve_pair(template: str, more: str, less: str) -> Callable[[Fact], str]:
    """A comparison: ``{0}`` and ``{1}`` are the two amounts, ``{2}`` is ``more`` or ``less``."""
    return lambda fact: template.format(*fact, more if fact[0] > fact[1] else less)


def _solve_food_web(fact: Fact) -> str:
    hunter = "owl" if fact[0] == "mouse" else "fox"
    return f"The grass feeds the {fact[0]}. The {fact[0]} feeds the {hunter}."


def _solve_trait(fact: Fact) -> str:
    reason, shown = ("without", "recessive") if fact[0] == "tt" else ("with", "dominant")
    return f"The alleles are {fact[0]}, {reason} a capital letter, so the plant shows the {shown} form."


def _ask_language(question: str, sentence: Callable[[random.Random, Fact], str]) -> Ask:
    """The sentence is in the question or, equally often, in the hint."""

    def ask(rng: random.Random, fact: Fact) -> tuple[str, str]:
        text = sentence(rng, fact)
        return (f"{question}\n{text}", "") if rng.random() < 0.5 else (question, text)

    return ask


def _tense_sentence(rng: random.Random, fact: Fact) -> str:
    verb = {"past": "was", "present": "is", "future": "will be"}[fact[0]]
    return fill(rng, f"{{name}} {verb} {{verb}} the {{object}} {{place}}.")


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
    name="magnets",
    skill="Predict whether two magnets attract or repel",
    subject="natural science",
    topic="physics",
    category="Magnets",
    grade="grade3",
    lecture="A red tile is a north pole, a blue tile a south pole. Different poles attract; like poles repel.",
    choices=("attract", "repel"),
    table=(
        (("south", "south"), 0.36),
        (("north", "south"), 0.30),
        (("south", "north"), 0.30),
        (("north", "north"), 0.04),
    ),
    ask=_asker(
        (
            "Will these magnets attract or repel each other?",
            "What will these two magnets do?",
            "How do the two magnets in the picture act on each other?",
        ),
        (
            "{name} found two magnets {place} {time}.",
            "{name} laid two magnets in a row {place} {time}.",
            "{name} showed two magnets to {name} {place}.",
        ),
    ),
    solve=_solve_magnets,
    answer=lambda fact: int(fact[0] == fact[1]),
    paint=paint_magnets,
    scenes=("A picture of two magnets.", "Two bars in a row.", "Red and blue tiles in a row."),
    key_fact=lambda fact: f"Two magnets, the left one showing its {fact[0]} pole and the right one its {fact[1]} pole.",
)

BARS = Skill(
    name="solutions",
    skill="Compare the concentrations of two solutions",
    subject="natural science",
    topic="chemistry",
    category="Solutions",
    grade="grade6",
    lecture="Each tile of a bar is one particle. More particles in the same space make a stronger solution.",
    choices=("the left jar", "the right jar"),
    table=(((2, 3), 0.35), *(((left, right), 0.65 / 8) for left in (3, 4, 5, 6) for right in (1, 2))),
    ask=_asker(
        (
            "Which jar holds the stronger solution?",
            "Which solution is stronger?",
            "In which jar is the solution stronger?",
        ),
        (
            "{name} filled two jars {place} {time}.",
            "{name} mixed two jars of salt water {place} {time}.",
            "{name} and {name} compare two jars {place}.",
        ),
    ),
    solve=_solve_pair("The left jar has {0} particles, {2} than the {1} in the right jar.", "more", "fewer"),
    answer=lambda fact: int(fact[1] > fact[0]),
    paint=paint_bars,
    scenes=("A chart with two bars.", "A picture of two jars.", "Two stacks of tiles side by side."),
    key_fact=lambda fact: f"Two jars, the left one with {fact[0]} particles and the right one with {fact[1]}.",
)

MAP = Skill(
    name="map",
    skill="Read a map with a compass",
    subject="social science",
    topic="geography",
    category="Maps",
    grade="grade2",
    lecture="The dark part of the compass points to the north. If it points down, north is at the bottom of the "
    "map and east at the left.",
    choices=("red", "blue", "green", "yellow"),
    table=tuple(
        ((direction, compass, colour), share * 0.5 / 2)
        for direction, colours in (("north", ("red", "blue")), ("east", ("green", "yellow")))
        for compass, share in (("up", 0.7), ("down", 0.3))
        for colour in colours
    ),
    ask=_asker(
        (
            "{name} has a map of {island}. What colour is the land farthest {0}?",
            "{name} sails to {island} {time}. Which colour lies farthest {0}?",
            "{name} and {name} drew {island}. What colour is the {0}?",
        )
    ),
    solve=lambda fact: (
        f"The compass points {fact[1]}, so {fact[0]} is at the {map_side(fact)}. "
        f"The {map_side(fact)} land is {fact[2]}."
    ),
    answer=lambda fact: ("red", "blue", "green", "yellow").index(fact[2]),
    visible=lambda fact: fact[0],
    paint=paint_map,
    scenes=("A map of an island.", "A map with four lands.", "A drawing of an island with a compass."),
    key_fact=lambda fact: f"A map with a compass that points {fact[1]} and a {fact[2]} land at the {map_side(fact)}.",
)

TRAIT = Skill(
    name="trait",
    skill="Tell a dominant from a recessive form",
    subject="natural science",
    topic="biology",
    category="Genes to traits",
    grade="grade8",
    lecture="A capital letter is a dominant allele. A plant with at least one shows the dominant form of a trait.",
    choices=("the dominant form", "the recessive form"),
    table=((("TT",), 0.25), (("Tt",), 0.30), (("tt",), 0.45)),
    ask=_asker(
        ("Which form of the trait does the plant show?", "Which form of the trait is seen?", "Which form shows up?"),
        (
            "{name} grows a {plant} {place}. Its alleles for {trait} are {0}.",
            "{name} grows a {plant}. Its alleles for {trait} are {0}.",
            "The {plant} {place} has {0} as its alleles for {trait}.",
        ),
    ),
    solve=_solve_trait,
    answer=lambda fact: int(fact[0] == "tt"),
    visible=lambda fact: fact,
)

FOOD_WEB = Skill(
    name="food-web",
    skill="Follow a food web",
    subject="natural science",
    topic="ecology",
    category="Ecosystems",
    grade="grade5",
    lecture="An arrow goes from the food to its eater. The purple animal is a mouse, the orange one a rabbit, the "
    "teal one a goose. Owls hunt mice; foxes hunt rabbits and geese.",
    choices=("the owl", "the fox"),
    table=((("mouse",), 0.40), (("rabbit",), 0.30), (("goose",), 0.30)),
    ask=_asker(
        ("Which hunter lives on the grass?", "Which hunter needs the grass?", "Who starves if the grass dies?"),
        (
            "{name} drew a food web {place} {time}.",
            "{name} studies a food web {place} {time}.",
            "{name} and {name} made a food web {place}.",
        ),
    ),
    solve=_solve_food_web,
    answer=lambda fact: int(fact[0] != "mouse"),
    paint=paint_food_web,
    scenes=("A drawing of a food web.", "An arrow between two tiles.", "A picture of grass and an animal."),
    key_fact=lambda fact: f"An arrow from the grass to a {fact[0]}.",
)

THERMOMETERS = Skill(
    name="thermometers",
    skill="Compare two temperatures",
    subject="natural science",
    topic="physics",
    category="Heat",
    grade="grade4",
    lecture="The dark tile marks the top of the liquid. Each tile is 10 degrees. Heat flows out of the warmer cup.",
    choices=("the left cup", "the right cup"),
    table=(((50, 30), 0.34), *(((left, right), 0.66 / 6) for left in (10, 20, 30) for right in (40, 60))),
    ask=_asker(
        ("Which cup is hotter?", "Out of which cup does heat flow?", "Which of these cups has more heat?"),
        (
            "{name} measures two cups {place} {time}.",
            "{name} left two cups of tea {place} {time}.",
            "{name} and {name} put a thermometer in each of two cups {place}.",
        ),
    ),
    solve=_solve_pair("The left cup is at {0} degrees, {2} than the right cup at {1} degrees.", "warmer", "cooler"),
    answer=lambda fact: int(fact[1] > fact[0]),
    paint=paint_thermometers,
    scenes=("A picture of two thermometers.", "Two thermometers side by side.", "Two cups are measured."),
    key_fact=lambda fact: f"A thermometer at {fact[0]} degrees beside one at {fact[1]} degrees.",
)

TENSE = Skill(
    name="tense",
    skill="Identify the tense of a sentence",
    subject="language science",
    topic="verbs",
    category="Verb tense",
    grade="grade4",
    lecture="The past tense tells what was, the present tense what is, the future tense what will be.",
    choices=("past", "present", "future"),
    table=((("past",), 0.34), (("present",), 0.33), (("future",), 0.33)),
    ask=_ask_language("Which tense does the sentence use?", _tense_sentence),
    solve=lambda fact: f"The verb tells what {_TENSE_SIGNS[fact[0]]}, so the tense is {fact[0]}.",
    answer=lambda fact: ("past", "present", "future").index(fact[0]),
    visible=lambda fact: fact,
    lecture_rate=0.8,
)

FIGURE = Skill(
    name="figure",
    skill="Identify a figure of speech",
    subject="language science",
    topic="figurative language",
    category="Literary devices",
    grade="grade10",
    lecture="A simile compares with like or as, personification makes a thing a person, hyperbole exaggerates.",
    choices=("simile", "personification", "hyperbole"),
    table=((("simile",), 0.34), (("personification",), 0.33), (("hyperbole",), 0.33)),
    ask=_ask_language("Which figure of speech does the text use?", _figure_sentence),
    solve=lambda fact: f"The text {_FIGURE_SIGNS[fact[0]]}, so it is {fact[0]}.",
    answer=lambda fact: ("simile", "personification", "hyperbole").index(fact[0]),
    visible=lambda fact: fact,
    lecture_rate=0.8,
)

SKILLS = (MAGNETS, BARS, MAP, TRAIT, FOOD_WEB, THERMOMETERS, TENSE, FIGURE)


def skills_named(names: Sequence[str] | None, *, with_picture: bool = False) -> tuple[Skill, ...]:
    """Return the skills of these names in the order of ``SKILLS``; without names all.

    Args:
        with_picture: leave out skills without a picture, and refuse their names.

    Raises:
        ValueError: there is no such skill.
    """
    offered = [skill for skill in SKILLS if skill.paint is not None or not with_picture]
    known = [skill.name for skill in offered]
    if unknown := [name for name in names or () if name not in known]:
        kind = "skill with a picture" if with_picture else "skill"
        raise InputError(f"MiniSQA has no {kind} named {unknown[0]!r}; expected some of {', '.join(known)}")
    return tuple(skill for skill in offered if not names or skill.name in names)


def accepted_answers(skill: Skill, index: int) -> list[str]:
    """Return the texts that are right as a free answer: a choice, and the same in fewer words.

    "the left jar" is also accepted as "left jar" and "left", because every choice of the skill is a jar.
    """
    choice = skill.choices[index]
    bare = choice.removeprefix("the ")
    first, _, last = bare.partition(" ")
    all_alike = bool(last) and all(other.endswith(f" {last}") for other in skill.choices)
    return list(dict.fromkeys([choice, bare, *([first] if all_alike else [])]))
