"""What the pocket world's benchmarks ask: answers are chosen first, as evenly as possible over each
question; a scene is made for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from midstream.config import PocketWorld
from midstream.config.training import pool_of
from midstream.core.tokens import apportion
from midstream.worlds.pocket_language import (
    COUNTS,
    QUESTIONS,
    Question,
    answer,
    neighbour_cell,
    plan_answer,
    referent,
)
from midstream.worlds.pocket_scenes import (
    COLORS,
    CONCEPTS,
    FREQUENCIES,
    PAIRS,
    RELATIONS,
    SHAPES,
    WORDS,
    Frequency,
    Plan,
    Scene,
    below,
    frequency,
    generator,
    pick,
    sample_scene,
    shuffled,
)

VQA_SHARES = {"color": 0.3, "shape": 0.15, "shape_at": 0.15, "count": 0.2, "exists": 0.2}
VQA_ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "shape_at": SHAPES,
    "count": COUNTS,
    "exists": ("yes", "no"),
}


@dataclass(frozen=True)
class Item:
    """A scene, a question on it and the answer."""

    scene: Scene
    question: Question
    answer: str

    @property
    def group(self) -> Frequency:
        """How often conversations show the rarest concept of the question and its answer."""
        words = f"{self.question.text} {self.answer}".replace("?", " ").split()
        found = {frequency(word) for word in words if word in CONCEPTS}
        return max(found, key=FREQUENCIES.index, default="common")


def balanced(
    rng: np.random.Generator, questions: Sequence[Question], answers: Sequence[str], count: int
) -> list[tuple[Question, str]]:
    """`count` (question, answer) pairs in random order.

    Questions are as frequent as each other within one, and so are the answers of each question.
    """
    questions, answers, pairs = shuffled(rng, questions), shuffled(rng, answers), []
    for index in range(count):
        rounds, place = divmod(index, len(questions))
        pairs.append((questions[place], answers[(place + rounds) % len(answers)]))
    return shuffled(rng, pairs)


def scene_with(
    rng: np.random.Generator,
    plan: Callable[[], Plan],
    accept: Callable[[Scene], bool],
    *,
    splits: Sequence[str],
    num_things: tuple[int, int] = (1, 4),
    words: Sequence[str | None] | None = None,
) -> Scene:
    """A scene of one of the splits that follows a plan (made anew each try) and is accepted."""
    for _ in range(100_000):
        planned = plan()
        low = max(num_things[0], len(planned.pairs))
        size = low + below(rng, num_things[1] - low + 1)
        scene = sample_scene(rng, planned, num_things=size, words=words)
        if scene.split in splits and accept(scene):
            return scene
    raise AssertionError(f"no scene of {splits} follows the plan {planned}")


def has_answer(question: Question, gold: str, scene: Scene) -> bool:
    """Whether `gold` is the answer to the question on the scene."""
    return answer(scene, question) == gold


def _drawn_for(world: PocketWorld, task: str, training: bool) -> tuple[np.random.Generator, str]:
    """What draws a task's items, and the split of their scenes; of `training` that of captions."""
    name = pool_of(task) if training else task
    return generator(world.seed, name), "captions" if training else task.split()[0]


