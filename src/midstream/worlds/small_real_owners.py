"""Small real data sets as their owners lay them out, and their benchmarks in official files.

Pictures are held apart from training by a hash of their file name, the same ones for every seed.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from midstream.config import SmallReal
from midstream.core.storage import read_json, write_bytes, write_json
from midstream.worlds.pocket_benchmarks import write_vqa

# Share of the pictures that could be asked about which training never sees.
HELD_APART_PERCENT = 20
# A novel is cut at the next end of a sentence behind this many characters, and before a chapter
# once the piece is no mere table of contents.
DOCUMENT_CHARACTERS = 8000
SHORTEST_CHAPTER_CHARACTERS = 1000
_CHAPTER = re.compile(r"\s*(chapter|book|volume)\b.{0,80}$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?][\"')\]_]*\s*$")
_ARTICLE = re.compile(r" = (?!=).*(?<!=) = ")


@dataclass(frozen=True)
class Captioned:
    """A picture file and one caption of it."""

    picture: Path
    caption: str


@dataclass(frozen=True)
class Question:
    """A question about a picture, its answer, and the picture's number among the owner's."""

    picture: Path
    number: int
    text: str
    answer: str


@dataclass(frozen=True)
class Pair:
    """Whether a caption is one of the picture's own."""

    picture: Path
    caption: str
    match: bool


@dataclass(frozen=True)
class Photos:
    """Flickr8k divided into what trains and what evaluates, and counts of what is left out."""

    captions: tuple[Captioned, ...]
    training_pairs: tuple[Pair, ...]
    held_pairs: tuple[Pair, ...]
    counts: dict[str, int]


def is_held_apart(name: str) -> bool:
    """Whether a picture of this file name is kept for evaluation."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100 < HELD_APART_PERCENT


def read_novel(path: Path) -> list[str]:
    """A novel in documents of about `DOCUMENT_CHARACTERS`, in order; every line is kept."""
    text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    pieces: list[list[str]] = [[]]
    size, sentence_ended = 0, True
    for line in text.split("\n"):
        new_chapter = size >= SHORTEST_CHAPTER_CHARACTERS and _CHAPTER.match(line)
        if new_chapter or (size >= DOCUMENT_CHARACTERS and sentence_ended):
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line) + 1
        # Behind an empty line the sentence before it counts.
        sentence_ended = bool(_SENTENCE_END.search(line)) or (not line.strip() and sentence_ended)
    documents = ["\n".join(piece).strip() for piece in pieces]
    return [document for document in documents if document]


def read_wikitext(path: Path) -> list[str]:
    """The articles of a WikiText file in its own tokenised spelling."""
    articles: list[list[str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if _ARTICLE.fullmatch(line):
            articles.append([])
        if articles:
            articles[-1].append(line)
        elif line.strip():
            raise ValueError(f"{path}, line {number}: text before the first ' = Title = ' line")
    return ["\n".join(article).strip() for article in articles]


def read_web_wiki(folder: Path) -> list[str]:
    """The web documents (JSON lines) and the encyclopedia articles (one a line)."""
    web = [record["text"] for _, record in read_json_lines(folder / "c4_demo.jsonl", "text")]
    lines = (folder / "wiki_demo.txt").read_text(encoding="utf-8").split("\n")
    return web + [line for line in lines if line.strip()]


def read_photos(folder: Path) -> Photos:
    """Flickr8k with its match pairs, divided by picture so that no caption is on both sides.

    Only pictures with pairs can be asked about, so only such are held apart. A pair counts for
    evaluation if its caption belongs to no training picture, and for training if its caption
    belongs to no held picture and is in no evaluation pair. Spelling is compared without
    punctuation, which the pairs lost in places.
    """
    captions = list(_captioned(folder / "captions.txt", folder / "images"))
    pairs = list(_match_pairs(folder))
    distinct = list(dict.fromkeys(pairs))
    held = {pair.picture for pair in distinct if is_held_apart(pair.picture.name)}
    training = tuple(item for item in captions if item.picture not in held)
    trained_on = {_spelling(item.caption) for item in training}
    held_pairs = tuple(
        pair
        for pair in distinct
        if pair.picture in held and _spelling(pair.caption) not in trained_on
    )
    secret = {_spelling(item.caption) for item in captions if item.picture in held}
    secret |= {_spelling(pair.caption) for pair in held_pairs}
    training_pairs = tuple(
        pair
        for pair in distinct
        if pair.picture not in held and _spelling(pair.caption) not in secret
    )
    counts = {
        "flickr8k_pictures_held_apart": len(held),
        "flickr8k_captions_held_apart": len(captions) - len(training),
        "match_pairs_to_train": len(training_pairs),
        "match_pairs_to_evaluate": len(held_pairs),
        "match_pairs_repeated": len(pairs) - len(distinct),
        "match_pairs_with_a_caption_of_the_other_side": (
            len(distinct) - len(training_pairs) - len(held_pairs)
        ),
    }
    return Photos(training, training_pairs, held_pairs, counts)


def read_emoji(folder: Path) -> list[Captioned]:
    """Emoji and their names."""
    return list(_captioned(folder / "captions.csv", folder / "72"))


def read_easy(folder: Path) -> list[Question]:
    """One split of easy-VQA: a list of [question, answer, picture number]."""
    path = folder / "questions.json"
    questions = []
    for index, record in enumerate(read_json(path)):
        where = f"{path}, record {index}"
        if not (isinstance(record, list) and len(record) == 3 and isinstance(record[2], int)):
            raise ValueError(
                f"{where}: expected [question, answer, picture number], got {record!r}"
            )
        text, answer, number = record
        picture = _picture(folder / "images" / f"{number}.png", where)
        questions.append(Question(picture, number, text, answer))
    return questions


def read_daquar(folder: Path) -> list[Question]:
    """DAQUAR; several answers stay one text, joined by ", " as the owners give them."""
    questions = []
    path = folder / "data_train.csv"
    for where, (text, answer, image) in _rows(path, ("question", "answer", "image_id")):
        digits = image.removeprefix("image")
        if not digits.isdecimal():
            raise ValueError(f"{where}: image_id {image!r} is not 'image' and a number")
        picture = _picture(folder / "images" / f"{image}.jpg", where)
        questions.append(Question(picture, int(digits), text.strip(), answer.strip()))
    return questions


def read_choices(path: Path) -> list[dict[str, Any]]:
    """Records {query, choices, gold}; `gold` is checked to be one of the choices."""
    records = []
    for where, record in read_json_lines(path, "query", "choices", "gold"):
        if record["gold"] not in range(len(record["choices"])):
            raise ValueError(f"{where}: gold {record['gold']!r} is none of its choices")
        records.append(record)
    return records


def read_piqa(folder: Path) -> list[dict[str, Any]]:
    """PIQA's official two files as {query (the goal), choices, gold}."""
    path, label_path = folder / "valid.jsonl", folder / "valid-labels.lst"
    goals = list(read_json_lines(path, "goal", "sol1", "sol2"))
    labels = label_path.read_text(encoding="utf-8").split()
    if len(goals) != len(labels) or not set(labels) <= {"0", "1"}:
        raise ValueError(
            f"{label_path} must hold a 0 or 1 for each of the {len(goals)} records of {path}, it "
            f"holds {len(labels)} labels; fetch both files again"
        )
    return [
        {"query": goal["goal"], "choices": [goal["sol1"], goal["sol2"]], "gold": int(label)}
        for (_, goal), label in zip(goals, labels, strict=True)
    ]


