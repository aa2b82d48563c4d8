"""Captions as their owners pack them, and what the readers make of them."""

from collections.abc import Sequence
from pathlib import Path

from made_inputs import OPTIONS, as_json, read_all

from inputs import Members, tar
from midstream.data.formats.records import CaptionRecord, ReadOptions
from midstream.data.source_writer import Reject

SYNTHETIC = [f"a made caption, number {number}" for number in range(5)]


def picture(number: int) -> bytes:
    """Bytes of its own for every number: pictures are not decoded by the readers."""
    return b"\xff\xd8picture" + bytes([number % 256]) * (10 + number)


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def write_tar(path: Path, members: Members) -> str:
    return write(path, tar(members))


def img2dataset(number: int, suffix: str = "jpg") -> dict[str, bytes]:
    """A sample as img2dataset writes it."""
    key = f"00000{number:04d}"
    about = {
        "key": key,
        "caption": f"caption {number}",
        "url": f"http://example.com/{number}.jpg",
        "status": "success",
        "error_message": None,
        "width": 4,
        "height": 3,
        "uid": f"{number:032x}",
        "sha256": "0" * 64,
    }
    return {
        f"{key}.{suffix}": picture(number),
        f"{key}.json": as_json(about),
        f"{key}.txt": f"caption {number}".encode(),
    }


def apple(key: str) -> dict[str, bytes]:
    """A sample of DataCompDR as it is published: no picture, no original caption."""
    return {
        f"{key}.url.txt": b"http://example.com/a.jpg",
        f"{key}.syn.json": as_json({"syn_text": [f"{text} of {key}" for text in SYNTHETIC]}),
        f"{key}.paug.json": as_json({"param_aug": "[]"}),
        f"{key}.npz": b"PK",
        f"{key}.json": as_json({"uid": key, "sha256": "0" * 64}),
    }


def joined(key: str, number: int = 0) -> dict[str, bytes]:
    """The same sample with its picture and caption from DataComp."""
    own = {f"{key}.jpg": picture(number), f"{key}.txt": f"original of {key}".encode()}
    return own | apple(key)


def read(
    sources: str | Sequence[str], options: ReadOptions = OPTIONS
) -> list[CaptionRecord | Reject]:
    names = [sources] if isinstance(sources, str) else sources
    return read_all("captions", *names, options=options)


def captions(records: Sequence[CaptionRecord | Reject]) -> list[str]:
    return [record.caption for record in records if isinstance(record, CaptionRecord)]


def outcome(records: Sequence[CaptionRecord | Reject]) -> list[str]:
    """The caption or the reason of each record."""
    return [r.caption if isinstance(r, CaptionRecord) else f"- {r.reason}" for r in records]
