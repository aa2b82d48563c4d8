"""The pocket world's benchmarks: what they ask, and their official files; its shards of captions.

Answers are chosen first, as evenly as possible over each question; a scene is made for each.
"""

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from midstream.config import PocketWorld
from midstream.config.training import is_pool, pool_of
from midstream.core.identity import GROUPS_FILE
from midstream.core.storage import write_bytes
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
    IMAGE_SIZE,
    PAIRS,
    RELATIONS,
    SHAPES,
    WORDS,
    Frequency,
    Plan,
    Scene,
    below,
    draw_jpeg,
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


def scene_answering(
    rng: np.random.Generator, question: Question, gold: str, splits: Sequence[str], **limits: Any
) -> Scene:
    """A scene of one of the splits on which `gold` is the answer; `limits` as of `scene_with`."""
    plan = partial(plan_answer, rng, question, gold)
    return scene_with(
        rng, plan, lambda scene: answer(scene, question) == gold, splits=splits, **limits
    )


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
        words = (gold,) if task == "textvqa" else None
        scene = scene_answering(rng, question, gold, (split,), words=words)
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
    # As many things under either answer.
    things = (3, 4) if file == "adversarial" else (1, 4)
    return [
        Item(scene_answering(rng, question, gold, (split,), num_things=things), question, gold)
        for question, gold in balanced(rng, questions, ("yes", "no"), count)
    ]


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


POPE_FILES = ("random", "popular", "adversarial")
VQA_TYPES = {
    "color": ("what color is the", "other"),
    "shape": ("what shape is the", "other"),
    "shape_at": ("what shape is", "other"),
    "count": ("how many", "number"),
    "exists": ("is there a", "yes/no"),
}
# "Popular" asks about this many shapes only, those most frequent in the caption pictures.
NUM_POPULAR = 6
# OCID-Ref's clutter levels are ranges of take_id: up to 9, 16 and 20.
TAKES = {4: (1, 9), 5: (10, 16), 6: (17, 20)}
# A task's folder: its own name, or `pool_of` it.
Named = Callable[[str], str]


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; creates the folder."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_lines(path: Path, values: Sequence[Any]) -> None:
    """Write one JSON value a line; creates the folder."""
    write_bytes(path, "".join(json.dumps(value) + "\n" for value in values).encode())


def write_benchmarks(
    world: PocketWorld, captioned: Sequence[Scene], folder: Path, named: Named = str
) -> None:
    """Write the six benchmarks in folders as they are `named`, by `pool_of` their training
    questions; "popular" things are those frequent in the `captioned` scenes."""
    _write_vqav2(world, folder / named("vqav2"))
    _write_gqa(world, folder / named("gqa"))
    _write_textvqa(world, folder / named("textvqa"))
    _write_pope(world, captioned, folder / named("pope"))
    _write_refcoco(world, folder / named("refcoco"))
    _write_ocid_ref(world, folder / named("ocid_ref"))


def _write_pictures(
    world: PocketWorld, folder: Path, items: Sequence[Item], names: Mapping[Any, str]
) -> None:
    """Each item's picture under its name, what it shows, and whose concepts the item of each id
    asks about."""
    groups = {str(key): item.group for key, item in zip(names, items, strict=True)}
    write_json(folder / GROUPS_FILE, groups)
    records = []
    for index, (item, name) in enumerate(zip(items, names.values(), strict=True)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = generator(world.seed, f"{folder.name} picture", index)
        path.write_bytes(draw_jpeg(rng, item.scene))
        records.append({"image": name} | item.scene.record())
    write_lines(folder / "scenes.jsonl", records)


def write_vqa(
    folder: Path,
    head: dict[str, Any],
    items: Iterable[tuple[dict[str, int], str, str, str, str]],
    write: Callable[[Path, Any], None],
) -> None:
    """VQAv2's official files with ten equal answers each, as `write` puts JSON.

    An item is its ids, the question, its type, the answer's type, the answer.
    """
    questions, annotations = [], []
    for ids, text, question_type, answer_type, gold in items:
        questions.append(ids | {"question": text})
        given = {"answer": gold, "answer_confidence": "yes"}
        answers = [given | {"answer_id": number} for number in range(1, 11)]
        kinds = {"question_type": question_type, "answer_type": answer_type}
        annotations.append(ids | kinds | {"multiple_choice_answer": gold, "answers": answers})
    head = head | {"data_type": "mscoco", "data_subtype": "val2014"}
    write(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        head | {"task_type": "Open-Ended", "questions": questions},
    )
    write(folder / "v2_mscoco_val2014_annotations.json", head | {"annotations": annotations})


def _write_vqav2(world: PocketWorld, folder: Path) -> None:
    items = open_items(world, "vqav2", is_pool(folder.name))
    ids = [{"image_id": n, "question_id": 1000 * n} for n in range(1, len(items) + 1)]
    rows = [
        (mine, item.question.text, *VQA_TYPES[item.question.kind], item.answer)
        for mine, item in zip(ids, items, strict=True)
    ]
    write_vqa(folder, {"info": {}, "license": {}}, rows, write_json)
    names = {n["question_id"]: f"val2014/COCO_val2014_{n['image_id']:012d}.jpg" for n in ids}
    _write_pictures(world, folder, items, names)


def _write_gqa(world: PocketWorld, folder: Path) -> None:
    items, questions = open_items(world, "gqa", is_pool(folder.name)), {}
    for index, item in enumerate(items):
        subject = item.question.text.removesuffix("?").split(" is ", 1)[1]
        article = "a " if item.question.kind == "relation_shape" else ""
        questions[f"{20_000_000 + index}"] = {
            "imageId": f"n{index:06d}",
            "question": item.question.text,
            "answer": item.answer,
            "fullAnswer": f"{subject} is {article}{item.answer}.",
            "isBalanced": True,
            "groups": {"global": None, "local": None},
            "entailed": [],
            "equivalent": [f"{20_000_000 + index}"],
            "types": {"structural": "query", "semantic": "rel", "detailed": "relO"},
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
            "semantic": [],
            "semanticStr": "",
        }
    split = "train" if is_pool(folder.name) else "testdev"
    write_json(folder / f"{split}_balanced_questions.json", questions)
    names = {key: f"images/{asked['imageId']}.jpg" for key, asked in questions.items()}
    _write_pictures(world, folder, items, names)


def _write_textvqa(world: PocketWorld, folder: Path) -> None:
    items = open_items(world, "textvqa", is_pool(folder.name))
    split = "train" if is_pool(folder.name) else "val"
    data = [
        {
            "question_id": 34_602 + index,
            "image_id": f"{index:016x}",
            "question": item.question.text,
            "question_tokens": item.question.text.removesuffix("?").split(),
            "answers": [item.answer] * 10,
            "image_classes": ["Drawing"],
            "image_width": IMAGE_SIZE,
            "image_height": IMAGE_SIZE,
            "set_name": split,
        }
        for index, item in enumerate(items)
    ]
    head = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / f"TextVQA_0.5.1_{split}.json", head | {"data": data})
    names = {one["question_id"]: f"train_images/{one['image_id']}.jpg" for one in data}
    _write_pictures(world, folder, items, names)


