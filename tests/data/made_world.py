"""A tiny world in the public formats, written by hand: texts, shards, conversations."""

import io
import json
from pathlib import Path
from typing import Any

import zstandard
from made_inputs import as_lines
from PIL import Image

from inputs import png, tar
from midstream.config import PublicFolder, TrainedTokenizer
from midstream.core.identity import world_fingerprint
from preparing import prepare

TEXTS = [f"Document {n} says: the river is {'very ' * (n % 4)}wide.\nCafé {n}." for n in range(12)]
CAPTIONS = [f"a {color} boat on the water" for color in ("red", "blue", "grey", "white", "black")]
TALKS: list[dict[str, Any]] = [
    {
        "id": "t1",
        "image": "photos/1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A boat."},
            {"from": "human", "value": "Which color?"},
            {"from": "gpt", "value": "It is red."},
        ],
    },
    {
        "id": "t2",
        "conversations": [
            {"from": "human", "value": "Say hello."},
            {"from": "gpt", "value": "Hello."},
        ],
    },
    {
        "id": 3,
        "image": "photos/1.png",
        "conversations": [
            {"from": "human", "value": "Is it wide?\n<image>"},
            {"from": "gpt", "value": "No."},
        ],
    },
]
TRAINED = TrainedTokenizer(vocab_size=300)


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png(number, (24, 16)))).save(stream, "JPEG")
    return stream.getvalue()


def lines(texts: list[str]) -> bytes:
    return as_lines([{"text": text, "url": "x"} for text in texts])


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(members))


def samples(first: int, captions: list[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number, caption in enumerate(captions, start=first):
        found[f"{number:05d}.jpg"] = jpeg(number)
        found[f"{number:05d}.json"] = b"{}"
        found[f"{number:05d}.txt"] = f" {caption}\n".encode()
    return found


def write_talks(root: Path, records: Any) -> None:
    (root / "instruct/talks/llava.json").write_text(json.dumps(records))


def write_world(found: Path) -> None:
    """Two text files, two shards of five captions, three conversations about one picture."""
    (found / "text/web").mkdir(parents=True)
    (found / "text/web/a.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor().compress(lines(TEXTS[:8]))
    )
    (found / "text/web/b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(TEXTS[8:]))
    write_tar(found / "captions/pics/000.tar", samples(0, CAPTIONS[:3]))
    write_tar(found / "captions/pics/001.tar", samples(3, CAPTIONS[3:]))
    (found / "instruct/talks/photos").mkdir(parents=True)
    (found / "instruct/talks/photos/1.png").write_bytes(png(1))
    write_talks(found, TALKS)


def world_of(root: Path, **options: Any) -> PublicFolder:
    return PublicFolder(root=root, fingerprint=world_fingerprint(root), **options)


def prepared(root: Path, out: Path, tokenizer: Any = TRAINED) -> dict[str, Any]:
    return prepare(world_of(root), tokenizer, out)