def open_items(world: PocketWorld, task: str, training: bool = False) -> list[Item]:
    """The items of vqav2, gqa or textvqa, those asked or those of `training`."""
    (rng, split), count = _drawn_for(world, task, training), world.num_questions
    pairs: list[tuple[Question, str]] = []
    if task == "vqav2":
        for kind, share in apportion(count, VQA_SHARES).items():
            pairs += balanced(rng, QUESTIONS[kind], VQA_ANSWERS[kind], share)
    elif task == "gqa":
        pairs += balanced(rng, QUESTIONS["relation_color"], tuple(COLORS), count - count // 2)
        pairs += balanced(rng, QUESTIONS["relation_shape"], SHAPES, count // 2)
    else:
        assert task == "textvqa", task
        pairs += balanced(rng, QUESTIONS["word"], WORDS, count)
    items = []
    for question, gold in shuffled(rng, pairs):
        scene = scene_with(
            rng,
            partial(plan_answer, rng, question, gold),
            partial(has_answer, question, gold),
            splits=(split,),
            words=(gold,) if task == "textvqa" else None,
        )
        items.append(Item(scene, question, gold))
    return items


def pope_items(
    world: PocketWorld, file: str, popular: Sequence[str], training: bool = False
) -> list[Item]:
    """The items of one of POPE's files: a third of `num_questions`, half of them yes.

    random asks about any shape, popular about `popular` ones, adversarial about any where three or
    four things are.
    """
    rng, split = _drawn_for(world, f"pope {file}", training)
    count = max(2, 2 * (world.num_questions // 6))
    asked = popular if file == "popular" else SHAPES
    questions = [Question("exists", (shape,)) for shape in asked]
    items = []
    for question, gold in balanced(rng, questions, ("yes", "no"), count):
        scene = scene_with(
            rng,
            partial(plan_answer, rng, question, gold),
            partial(has_answer, question, gold),
            splits=(split,),
            # As many things under either answer.
            num_things=(3, 4) if file == "adversarial" else (1, 4),
        )
        items.append(Item(scene, question, gold))
    return items


def where_items(world: PocketWorld, task: str, training: bool = False) -> list[Item]:
    """The items of refcoco (by colour and shape) or ocid_ref (cluttered; by neighbour or size)."""
    (rng, split), count = _drawn_for(world, task, training), world.num_questions
    cells = tuple(str(cell) for cell in range(9))
    pairs: list[tuple[Question, str]] = []
    if task == "refcoco":
        pairs += balanced(rng, QUESTIONS["where_pair"], cells, count)
    else:
        pairs += balanced(rng, QUESTIONS["where_size"], cells, count // 2)
        parts = apportion(count - count // 2, dict.fromkeys(RELATIONS, 0.25))
        for relation, share in parts.items():
            targets = {neighbour_cell(int(cell), relation) for cell in cells} - {None}
            shapes = [Question("where_relation", (s, relation)) for s in SHAPES]
            places = sorted(str(cell) for cell in targets)
            for question, cell in balanced(rng, shapes, places, share):
                pairs.append((Question("where_relation", question.about + pick(rng, PAIRS)), cell))
    items = []
    for question, cell in shuffled(rng, pairs):
        scene = scene_with(
            rng,
            partial(plan_place, rng, question, int(cell)),
            partial(_refers_into, question, int(cell)),
            splits=(split,),
            num_things=(1, 4) if task == "refcoco" else (4, 6),
        )
        gold = answer(scene, question)
        assert gold is not None
        items.append(Item(scene, question, gold))
    return items


def _refers_into(question: Question, cell: int, scene: Scene) -> bool:
    thing = referent(scene, question)
    return thing is not None and thing.cell == cell


def plan_place(rng: np.random.Generator, question: Question, cell: int) -> Plan:
    """Puts what a "where" question refers to into `cell`, and something alike elsewhere."""
    about = question.about
    if question.kind == "where_pair":
        return Plan([(about[0], about[1])], [cell])
    colors = shuffled(rng, tuple(COLORS))
    if question.kind == "where_size":
        other = "small" if about[0] == "large" else "large"
        return Plan([(colors[0], about[1]), (colors[1], about[1])], [cell], [about[0], other])
    shape, relation, color, anchor_shape = about
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    anchor = neighbour_cell(cell, back[relation])
    assert anchor is not None
    left = [c for c in colors if (c, shape) != (color, anchor_shape)]
    # A second thing of the shape, so that the shape alone does not tell which one is meant.
    return Plan([(color, anchor_shape), (left[0], shape), (left[1], shape)], [anchor, cell])