def read_json_lines(path: Path, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of each line; ValueError for a line without one of the keys."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(record, dict) or not record.keys() >= set(keys):
            raise ValueError(f"{where}: needs the keys {', '.join(keys)}")
        yield where, record


def _captioned(path: Path, pictures: Path) -> Iterator[Captioned]:
    for where, (name, caption) in _rows(path, ("image", "caption")):
        yield Captioned(_picture(pictures / name, where), caption)


def _match_pairs(folder: Path) -> Iterator[Pair]:
    path = folder / "match_pairs.tsv"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where, fields = f"{path}, line {number}", line.split("\t")
        if len(fields) != 3 or fields[2] not in ("match", "no-match"):
            raise ValueError(f"{where}: expected image, caption, match or no-match; got {line!r}")
        picture = _picture(folder / "images" / fields[0], where)
        yield Pair(picture, fields[1], fields[2] == "match")


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(where, the named columns) of each row of a CSV file; none of them may be empty."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for row in (reader := csv.DictReader(stream)):
            where = f"{path}, line {reader.line_num}"
            values = tuple(row.get(column) or "" for column in columns)
            if not all(value.strip() for value in values):
                raise ValueError(f"{where}: needs {', '.join(columns)}, got {row}")
            yield where, values


def _picture(path: Path, where: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{where}: picture {path} is missing; fetch the folder again")
    return path


def _spelling(caption: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", caption.lower()))


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
    rows = []
    for number, item in enumerate(asked, start=1):
        kind = "yes/no" if item.answer in ("yes", "no") else "other"
        kind = "number" if item.answer.isdecimal() else kind
        ids = {"question_id": number, "image_id": item.number}
        rows.append((ids, item.text, question_type(item), kind, item.answer))
    write_vqa(folder, {}, rows, write_json)
    for number, picture in {item.number: item.picture for item in asked}.items():
        name = f"COCO_val2014_{number:012d}.jpg"
        write_bytes(folder / "val2014" / name, as_jpeg(picture))

    by_group: dict[str, Counter[str]] = defaultdict(Counter)
    for item in training:
        by_group[group_of(item)][item.answer] += 1
    overall = Counter(item.answer for item in training)
    hits = 0
    for item in asked:
        counts = by_group.get(group_of(item), overall)
        # Of equally frequent ones the first in the alphabet.
        hits += item.answer == min(counts, key=lambda answer: (-counts[answer], answer))
    return hits / len(asked)


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
    arc = sample(read_choices(source / "llm_foundry" / "arc_easy.jsonl"), config, "arc_easy")
    piqa = sample(read_piqa(source / "piqa"), config, "piqa")
    copa = read_choices(source / "llm_foundry" / "copa.jsonl")
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
