"""Small real data sets -> the public formats of `docs/data.md`.

`docs/real-data.md` lists the folders and says what is held apart and why.
"""

import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import zstandard

from midstream.config import SmallReal
from midstream.core.identity import folder_fingerprint
from midstream.core.storage import write_bytes, write_json
from midstream.worlds import small_real_owners as owners
from midstream.worlds.small_real_owners import (
    Captioned,
    Question,
    as_jpeg,
    generator,
    json_lines,
    match_as_question,
    question_type,
    sample,
    write_match_benchmark,
    write_text_tasks,
    write_vqa_benchmark,
)

# The wording in which vlm-evaluation asks VQAv2, GQA and POPE, so that training and evaluation
# say the same.
SHORT_ANSWER_PROMPT = "{question}\nAnswer the question using a single word or phrase."
# One picture's questions are dealt into conversations this long. Longer ones would give answers
# away: many questions of easy-VQA are answered by the replies before them.
QUESTIONS_PER_CONVERSATION = 4
LICENCE = (
    "Parts under terms of their own: novels public domain; WikiText and Wikipedia CC BY-SA; C4 "
    "ODC-BY; Noto Emoji Apache-2.0; easy-VQA MIT; Flickr8k and DAQUAR for research only; ARC "
    "CC BY-SA 4.0; COPA BSD-2-Clause; PIQA not stated. Not to be passed on."
)
NOTES = (
    "Pictures of the benchmarks flickr_match and daquar, chosen by a hash of their file name, are "
    "in no training source, nor are the captions asked about. easy-VQA keeps its official splits. "
    "DAQUAR's photographs are frames of rooms, and a room may be on both sides. Chance of vqa_easy "
    "is the score of the most frequent training answer to the same question text, of daquar that "
    "of the most frequent training answer to questions with the same first two words; flickr_match "
    "is balanced. Counts: {counts}."
)


def write_small_real(config: SmallReal, out: Path) -> None:
    """Lay the data under `config.root` out as a world in the empty folder `out`.

    The same configuration writes the same bytes. Raises FileNotFoundError for a missing file,
    ValueError for other bytes than `config.fingerprint` stands for and for a malformed record;
    what is left out is counted in the notes of `world.json`.
    """
    root = config.root
    check_files(config)
    photos = owners.read_photos(root / "caption_flickr8k")
    easy = {split: owners.read_easy(root / "vqa_easy" / split) for split in ("train", "test")}
    daquar = owners.read_daquar(root / "vqa_daquar")
    rooms = [item for item in daquar if not owners.is_held_apart(item.picture.name)]
    held_rooms = [item for item in daquar if owners.is_held_apart(item.picture.name)]

    write_texts(root, out / "text")
    write_captions(out / "captions" / "flickr8k", photos.captions)
    write_captions(out / "captions" / "emoji", owners.read_emoji(root / "caption_noto_emoji"))
    instruct = {
        "vqa_easy": easy["train"],
        "daquar": rooms,
        "flickr_match": [match_as_question(pair) for pair in photos.training_pairs],
    }
    for name, questions in instruct.items():
        write_conversations(out / "instruct" / name, questions, generator(config, name))

    chances = {
        "vqa_easy": write_vqa_benchmark(
            out / "bench" / "vqa_easy",
            sample(easy["test"], config, "vqa_easy"),
            training=easy["train"],
            group_of=lambda question: question.text,
        ),
        "daquar": write_vqa_benchmark(
            out / "bench" / "daquar",
            sample(held_rooms, config, "daquar"),
            training=rooms,
            group_of=question_type,
        ),
    }
    num_asked = write_match_benchmark(out / "bench" / "flickr_match", photos.held_pairs, config)
    counts = photos.counts | {
        "match_pairs_asked": num_asked,
        "daquar_pictures_held_apart": len({item.picture for item in held_rooms}),
        "daquar_questions_held_apart": len(held_rooms),
    }
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    world = {
        "name": "small_real",
        "licence": LICENCE,
        "notes": NOTES.format(counts=listed),
        "visual_tasks": {
            **{name: {"format": "vqav2", "chance": chance} for name, chance in chances.items()},
            "flickr_match": {"format": "pope", "chance": 0.5},
        },
        "text_tasks": write_text_tasks(root / "bench_text", out / "text_tasks", config),
    }
    write_json(out / "world.json", world)


def check_files(config: SmallReal) -> None:
    """Refuse a data folder that lacks a file or holds other bytes than were planned with."""
    root = config.root
    for pattern in SmallReal.FILES:
        if next(root.glob(pattern), None) is None:
            folder = pattern.partition("/")[0]
            raise FileNotFoundError(
                f"{root / pattern} is missing: the small real world reads the folder {folder!r} "
                f"of {root}; put it there (docs/real-data.md lists the folders), or give the "
                "folder that holds it"
            )
    found = folder_fingerprint(root, SmallReal.FILES)
    if found != config.fingerprint:
        raise ValueError(
            f"{root} has fingerprint {found}, the plan was made for {config.fingerprint}: "
            "the data changed; plan again"
        )


def write_texts(root: Path, out: Path) -> None:
    """The three text sources as compressed JSON lines."""
    novels = sorted((root / "text_novels").glob("*.txt"))
    texts = {
        "novels": [text for path in novels for text in owners.read_novel(path)],
        "wikitext2": owners.read_wikitext(root / "text_wikitext2" / "valid.txt"),
        "web_wiki": owners.read_web_wiki(root / "text_web_wiki"),
    }
    for name, documents in texts.items():
        lines = json_lines({"text": document} for document in documents)
        path = out / name / "part-000.jsonl.zst"
        write_bytes(path, zstandard.ZstdCompressor().compress(lines))


def write_captions(folder: Path, examples: Sequence[Captioned]) -> None:
    """One WebDataset shard, a sample for each picture and caption."""
    stream = io.BytesIO()
    pictures: dict[Path, bytes] = {}
    seen: Counter[Path] = Counter()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as shard:
        for example in examples:
            path = example.picture
            if path not in pictures:
                pictures[path] = as_jpeg(path)
            # A dot would end the sample's key.
            key = f"{path.stem.replace('.', '_')}-{seen[path]}"
            seen[path] += 1
            parts = {
                "jpg": pictures[path],
                "txt": example.caption.encode(),
                "json": json.dumps({"key": key, "image": path.name}).encode(),
            }
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")  # owner and time are 0
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    write_bytes(folder / "shard-000000.tar", stream.getvalue())


def write_conversations(
    folder: Path, questions: Iterable[Question], shuffle: np.random.Generator
) -> None:
    """LLaVA JSON: each picture's questions, shuffled and dealt into short conversations."""
    by_picture: dict[Path, list[Question]] = defaultdict(list)
    for question in questions:
        by_picture[question.picture].append(question)
    records = []
    for picture in sorted(by_picture):
        asked = by_picture[picture]
        order = [asked[index] for index in shuffle.permutation(len(asked))]
        for start in range(0, len(order), QUESTIONS_PER_CONVERSATION):
            turns: list[dict[str, str]] = []
            for question in order[start : start + QUESTIONS_PER_CONVERSATION]:
                text = SHORT_ANSWER_PROMPT.format(question=question.text)
                turns.append({"from": "human", "value": text if turns else f"<image>\n{text}"})
                turns.append({"from": "gpt", "value": question.answer})
            name = f"{picture.stem}-{start // QUESTIONS_PER_CONVERSATION}"
            image = f"images/{picture.name}"
            records.append({"id": name, "image": image, "conversations": turns})
        write_bytes(folder / "images" / picture.name, picture.read_bytes())
    write_json(folder / "llava.json", records)
