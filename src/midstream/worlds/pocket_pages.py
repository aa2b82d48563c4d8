"""Several pictures at once in the pocket world: albums that questions are asked of, and pages.

What is asked needs the right picture at the right place; for most albums another order of the same
pictures has another answer.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from midstream.config import PocketWorld
from midstream.config.training import is_pool
from midstream.core.identity import GROUPS_FILE
from midstream.worlds.pocket_benchmarks import Named, scene_with, write_json, write_lines
from midstream.worlds.pocket_language import LAYOUTS, Question, answer, ask, caption
from midstream.worlds.pocket_scenes import (
    COLORS,
    SHAPES,
    TASKS,
    Pair,
    Plan,
    Scene,
    Style,
    below,
    draw,
    draw_jpeg,
    draw_scene,
    generator,
    pick,
    shuffled,
)

ORDINALS = ("first", "second", "third", "fourth")
SIDES = ("left", "right")
# which: the picture that shows a thing. odd: the one that lacks what all others show. at: the
# colour of a shape that all show. true: whether a sentence on two pictures is true.
AlbumKind = Literal["which", "odd", "at", "true"]
ALBUM_KINDS: tuple[AlbumKind, ...] = get_args(AlbumKind)
# Each picture of an album shows so many things.
_THINGS = (1, 3)


@dataclass(frozen=True)
class Album:
    """Scenes in their order, a question on them and its answer, one of `choices`."""

    kind: AlbumKind
    scenes: tuple[Scene, ...]
    question: str
    answer: str
    choices: tuple[str, ...]


def album(
    rng: np.random.Generator,
    kind: AlbumKind,
    turn: int,
    *,
    splits: Sequence[str],
    style: Style = "even",
) -> Album:
    """An album of a kind, its scenes of the splits; over a run of `turn`s every place, side and
    truth is the answer as often as any other."""
    if kind == "true":
        return _sentence(rng, turn, splits, style)
    number = (2, 3)[turn % 2] if kind != "odd" else (3, 4)[turn % 2]
    place = turn // 2 % number
    shape = draw(rng, SHAPES, style)
    if kind == "which":
        return _which(rng, (draw(rng, tuple(COLORS), style), shape), number, place, splits)
    if kind == "at":
        return _at(rng, shape, number, place, splits)
    # A picture that lacks the shape among pictures that show it, and no other that lacks one.
    shows, scenes = [index != place for index in range(number)], tuple[Scene, ...]()
    while _odd_ones(scenes) != {place}:
        scenes = tuple(_showing(rng, shape, shown, splits) for shown in shows)
    return Album("odd", scenes, "which picture is the odd one?", ORDINALS[place], ORDINALS[:number])


def _odd_ones(scenes: Sequence[Scene]) -> set[int]:
    """The pictures that alone lack a shape which all the others show."""
    shown = [{thing.shape for thing in scene.things} for scene in scenes]
    lacking = ([n for n, mine in enumerate(shown) if shape not in mine] for shape in SHAPES)
    return {lack[0] for lack in lacking if len(lack) == 1}


def _which(
    rng: np.random.Generator, pair: Pair, number: int, place: int, splits: Sequence[str]
) -> Album:
    color, shape = pair

    def other() -> Plan:
        # Something alike, so that neither the colour nor the shape alone tells.
        alike = [(c, shape) for c in COLORS if c != color] + [(color, s) for s in SHAPES]
        return Plan([pick(rng, [p for p in alike if p != pair])], allowed=lambda p: p != pair)

    plans = [(lambda: Plan([pair])) if index == place else other for index in range(number)]
    scenes = tuple(_scene(rng, plan, splits) for plan in plans)
    question = f"which picture shows a {color} {shape}?"
    return Album("which", scenes, question, ORDINALS[place], ORDINALS[:number])


def _at(
    rng: np.random.Generator, shape: str, number: int, place: int, splits: Sequence[str]
) -> Album:
    colors = shuffled(rng, tuple(COLORS))[:number]
    scenes = tuple(
        _scene(rng, partial(Plan, [(color, shape)], allowed=lambda pair: pair[1] != shape), splits)
        for color in colors
    )
    question = f"what color is the {shape} in the {ORDINALS[place]} picture?"
    return Album("at", scenes, question, colors[place], tuple(COLORS))


def _sentence(rng: np.random.Generator, turn: int, splits: Sequence[str], style: Style) -> Album:
    """A sentence on two pictures; the false ones on one side are true of the other side."""
    is_true, form = turn % 2 == 0, turn // 2 % 3
    shape = draw(rng, SHAPES, style)
    if form == 2:
        shows = [True, True] if is_true else shuffled(rng, [True, False])
        scenes = tuple(_showing(rng, shape, shown, splits) for shown in shows)
        sentence = f"both pictures show a {shape}."
    else:
        pair = (draw(rng, tuple(COLORS), style), shape)
        place = form if is_true else 1 - form
        scenes = _which(rng, pair, 2, place, splits).scenes
        sentence = f"the {SIDES[form]} picture shows a {pair[0]} {shape}."
    return Album("true", scenes, sentence, "True" if is_true else "False", ("True", "False"))


def _showing(rng: np.random.Generator, shape: str, shown: bool, splits: Sequence[str]) -> Scene:
    def plan() -> Plan:
        pairs = [(pick(rng, tuple(COLORS)), shape)] if shown else []
        return Plan(pairs, allowed=lambda pair: pair[1] != shape)

    return _scene(rng, plan, splits)


def _scene(rng: np.random.Generator, plan: Callable[[], Plan], splits: Sequence[str]) -> Scene:
    return scene_with(rng, plan, lambda scene: True, splits=splits, num_things=_THINGS)


def page(world: PocketWorld, index: int) -> list[str | Scene]:
    """The page at `index`: pictures, each before the text that it belongs to.

    A third of the pages tell what each picture shows, a third ask the same of one picture after
    another, and the others ask what only the pictures in their order tell.
    """
    rng = generator(world.seed, "page", index)
    layout, form = pick(rng, LAYOUTS), index % 3
    if form == 2:
        kind = ALBUM_KINDS[index // 3 % len(ALBUM_KINDS)]
        asked = album(rng, kind, below(rng, 24), splits=("captions",), style="captions")
        text = f"{layout.format(question=asked.question)} {asked.answer}\n"
        return [*asked.scenes, text]
    number, kind_asked = 2 + below(rng, 3), pick(rng, ("color", "shape", "exists", "word"))
    found: list[str | Scene] = []
    for _ in range(number):
        scene, said = _told(rng, None if form == 0 else kind_asked, layout)
        found += [scene, said]
    return found


def _told(rng: np.random.Generator, kind: str | None, layout: str) -> tuple[Scene, str]:
    """A scene, and its caption or a question of a kind with its answer."""
    while True:
        scene = _scene(rng, Plan, ("captions",))
        question = Question("word") if kind == "word" else None
        if kind is None:
            return scene, caption(scene) + "\n"
        question = question or ask(rng, scene, kind, "captions")
        reply = None if question is None else answer(scene, question)
        if question is not None and reply is not None:
            return scene, f"{layout.format(question=question.text)} {reply}\n"


def write_pages(world: PocketWorld, folder: Path) -> None:
    """Write the pages as MMC4 lays documents out: texts, and pictures by the text that they stand
    before."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(world.num_pages):
        parts, texts, pictures = page(world, index), list[str](), list[dict[str, Any]]()
        for part in parts:
            if isinstance(part, str):
                texts.append(part)
                continue
            name = f"{index:06d}-{len(pictures)}.jpg"
            rng = generator(world.seed, "page picture", 8 * index + len(pictures))
            (folder / name).write_bytes(draw_jpeg(rng, part))
            about = {"image_name": name, "raw_url": f"https://pocket.example/{name}"}
            pictures.append(about | {"matched_text_index": len(texts), "matched_sim": 1.0})
        similar = [
            [float(p["matched_text_index"] == n) for n in range(len(texts))] for p in pictures
        ]
        lines.append(
            {
                "url": f"https://pocket.example/{index:06d}",
                "text_list": texts,
                "image_info": pictures,
                "similarity_matrix": similar,
            }
        )
    write_lines(folder / "pages.jsonl", lines)


