"""The language of the pocket world: descriptions of scenes, questions with exact answers, facts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from midstream.worlds.pocket_scenes import (
    COLORS,
    IMAGE_SIZE,
    PAIRS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Pair,
    Plan,
    Scene,
    Style,
    Thing,
    draw,
    generator,
    pick,
    shuffled,
)

NAMES = (
    *("mia", "leo", "ana", "tom", "eva", "max", "zoe", "sam", "ida", "ben", "kim", "lou"),
    *("amy", "joe", "liv", "rex", "una", "pia", "gus", "ned", "eli", "ivy", "jan", "kai"),
)
# What is told about a person: the values (each as frequent), the question, the statements.
FACTS: dict[str, tuple[Sequence[str], str, Sequence[str]]] = {
    "color": (
        ("red", "green", "blue", "yellow"),
        "what color does {name} like?",
        ("{name} likes {value}.", "the color that {name} likes is {value}."),
    ),
    "animal": (
        ("cat", "dog", "fox", "pig", "hen", "bee"),
        "what animal does {name} have?",
        ("{name} has a {value}.", "the animal of {name} is a {value}."),
    ),
    "town": (
        ("oslo", "rome", "lima", "bern", "bonn", "york"),
        "what town does {name} live in?",
        ("{name} lives in {value}.", "the town of {name} is {value}."),
    ),
    "job": (
        ("cook", "king", "monk", "bard", "vet", "spy"),
        "what job does {name} have?",
        ("{name} is a {value}.", "the job of {name} is {value}."),
    ),
}
# A question up to where its answer stands, a space before it.
LAYOUTS = ("question: {question} answer:", "In: {question}\nOut:")
TEMPLATES = {
    "color": "what color is the {0}?",
    "shape": "what shape is the {0} object?",
    "shape_at": "what shape is at the {0}?",
    "count": "how many things are there?",
    "exists": "Is there a {0} in the image?",
    "relation_color": "what color is the object {0} the {1}?",
    "relation_shape": "what shape is the object {0} the {1} object?",
    "word": "what word is written?",
    "where_pair": "Where is the {0} {1}?",
    "where_relation": "Where is the {0} {1} the {2} {3}?",
    "where_size": "Where is the {0} {1}?",
}
COUNTS = ("1", "2", "3", "4")


class Question(NamedTuple):
    """A kind of question (a key of TEMPLATES) and the words that fill its gaps."""

    kind: str
    about: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The question as it is written."""
        return TEMPLATES[self.kind].format(*self.about)

    @property
    def expression(self) -> str:
        """What a "where" question refers to, such as "the red circle"."""
        assert self.kind.startswith("where"), self
        return self.text.removeprefix("Where is ").removesuffix("?")


# The questions of each kind that are few enough to be asked with every answer.
QUESTIONS: dict[str, tuple[Question, ...]] = {
    "color": tuple(Question("color", (shape,)) for shape in SHAPES),
    "shape": tuple(Question("shape", (color,)) for color in COLORS),
    "shape_at": tuple(Question("shape_at", (position,)) for position in POSITIONS),
    "count": (Question("count"),),
    "exists": tuple(Question("exists", (shape,)) for shape in SHAPES),
    "relation_color": tuple(Question("relation_color", (r, s)) for r in RELATIONS for s in SHAPES),
    "relation_shape": tuple(Question("relation_shape", (r, c)) for r in RELATIONS for c in COLORS),
    "word": (Question("word"),),
    "where_pair": tuple(Question("where_pair", pair) for pair in PAIRS),
    "where_size": tuple(Question("where_size", (size, s)) for size in SIZES for s in SHAPES),
}


def neighbour_cell(cell: int, relation: str) -> int | None:
    """The cell that is `relation` ("left of", ...) a cell; None outside of the picture."""
    row, column = cell // 3 + RELATIONS[relation][0], cell % 3 + RELATIONS[relation][1]
    return 3 * row + column if 0 <= row < 3 and 0 <= column < 3 else None


def only(things: Sequence[Thing]) -> Thing | None:
    """The thing, if there is exactly one."""
    return things[0] if len(things) == 1 else None


def beside(scene: Scene, anchor: Thing | None, relation: str) -> Thing | None:
    """The thing in the cell next to `anchor`'s, if there is one."""
    cell = None if anchor is None else neighbour_cell(anchor.cell, relation)
    return only([thing for thing in scene.things if thing.cell == cell])


def referent(scene: Scene, question: Question) -> Thing | None:
    """The one thing that a question asks about; None where there is none or more than one."""
    kind, about, things = question.kind, question.about, scene.things
    if kind == "color":
        return only([t for t in things if t.shape == about[0]])
    if kind == "shape":
        return only([t for t in things if t.color == about[0]])
    if kind == "shape_at":
        return only([t for t in things if POSITIONS[t.cell] == about[0]])
    if kind == "relation_color":
        return beside(scene, only([t for t in things if t.shape == about[1]]), about[0])
    if kind == "relation_shape":
        return beside(scene, only([t for t in things if t.color == about[1]]), about[0])
    if kind == "where_pair":
        return only([t for t in things if t.pair == about])
    if kind == "where_relation":
        found = beside(scene, only([t for t in things if t.pair == about[2:]]), about[1])
        return found if found is not None and found.shape == about[0] else None
    assert kind == "where_size", kind
    alike = [t for t in things if t.shape == about[1]]
    # A size is named only where it tells two things apart.
    return only([t for t in alike if t.size == about[0]]) if len(alike) > 1 else None


