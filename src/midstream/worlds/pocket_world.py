"""The pocket world, generated: text, pictures, captions, conversations and benchmarks.

All of it is a function of the seed; no visual question is answered without its picture.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from midstream.config import PocketWorld
from midstream.config.training import pool_of
from midstream.worlds.pocket_benchmarks import (
    balanced,
    scene_answering,
    write_benchmarks,
    write_json,
    write_lines,
)
from midstream.worlds.pocket_language import (
    COUNTS,
    FACTS,
    LAYOUTS,
    NAMES,
    QUESTIONS,
    Question,
    answer,
    ask,
    caption,
    describe,
    fact_document,
    fact_table,
)
from midstream.worlds.pocket_pages import (
    ALBUM_CHANCES,
    ALBUM_FORMATS,
    write_album_benchmarks,
    write_albums,
    write_pages,
)
from midstream.worlds.pocket_scenes import (
    COLORS,
    SHAPES,
    TASKS,
    WORDS,
    Pair,
    Plan,
    Scene,
    Style,
    below,
    draw,
    draw_jpeg,
    generator,
    pick,
    sample_scene,
    shuffled,
)

SAMPLES_A_SHARD = 1_000
# The files of one picture in a shard: names and bytes.
Sample = Iterator[tuple[str, bytes]]
BESIDE_THE_POINT = ("click to enlarge", "photo", "free download", "see more", "no image", "logo")
CAMERAS = ("img_{:04d}.jpg", "dsc{:05d}.jpg", "{:06d}.png")


def write_captions(
    world: PocketWorld, scenes: Sequence[Scene], texts: Sequence[str | None], folder: Path
) -> None:
    """Write shards with a picture of each scene, its text (None: its caption) and its record."""
    numbered = enumerate(zip(scenes, texts, strict=True))
    samples = (_sample(world, scene, index, text) for index, (scene, text) in numbered)
    write_shards(samples, len(scenes), folder)


def write_shards(samples: Iterator[Sample], number: int, folder: Path) -> None:
    """Write `number` samples as WebDataset tars named after the folder, which must be new."""
    folder.mkdir(parents=True)
    for start in range(0, number, SAMPLES_A_SHARD):
        path = folder / f"{folder.name}-{start // SAMPLES_A_SHARD:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
            for name, data in chain.from_iterable(islice(samples, SAMPLES_A_SHARD)):
                # Everything else in the header keeps its default, which does not vary.
                header = tarfile.TarInfo(name)
                header.size = len(data)
                shard.addfile(header, io.BytesIO(data))


def _sample(world: PocketWorld, scene: Scene, index: int, text: str | None) -> Sample:
    rng = generator(world.seed, "caption", index)
    yield f"{index:08d}.jpg", draw_jpeg(rng, scene)
    yield f"{index:08d}.txt", (caption(scene) if text is None else text).encode()
    yield f"{index:08d}.json", json.dumps(scene.record()).encode()


def alt_text(rng: np.random.Generator, scene: Scene, other: Scene) -> str:
    """The alt text of a picture of `scene`; one in ten is of `other`, another picture's scene.

    Of twenty: ten name half of what is there, three also but with one colour or shape wrong, three
    are a file named after a thing, two another picture's text and two nothing of any picture.
    """
    chosen = below(rng, 20)
    if chosen < 10:
        return _half(rng, scene)
    if chosen < 13:
        (color, shape), *rest = _half_of(rng, scene)
        present = {thing.pair for thing in scene.things}
        wrong = [(c, shape) for c in COLORS] + [(color, s) for s in SHAPES]
        pairs = [pick(rng, [pair for pair in wrong if pair not in present]), *rest]
        return _joined(rng, [" ".join(pair) for pair in pairs])
    if chosen < 16:
        color, shape = pick(rng, scene.things).pair
        return f"{pick(rng, (f'{color}-{shape}', f'{shape}_{color}', shape))}{below(rng, 100)}.jpg"
    if chosen < 18:
        return _half(rng, other)
    if rng.random() < 0.5:
        return pick(rng, CAMERAS).format(below(rng, 10_000))
    return pick(rng, (*BESIDE_THE_POINT, f"photo of {pick(rng, NAMES)}"))


def _half(rng: np.random.Generator, scene: Scene) -> str:
    """Half of the things (rounded up), each by colour, by shape or by both; perhaps the word."""
    names = []
    for color, shape in _half_of(rng, scene):
        both = f"{color} {shape}"
        names.append(pick(rng, (both, both, shape, f"something {color}")))
    if scene.word and rng.random() < 0.5:
        names.append(scene.word)
    return _joined(rng, names)


def _half_of(rng: np.random.Generator, scene: Scene) -> list[Pair]:
    number = (len(scene.things) + 1) // 2
    return [thing.pair for thing in shuffled(rng, scene.things)[:number]]


def _joined(rng: np.random.Generator, names: list[str]) -> str:
    text = pick(rng, (" and ", ", ")).join(names)
    return pick(rng, ("{}", "{}", "{} picture", "a {}", "{} - free image")).format(text)


TEXT_TASKS = ("pocket_reading", "pocket_facts")
# What guessing scores, by the convention of the paper: 0 for open words and boxes.
# VQAv2: .3 colours of eight, .3 shapes of sixteen, .2 counts of four, .2 yes or no; GQA: colours
# and shapes by halves. Boxes count as 0 there too, though one box said of every picture is right in
# a ninth of RefCOCO's, whose things stand in all nine cells alike.
CHANCES = dict(zip(TASKS, (0.206, 0.094, 0.0, 0.5, 0.0, 0.0), strict=True))
DOCUMENTS_A_FILE = 8_000
FACT_DOCUMENTS_FRACTION = 0.25
# How many things a scene has, each entry as likely. Many scenes are simple, so that colours and
# shapes can be read off them before things have to be told apart.
NUM_THINGS = (1, 1, 1, 2, 2, 3, 4)
Turn = tuple[Question, str]


def write_pocket_world(world: PocketWorld, root: Path) -> None:
    """Write the world into the folder `root`, laid out as `docs/data.md` describes.

    The same `world` gives the same bytes. `root` is created if needed; to have it completely or not
    at all, give the folder of `storage.new_folder`. Raises ValueError if `root` holds anything.
    """
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty; give a new folder for the pocket world")
    root.mkdir(parents=True, exist_ok=True)
    _write_documents(world, root / "text" / "web")
    captioned = [caption_scene(world, index) for index in range(world.num_captions)]
    write_captions(world, captioned, [None] * len(captioned), root / "captions" / "pictures")
    if world.num_alt_texts:
        # One more than there are texts: each knows the next picture's scene.
        scenes = [caption_scene(world, index) for index in range(world.num_alt_texts + 1)]
        texts = [
            alt_text(generator(world.seed, "alt text", index), *pair)
            for index, pair in enumerate(pairwise(scenes))
        ]
        write_captions(world, scenes[:-1], texts, root / "captions" / "alt_texts")
    _write_talks(world, root / "instruct" / "talks")
    if world.num_pages:
        write_pages(world, root / "documents" / "pages")
    visual_tasks = {t: {"format": t, "chance": CHANCES[t]} for t in TASKS}
    if world.num_albums:
        write_albums(world, root / "instruct" / "albums")
        write_album_benchmarks(world, root / "bench")
        for task, chance in ALBUM_CHANCES.items():
            visual_tasks[task] = {"format": ALBUM_FORMATS[task], "chance": chance}
        # Where shots come from.
        write_album_benchmarks(world, root / "bench", pool_of)
        write_benchmarks(world, captioned, root / "bench", pool_of)
        visual_tasks |= {pool_of(task): about for task, about in visual_tasks.items()}
    write_benchmarks(world, captioned, root / "bench")
    for task in TEXT_TASKS:
        write_lines(root / "text_tasks" / f"{task}.jsonl", text_items(world, task))
    description = {
        "name": "pocket",
        "licence": "CC0-1.0",
        "notes": f"generated from seed {world.seed}: coloured shapes and words on a 3x3 grid",
        "visual_tasks": visual_tasks,
        "text_tasks": {task: {"chance": 0.25} for task in TEXT_TASKS},
    }
    write_json(root / "world.json", description)


def converse(
    rng: np.random.Generator, kinds: Sequence[str], splits: Sequence[str], size: int, style: Style
) -> tuple[Scene, list[Turn]]:
    """A scene of one of the splits, with `size` of the style's things, and a question of each kind
    about it, in this order."""
    words = [draw(rng, WORDS, style)] if "word" in kinds else None
    for _ in range(100_000):
        scene = sample_scene(rng, Plan(), num_things=size, words=words, style=style)
        if scene.split not in splits:
            continue
        turns: list[Turn] = []
        for kind in kinds:
            question = ask(rng, scene, kind, style)
            reply = None if question is None else answer(scene, question)
            if question is None or reply is None or (question, reply) in turns:
                break
            turns.append((question, reply))
        if len(turns) == len(kinds):
            return scene, turns
    raise AssertionError(f"no scene of {splits} answers {kinds}")


def document(world: PocketWorld, index: int, facts: dict[tuple[str, str], str]) -> str:
    """The text document at `index`: a described scene with questions, or facts about people."""
    return scene_document(world, index)[0] or fact_document(
        generator(world.seed, "facts document", index), facts
    )


def scene_document(world: PocketWorld, index: int) -> tuple[str, Scene | None]:
    """The document at `index` and its scene; ("", None) where the document is about people."""
    rng = generator(world.seed, "document", index)
    if rng.random() < FACT_DOCUMENTS_FRACTION:
        return "", None
    size = pick(rng, NUM_THINGS)
    # Boxes too: how one is written is learnt from text, not from a few hundred conversations.
    kinds = ["color", "shape", "shape_at", "count", "exists", "word", "where_pair"]
    if size > 1:
        kinds.append(pick(rng, ("relation_color", "relation_shape")))
    kinds = shuffled(rng, kinds)[: 3 + below(rng, 3)]
    scene, turns = converse(rng, kinds, ("captions", "instruct"), size, "captions")
    layout = pick(rng, LAYOUTS)
    lines = [f"{layout.format(question=question.text)} {reply}" for question, reply in turns]
    return "\n".join([describe(rng, scene), *lines]) + "\n", scene


def caption_scene(world: PocketWorld, index: int) -> Scene:
    """The scene of the caption at `index`; one in nine has five or six things."""
    rng = generator(world.seed, "caption scene", index)
    return converse(rng, (), ("captions",), pick(rng, (*NUM_THINGS * 2, 5, 6)), "captions")[0]


def talk(world: PocketWorld, index: int) -> tuple[Scene, list[Turn]]:
    """The conversation at `index`: two or three of the six benchmarks' kinds of question."""
    rng = generator(world.seed, "talk", index)
    size = pick(rng, (*NUM_THINGS * 2, 5, 6))
    kinds = ["color", "shape", "shape_at", "word", "exists"]
    if str(size) in COUNTS:
        kinds.append("count")
    where = "where_pair"
    if size > 1:
        kinds.append(pick(rng, ("relation_color", "relation_shape")))
        other = pick(rng, ("where_relation", "where_size")) if size > 2 else where
        where = pick(rng, (where, other))
    kinds = shuffled(rng, kinds)[: 2 + below(rng, 2)]
    # Boxes are long answers: a quarter of the talks asks for one, so that they are not most of the
    # text.
    if rng.random() < 0.25:
        kinds[-1] = where
    # Words are learnt one by one: so many talks ask for one that every seed comes to know them.
    if rng.random() < 0.4 and "word" not in kinds:
        kinds[0] = "word"
    return converse(rng, kinds, ("instruct",), size, "instruct")