def write_albums(world: PocketWorld, folder: Path) -> None:
    """Write conversations about several pictures as LLaVA-NeXT lays them out, `image` a list."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index in range(world.num_albums):
        rng, kind = generator(world.seed, "album", index), ALBUM_KINDS[index % len(ALBUM_KINDS)]
        turn = index // len(ALBUM_KINDS)
        asked = album(rng, kind, turn, splits=("instruct",), style="instruct")
        names = _drawn(world, "album picture", index, asked.scenes, folder)
        question = f'Is "{asked.question}" true or false?' if kind == "true" else asked.question
        said = [
            {"from": "human", "value": "<image>\n" * len(names) + question},
            {"from": "gpt", "value": asked.answer},
        ]
        records.append({"id": f"album-{index:06d}", "image": names, "conversations": said})
    write_json(folder / "llava.json", records)


def _drawn(
    world: PocketWorld, purpose: str, index: int, scenes: Sequence[Scene], folder: Path
) -> list[str]:
    """The names of an album's pictures, which are drawn into the folder's `images`."""
    names = [f"images/{index:06d}-{place}.jpg" for place in range(len(scenes))]
    for place, (name, scene) in enumerate(zip(names, scenes, strict=True)):
        drawn = draw_jpeg(generator(world.seed, purpose, 8 * index + place), scene)
        (folder / name).write_bytes(drawn)
    return names


# Benchmarks of several pictures, and what guessing scores: NLVR2's sentences, and what else albums
# are asked (a third each: two, three and four places, and eight colours).
ALBUM_CHANCES = {"nlvr2": 0.5, "pocket_albums": 0.278}
ALBUM_FORMATS = {"nlvr2": "nlvr2", "pocket_albums": "qa"}


def write_album_benchmarks(world: PocketWorld, root: Path, named: Named = str) -> None:
    """Write the benchmarks of several pictures in folders as they are `named`: NLVR2's public test
    (or training split), and questions in format `qa` whose groups are the kinds of album."""
    pairs, folder = root / named("nlvr2"), root / named("pocket_albums")
    split, splits = ("train", ("captions",)) if is_pool(pairs.name) else ("test1", TASKS)
    (pairs / split).mkdir(parents=True)
    (folder / "images").mkdir(parents=True)
    lines = []
    for turn in range(world.num_questions):
        asked = album(generator(world.seed, pairs.name, turn), "true", turn, splits=splits)
        pair = f"{split}-{turn}-0"
        for side, scene in enumerate(asked.scenes):
            rng = generator(world.seed, f"{pairs.name} picture", 2 * turn + side)
            buffer = io.BytesIO()
            draw_scene(rng, scene).save(buffer, "PNG")
            (pairs / split / f"{pair}-img{side}.png").write_bytes(buffer.getvalue())
        sentence = {"identifier": f"{pair}-0", "sentence": asked.question}
        lines.append(sentence | {"label": asked.answer})
    write_lines(pairs / f"{split}.json", lines)
    questions, groups, more = [], {}, " of training" if is_pool(folder.name) else ""
    kinds = [kind for kind in ALBUM_KINDS if kind != "true"]
    for index in range(world.num_questions):
        kind, rng = kinds[index % len(kinds)], generator(world.seed, f"album question{more}", index)
        asked = album(rng, kind, index // len(kinds), splits=splits)
        names = _drawn(world, f"asked picture{more}", index, asked.scenes, folder)
        about = {"id": f"{index}", "question": asked.question, "image": names}
        questions.append(about | {"answer": asked.answer, "choices": list(asked.choices)})
        groups[f"{index}"] = kind
    write_lines(folder / "questions.jsonl", questions)
    write_json(folder / GROUPS_FILE, groups)