def answer(scene: Scene, question: Question) -> str | None:
    """The exact answer to a question on a scene; None where it has none."""
    kind, about = question.kind, question.about
    if kind == "word":
        return scene.word
    if kind == "exists":
        return "yes" if any(thing.shape == about[0] for thing in scene.things) else "no"
    if kind == "count":
        count = str(len(scene.things))
        return count if count in COUNTS else None
    thing = referent(scene, question)
    if thing is None:
        return None
    if kind.startswith("where"):
        return box_text(thing)
    return thing.color if kind.endswith("color") else thing.shape


def box_text(thing: Thing) -> str:
    """A thing's box as `[x1, y1, x2, y2]`, in parts of the picture with two decimals."""
    return "[" + ", ".join(f"{edge / IMAGE_SIZE:.2f}" for edge in thing.box) + "]"


def ask(
    rng: np.random.Generator, scene: Scene, kind: str, style: Style = "even"
) -> Question | None:
    """A random question of a kind that has an answer on the scene; None if there is none.

    Half of the answers to "exists" are no, about shapes as frequent as the style has them.
    """
    found: list[Question]
    if kind == "exists":
        present = [thing.shape for thing in scene.things]
        if rng.random() < 0.5:
            return Question("exists", (pick(rng, present),))
        absent = draw(rng, SHAPES, style)
        while absent in present:
            absent = draw(rng, SHAPES, style)
        return Question("exists", (absent,))
    if kind in ("relation_color", "relation_shape", "where_relation"):
        found = []
        for anchor in scene.things:
            for relation in RELATIONS:
                thing = beside(scene, anchor, relation)
                if thing is not None:
                    about = {
                        "relation_color": (relation, anchor.shape),
                        "relation_shape": (relation, anchor.color),
                        "where_relation": (thing.shape, relation, *anchor.pair),
                    }
                    found.append(Question(kind, about[kind]))
    else:
        found = list(QUESTIONS[kind])
    found = [question for question in found if answer(scene, question) is not None]
    return pick(rng, found) if found else None


def plan_answer(rng: np.random.Generator, question: Question, gold: str) -> Plan:
    """A plan after which most scenes have `gold` as the answer; the rest must be refused."""
    kind, about = question.kind, question.about
    color, shape = pick(rng, PAIRS)
    if kind == "color":
        return Plan([(gold, about[0])], allowed=lambda pair: pair[1] != about[0])
    if kind == "shape":
        return Plan([(about[0], gold)], allowed=lambda pair: pair[0] != about[0])
    if kind == "shape_at":
        return Plan([(color, gold)], cells=[POSITIONS.index(about[0])])
    if kind == "exists":
        pairs: list[Pair] = [(color, about[0])] if gold == "yes" else []
        return Plan(pairs, allowed=lambda pair: pair[1] != about[0])
    if kind in ("word", "count"):
        return Plan()
    anchor = pick(rng, [c for c in range(9) if neighbour_cell(c, about[0]) is not None])
    cell = neighbour_cell(anchor, about[0])
    assert cell is not None
    if kind == "relation_color":
        other = pick(rng, [s for s in SHAPES if s != about[1]])
        pairs = [(color, about[1]), (gold, other)]
        return Plan(pairs, [anchor, cell], allowed=lambda pair: pair[1] != about[1])
    assert kind == "relation_shape", kind
    other = pick(rng, [c for c in COLORS if c != about[1]])
    pairs = [(about[1], shape), (other, gold)]
    return Plan(pairs, [anchor, cell], allowed=lambda pair: pair[0] != about[1])


def describe(rng: np.random.Generator, scene: Scene) -> str:
    """A sentence that names every thing with its colour, shape and position, and the word."""
    form = pick(rng, ("{name} at the {at}", "{at}: {name}"))
    named = shuffled(rng, scene.named())
    return ", ".join(form.format(name=name, at=POSITIONS[cell]) for cell, name in named) + "."


def caption(scene: Scene) -> str:
    """Every thing by colour and shape, and the word, from the top left to the bottom right."""
    return ", ".join(name for _, name in sorted(scene.named())) + "."


def fact_table(seed: int) -> dict[tuple[str, str], str]:
    """(name, what about it) -> value: drawn from the seed, every value as frequent."""
    table = {}
    for fact, (values, _, _) in FACTS.items():
        drawn = shuffled(generator(seed, f"facts {fact}"), NAMES)
        for index, name in enumerate(drawn):
            table[name, fact] = values[index % len(values)]
    return table


def fact_document(rng: np.random.Generator, table: dict[tuple[str, str], str]) -> str:
    """Three to five facts, each told or asked, in one layout."""
    layout, lines = pick(rng, LAYOUTS), []
    for _ in range(3 + int(rng.random() * 3)):
        name, fact = pick(rng, NAMES), pick(rng, tuple(FACTS))
        _, question, statements = FACTS[fact]
        value = table[name, fact]
        if rng.random() < 0.5:
            lines.append(pick(rng, statements).format(name=name, value=value))
        else:
            lines.append(f"{layout.format(question=question.format(name=name))} {value}")
    return "\n".join(lines) + "\n"