def _write_pope(world: PocketWorld, captioned: Sequence[Scene], folder: Path) -> None:
    seen = Counter(thing.shape for scene in captioned for thing in scene.things)
    popular = sorted(SHAPES, key=lambda shape: (-seen[shape], shape))[:NUM_POPULAR]
    everything, names = [], {}
    for file in POPE_FILES:
        lines = []
        items = pope_items(world, file, popular, is_pool(folder.name))
        for number, item in enumerate(items, start=1):
            everything.append(item)
            image = f"COCO_val2014_{len(everything):012d}.jpg"
            names[f"{file}-{number}"] = f"val2014/{image}"
            line = {"question_id": number, "image": image, "text": item.question.text}
            lines.append(line | {"label": item.answer})
        write_lines(folder / f"coco_pope_{file}.json", lines)
    _write_pictures(world, folder, everything, names)


def _write_refcoco(world: PocketWorld, folder: Path) -> None:
    items = where_items(world, "refcoco", is_pool(folder.name))
    refs, images, annotations = list[Any](), list[Any](), list[Any]()
    for number, item in enumerate(items, start=1):
        name, meant = f"COCO_train2014_{number:012d}", referent(item.scene, item.question)
        about = {"id": number, "file_name": f"{name}.jpg", "license": 1}
        images.append(about | {"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        for thing in item.scene.things:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": SHAPES.index(thing.shape) + 1,
                    "bbox": [float(v) for v in (thing.left, thing.top, thing.side, thing.side)],
                    "area": float(thing.side**2),
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
            if thing != meant:
                continue
            sent = item.question.expression
            sentence = {"sent_id": number, "sent": sent, "raw": sent, "tokens": sent.split()}
            refs.append(
                {
                    "ref_id": number,
                    "ann_id": len(annotations),
                    "image_id": number,
                    "category_id": SHAPES.index(thing.shape) + 1,
                    "file_name": f"{name}_{len(annotations)}.jpg",
                    "split": "train" if is_pool(folder.name) else "val",
                    "sent_ids": [number],
                    "sentences": [sentence],
                }
            )
    categories = [{"id": i, "name": s, "supercategory": "shape"} for i, s in enumerate(SHAPES, 1)]
    value: dict[str, Any] = {"info": {}, "licenses": [], "images": images}
    parts = {"annotations": annotations, "categories": categories}
    write_json(folder / "instances.json", value | parts)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    names = {f"{i['id']}-{i['id']}": f"train2014/{i['file_name']}" for i in images}
    _write_pictures(world, folder, items, names)


def _write_ocid_ref(world: PocketWorld, folder: Path) -> None:
    items, expressions, names = where_items(world, "ocid_ref", is_pool(folder.name)), {}, {}
    for index, item in enumerate(items):
        thing = referent(item.scene, item.question)
        assert thing is not None
        first, last = TAKES[len(item.scene.things)]
        scene_path = f"pocket/table/seq{index // 20:02d}/rgb/result_{index:06d}.jpg"
        names[str(index)] = f"OCID-dataset/{scene_path}"
        expressions[str(index)] = {
            "scene_path": scene_path,
            "bbox": json.dumps(list(thing.box)),
            "sentence": item.question.expression,
            "take_id": first + index % (last - first + 1),
        }
    split = "train" if is_pool(folder.name) else "val"
    write_json(folder / f"{split}_expressions.json", expressions)
    _write_pictures(world, folder, items, names)
