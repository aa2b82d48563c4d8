"""Reading the owners' layouts of the small real data sets, and what is held apart from training.

Pictures are held apart by a hash of their file name, so that the same ones are for every seed.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.config import SmallReal
from midstream.storage import read_json

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


def check_files(root: Path) -> None:
    """Raises FileNotFoundError for the first pattern of `SmallReal.FILES` that `root` lacks."""
    for pattern in SmallReal.FILES:
        if next(root.glob(pattern), None) is None:
            folder = pattern.partition("/")[0]
            raise FileNotFoundError(
                f"{root / pattern} is missing: the small real world reads the folder {folder!r} "
                f"of {root}; put it there (docs/real-data.md lists the folders), or give the "
                "folder that holds it"
            )


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
    captions = [
        Captioned(_picture(folder / "images" / name, where), caption)
        for where, (name, caption) in _rows(folder / "captions.txt", ("image", "caption"))
    ]
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
    return [
        Captioned(_picture(folder / "72" / name, where), caption)
        for where, (name, caption) in _rows(folder / "captions.csv", ("image", "caption"))
    ]


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