def text_items(world: PocketWorld, task: str) -> list[dict[str, Any]]:
    """The items of a text task: {"query", "choices" (four), "gold"}.

    A query ends where a training document would go on with a space and the answer. Every answer is
    as frequent as any other.
    """
    rng = generator(world.seed, task)
    count = world.num_text_items
    golds = shuffled(rng, [index % 4 for index in range(count)])
    layouts = shuffled(rng, [LAYOUTS[index % len(LAYOUTS)] for index in range(count)])
    if task == "pocket_facts":
        asked = _fact_questions(world, rng, count)
    else:
        asked = _described_questions(rng, count)
    items = []
    for index, (head, question, reply, others) in enumerate(asked):
        choices = shuffled(rng, others)
        choices.insert(golds[index], reply)
        query = head + layouts[index].format(question=question)
        choices = [f" {choice}" for choice in choices]
        items.append({"query": query, "choices": choices, "gold": golds[index]})
    return items


# What stands before the question, the question, its answer, three wrong answers.
Asked = tuple[str, str, str, list[str]]


def _fact_questions(world: PocketWorld, rng: np.random.Generator, count: int) -> list[Asked]:
    table, asked = fact_table(world.seed), []
    order = shuffled(rng, [(name, fact) for name in NAMES for fact in FACTS])
    for name, fact in islice(cycle(order), count):
        values, question, _ = FACTS[fact]
        others = shuffled(rng, [value for value in values if value != table[name, fact]])
        asked.append(("", question.format(name=name), table[name, fact], others[:3]))
    return asked


