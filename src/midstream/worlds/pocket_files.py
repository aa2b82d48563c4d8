"""The pocket world's shards and benchmarks as official files."""

import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from midstream.config import PocketWorld
from midstream.config.training import is_pool
from midstream.core.identity import GROUPS_FILE
from midstream.core.storage import write_bytes
from midstream.worlds.pocket_items import Item, open_items, pope_items, where_items
from midstream.worlds.pocket_language import referent
from midstream.worlds.pocket_scenes import IMAGE_SIZE, SHAPES, Scene, draw_jpeg, generator

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
SAMPLES_A_SHARD = 1_000
# A task's folder: its own name, or `pool_of` it.
Named = Callable[[str], str]
# The files of one picture in a shard: names and bytes.
Sample = Iterator[tuple[str, bytes]]


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; creates the folder."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_lines(path: Path, values: Sequence[Any]) -> None:
    """Write one JSON value a line; creates the folder."""
    write_bytes(path, "".join(json.dumps(value) + "\n" for value in values).encode())


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
