"""The benchmarks of the small real world in their official files, and its seeded choices."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from midstream.config import SmallReal
from midstream.data.worlds import small_real_owners as owners
from midstream.data.worlds.small_real_owners import Pair, Question
from midstream.storage import write_bytes, write_json

# The wording of the yes/no question; training and evaluation say the same.
MATCH_QUESTION = 'Does the caption "{caption}" match the image?'
T = TypeVar("T")
JPEG_QUALITY = 95


def generator(config: SmallReal, purpose: str) -> np.random.Generator:
    """A generator of its own for each purpose, so that one change does not move the others."""
    return np.random.default_rng([config.seed, *purpose.encode()])


def sample(items: Sequence[T], config: SmallReal, purpose: str) -> list[T]:
    """`config.num_questions` of the items (all, if there are fewer), in their order."""
    order = generator(config, purpose).permutation(len(items))[: config.num_questions]
    return [items[index] for index in sorted(order)]


def match_as_question(pair: Pair) -> Question:
    """A match pair as a yes/no question in the benchmark's words."""
    text = MATCH_QUESTION.format(caption=pair.caption)
    return Question(pair.picture, 0, text, "Yes" if pair.match else "No")


def question_type(question: Question) -> str:
    """The first two words, as VQAv2's question types are made."""
    return " ".join(question.text.lower().split()[:2])


def write_vqa_benchmark(
    folder: Path,
    asked: Sequence[Question],
    *,
    training: Sequence[Question],
    group_of: Callable[[Question], str],
) -> float:
    """VQAv2's official files with ten equal answers each; returns the score of guessing.

    Guessing answers with what the training questions of the same group have most often (of all,
    for a group they lack).
    """
    if not asked:
        raise ValueError(f"no question is left for {folder.name}: all its pictures are trained on")
    questions, annotations = [], []
    for number, item in enumerate(asked, start=1):
        ids = {"question_id": number, "image_id": item.number}
        kind = "yes/no" if item.answer in ("yes", "no") else "other"
        kind = "number" if item.answer.isdecimal() else kind
        answers = [
            {"answer": item.answer, "answer_confidence": "yes", "answer_id": index}
            for index in range(1, 11)
        ]
        questions.append({**ids, "question": item.text})
        annotations.append(
            {
                **ids,
                "question_type": question_type(item),
                "answer_type": kind,
                "multiple_choice_answer": item.answer,
                "answers": answers,
            }
        )
    head = {"data_type": "mscoco", "data_subtype": "val2014"}
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**head, "task_type": "Open-Ended", "questions": questions},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations})
    for number, picture in {item.number: item.picture for item in asked}.items():
        name = f"COCO_val2014_{number:012d}.jpg"
        write_bytes(folder / "val2014" / name, as_jpeg(picture))

    by_group: dict[str, Counter[str]] = defaultdict(Counter)
    for item in training:
        by_group[group_of(item)][item.answer] += 1
    overall = Counter(item.answer for item in training)
    guesses = [most_frequent(by_group.get(group_of(item), overall)) for item in asked]
    hits = sum(guess == item.answer for guess, item in zip(guesses, asked, strict=True))
    return hits / len(asked)


def most_frequent(answers: Counter[str]) -> str:
    """The answer with the highest count; of equal ones the first in the alphabet."""
    return min(answers, key=lambda answer: (-answers[answer], answer))


def write_match_benchmark(folder: Path, pairs: Sequence[Pair], config: SmallReal) -> int:
    """One file in POPE's format, as many "yes" as "no"; returns how many questions."""
    sides = [[pair for pair in pairs if pair.match is match] for match in (True, False)]
    each = min(config.num_questions // 2, *(len(side) for side in sides))
    if not each:
        raise ValueError(
            f"{len(sides[0])} matching and {len(sides[1])} other caption pairs are held apart, "
            f"num_questions is {config.num_questions}: one of each is needed at least"
        )
    # The limit of an evaluation takes a seeded order, so that sides need not alternate here.
    chosen = [
        side[index]
        for side, name in zip(sides, ("yes", "no"), strict=True)
        for index in generator(config, f"flickr_match {name}").permutation(len(side))[:each]
    ]
    questions = [
        {
            "question_id": number,
            "image": pair.picture.name,
            "text": MATCH_QUESTION.format(caption=pair.caption),
            "label": "yes" if pair.match else "no",
        }
        for number, pair in enumerate(chosen, start=1)
    ]
    write_bytes(folder / "coco_pope_random.json", json_lines(questions))
    for picture in {pair.picture for pair in chosen}:
        write_bytes(folder / "val2014" / picture.name, picture.read_bytes())
    return len(chosen)


def write_text_tasks(source: Path, folder: Path, config: SmallReal) -> dict[str, dict[str, float]]:
    """ARC-easy, PIQA and COPA as lm-evaluation-harness words them; returns each one's chance.

    A choice begins with the space that separates it from its query.
    """
    arc = sample(owners.read_choices(source / "llm_foundry" / "arc_easy.jsonl"), config, "arc_easy")
    piqa = sample(owners.read_piqa(source / "piqa"), config, "piqa")
    copa = owners.read_choices(source / "llm_foundry" / "copa.jsonl")
    tasks = {
        # The file's queries begin with "Question: " already.
        "arc_easy": [("{query}\nAnswer:", item) for item in arc],
        "piqa": [("Question: {query}\nAnswer:", item) for item in piqa],
        "copa": [("{query}", item) for item in copa],
    }
    chances = {}
    for name, items in tasks.items():
        records = [
            {
                "query": shape.replace("{query}", item["query"]),
                "choices": [f" {choice}" for choice in item["choices"]],
                "gold": item["gold"],
            }
            for shape, item in items
        ]
        write_bytes(folder / f"{name}.jsonl", json_lines(records))
        chances[name] = {"chance": sum(1 / len(item["choices"]) for item in records) / len(records)}
    return chances


def as_jpeg(path: Path) -> bytes:
    """The bytes of a JPEG file; another picture on white, encoded with full colour resolution."""
    if path.suffix == ".jpg":
        return path.read_bytes()
    with Image.open(path) as picture:
        layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    stream = io.BytesIO()
    flat = Image.alpha_composite(white, layer).convert("RGB")
    flat.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def json_lines(records: Iterable[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