def _described_questions(rng: np.random.Generator, count: int) -> list[Asked]:
    # Not about the word: copying it is learnt at a stroke, by some runs and not by others.
    kinds = {"color": tuple(COLORS), "shape": SHAPES, "shape_at": SHAPES}
    pairs = []
    for part, (kind, values) in enumerate(kinds.items()):
        share = len(range(part, count, len(kinds)))
        pairs += balanced(rng, QUESTIONS[kind], values, share)
    asked = []
    for question, reply in shuffled(rng, pairs):
        scene = scene_answering(rng, question, reply, TASKS)
        others = shuffled(rng, [name for name in kinds[question.kind] if name != reply])[:3]
        asked.append((describe(rng, scene) + "\n", question.text, reply, others))
    return asked


def _write_documents(world: PocketWorld, folder: Path) -> None:
    folder.mkdir(parents=True)
    facts = fact_table(world.seed)
    for start in range(0, world.num_documents, DOCUMENTS_A_FILE):
        stop = min(start + DOCUMENTS_A_FILE, world.num_documents)
        texts = (document(world, index, facts) for index in range(start, stop))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path = folder / f"web-{start // DOCUMENTS_A_FILE:05d}.jsonl.zst"
        path.write_bytes(zstandard.ZstdCompressor(level=6).compress(lines))


def _write_talks(world: PocketWorld, folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    records, scenes = [], []
    for index in range(world.num_conversations):
        scene, turns = talk(world, index)
        image = f"images/{index:06d}.jpg"
        picture = draw_jpeg(generator(world.seed, "talk picture", index), scene)
        (folder / image).write_bytes(picture)
        values = [text for question, reply in turns for text in (question.text, reply)]
        values[0] = "<image>\n" + values[0]
        speakers = cycle(("human", "gpt"))
        conversation = [{"from": next(speakers), "value": value} for value in values]
        records.append({"id": f"talk-{index:06d}", "image": image, "conversations": conversation})
        scenes.append({"image": image} | scene.record())
    write_json(folder / "llava.json", records)
    write_lines(folder / "scenes.jsonl", scenes)
