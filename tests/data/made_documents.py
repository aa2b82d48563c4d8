"""Small sources whose examples show any number of pictures anywhere, and what a row is of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inputs import png
from midstream.core.batch import IGNORE
from midstream.data.source_writer import Image, ShardWriter, Shown, finish_source
from midstream.data.sources import Kind, Source
from midstream.order.plan import Placement

# One position of an example: its token of this number, or a part of its picture of this number.
Position = tuple[str, int]


def make_documents(
    base: Path,
    name: str,
    places: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    kind: Kind = "interleaved",
    shards: int = 1,
    begins: bool = False,
    learnt: Sequence[Sequence[int]] | None = None,
    first: int = 0,
    validation: float = 0.0,
) -> Source:
    """Examples of these lengths, their pictures before these tokens, which end pictures.

    The pictures are numbered through; tokens are numbers from 10 on, `learnt` what is a target.
    """
    data = [png(first + number) for number in range(sum(map(len, places)))]
    archive = base / f"{name}.bin"
    archive.write_bytes(b"".join(data))
    starts, at = np.cumsum([0, *map(len, data)]).tolist(), 0
    for shard, run in enumerate(np.array_split(np.arange(len(lengths)), shards)):
        writer = ShardWriter(
            base / name / "shards" / f"{shard:06d}",
            kind=kind,
            dtype="<u2",
            input_name="in",
            head=int(begins),
            validation_fraction=validation,
        )
        for example in run.tolist():
            ids = 10 + np.arange(lengths[example]) % 1000
            marks = np.ones(len(ids), np.uint8) if learnt is None else np.array(learnt[example])
            shown = []
            for place in places[example]:
                if learnt is None:
                    marks[place] = 0
                image = Image(archive.name, starts[at], len(data[at]))
                shown.append(Shown(place, image, data[at]))
                at += 1
            label = f"in, document {example}"
            content = shown[0].data if shown and kind != "interleaved" else label.encode()
            writer.add(ids, marks, name=label, content=content, pictures=shown)
        writer.close()
    begin = 1 if begins else None
    finish_source(
        base / name, tokenizer_digest="t", vocab_size=2000, root=str(base), begin_of_text=begin
    )
    return Source(name, base / name, base)


def drawn_documents(base: Path, name: str, seed: int, count: int, *, longest: int) -> Source:
    """Documents of up to `longest` tokens and six pictures, some side by side or at an end."""
    random = np.random.default_rng(seed)
    lengths = [int(n) for n in random.integers(2, longest + 1, count)]
    places = [
        sorted(random.choice(n - 1, min(n - 1, int(random.integers(1, 7))), replace=False).tolist())
        for n in lengths
    ]
    shards, begins = int(random.integers(1, 4)), bool(random.integers(2))
    return make_documents(base, name, places, lengths, shards=shards, begins=begins)


def positions_of(
    source: Source, example: int, num_patches: int, caption: int = 0
) -> list[Position]:
    """All positions of an example, one by one."""
    places, found = source.places_of(example), list[Position]()
    num_tokens = len(source.input_ids(example, caption=caption))
    for token in range(num_tokens + 1):
        for number, place in enumerate(places):
            found += [("picture", number)] * (num_patches if place == token else 0)
        found += [("token", token)] * (token < num_tokens)
    return found


def row_of(
    source: Source, placed: Placement, num_patches: int
) -> tuple[list[int], list[int], list[Position]]:
    """The ids and targets of a piece, and its positions."""
    whole = positions_of(source, placed.example, num_patches, placed.caption)
    ids = source.input_ids(placed.example, caption=placed.caption).tolist()
    shard, local = source.locate(placed.example)
    low, high = shard.offsets_of(placed.caption)[local : local + 2].tolist()
    marks = [1] * len(ids) if shard.supervised is None else shard.supervised[low:high].tolist()
    end = placed.start + placed.length
    goes_on = source.kind in ("text", "interleaved")
    targets = []
    for at in range(placed.start, end):
        follows = at + 1 < (len(whole) if goes_on else end)
        kind, token = whole[at + 1] if follows else ("nothing", 0)
        here = whole[at][0] == kind == "token" and marks[token]
        targets.append(ids[token] if here else IGNORE)
    piece = whole[placed.start : end]
    return [ids[n] if kind == "token" else 0 for kind, n in piece], targets, piece
