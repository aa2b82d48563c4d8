"""A small world of one's own: texts, captions, conversations and benchmarks in public formats."""

import io
import json
import random
from pathlib import Path

from PIL import Image

from inputs import tar
from midstream.config import PublicFolder, TrainedTokenizer
from midstream.core.identity import world_fingerprint
from midstream.study.stages import Prepare

VOCAB_SIZE = 320
NUM_QUESTIONS = 6
WORDS = (
    *("red", "green", "blue", "small", "large", "circle", "star", "above"),
    *("below", "house", "river", "stone", "bird", "winter"),
)


def write_world(root: Path, *, documents: int = 40, pictures: int = 20, talks: int = 8) -> Path:
    """A world with the sources web, pictures and talks, and the tasks pope and quiz."""
    draw = random.Random(f"{documents} {pictures} {talks}")
    texts = ({"text": _words(draw, 40)} for _ in range(documents))
    _write(root / "text/web/part.jsonl", "".join(json.dumps(text) + "\n" for text in texts))
    members = {}
    for number in range(pictures):
        members[f"{number:04d}.jpg"] = picture(number)
        members[f"{number:04d}.txt"] = _words(draw, 6).encode()
    _write(root / "captions/pictures/shard.tar", tar(members))
    records = []
    for number in range(talks):
        _write(root / f"instruct/talks/images/{number}.jpg", picture(100 + number))
        turns = [("human", f"<image>\n{_words(draw, 4)}?"), ("gpt", _words(draw, 3))]
        said = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(number), "image": f"images/{number}.jpg", "conversations": said})
    _write(root / "instruct/talks/talks.json", json.dumps(records))
    write_tasks(root)
    return root


def write_tasks(root: Path) -> None:
    """The benchmarks of the world, whole."""
    asked = []
    for number in range(NUM_QUESTIONS):
        _write(root / f"bench/pope/val2014/{number}.jpg", picture(200 + number))
        label = "yes" if number % 2 else "no"
        text = f"Is there a {WORDS[number]} in the image?"
        record = {"question_id": number, "image": f"{number}.jpg", "text": text, "label": label}
        asked.append(json.dumps(record))
    _write(root / "bench/pope/coco_pope_random.json", "\n".join(asked) + "\n")
    items = ({"query": word, "choices": ["red", "blue"], "gold": 0} for word in WORDS)
    _write(root / "text_tasks/quiz.jsonl", "".join(json.dumps(item) + "\n" for item in items))
    tasks = {
        "visual_tasks": {"pope": {"format": "pope", "chance": 0.5}},
        "text_tasks": {"quiz": {"chance": 0.5}},
    }
    about = {"name": "mine", "licence": "CC0-1.0", "notes": "made up"}
    _write(root / "world.json", json.dumps(about | tasks))


def data_of(root: Path) -> Prepare:
    """The world as a study names it."""
    return Prepare(
        world=PublicFolder(root=root, fingerprint=world_fingerprint(root)),
        tokenizer=TrainedTokenizer(vocab_size=VOCAB_SIZE),
    )


def picture(number: int) -> bytes:
    """A JPEG file of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (number % 256, 7 * number % 256, 90)).save(stream, "JPEG")
    return stream.getvalue()


def _words(draw: random.Random, number: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(number))


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
