"""Small hand-made sources whose every token has an id of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from inputs import png
from midstream.config import Mixture, Share
from midstream.data.examples import Example
from midstream.data.source_writer import Image as Placed
from midstream.data.source_writer import ShardWriter, finish_source
from midstream.data.sources import Kind, Source

# Ids of source number n start at (n + 1) * GAP: an id says its source, 0 is no token.
GAP = 1_000_000


def make_source(
    base: Path,
    name: str,
    kind: Kind,
    lengths: Sequence[int],
    *,
    number: int = 0,
    pictures: Sequence[int | None] | None = None,
    shards: int = 1,
    synthetic: Sequence[Sequence[int]] | None = None,
    supervised: Sequence[Sequence[int]] | None = None,
    begins: bool = False,
) -> Source:
    """A source of examples with these lengths; `pictures` says which file each one shows.

    The examples are dealt to `shards` shards in consecutive runs. `synthetic` are lengths of each
    one's synthetic captions, `supervised` what of each is learnt (without it: by chance).
    With `begins` the first token of each is what begins a text.
    """
    world, folder = base / "world", base / "sources" / name
    world.mkdir(parents=True, exist_ok=True)
    random, low = np.random.default_rng(number), (number + 1) * GAP
    for shard, run in enumerate(np.array_split(np.arange(len(lengths)), shards)):
        writer = ShardWriter(
            folder / "shards" / f"{shard:06d}", kind=kind, dtype="<u4", input_name=f"{name}-000.tar"
        )
        for example in run.tolist():
            length = lengths[example]
            marks = np.ones(length) if kind == "text" else random.integers(0, 2, length)
            if supervised is not None:
                marks = np.array(supervised[example], dtype=np.uint8)
            shown = None if pictures is None else pictures[example]
            label, image = f"{name}-000.tar, sample {example}", None
            content = label.encode()
            if shown is not None:
                path = world / f"{shown}.png"
                if not path.exists():
                    path.write_bytes(png(shown))
                content = path.read_bytes()
                image = Placed(path.name, 0, len(content))
            ids = np.arange(low, low + length)
            low += length
            made = []
            for size in synthetic[example] if synthetic is not None else ():
                made.append(Example(np.arange(low, low + size), np.minimum(np.arange(size), 1)))
                low += size
            writer.add(ids, marks, name=label, content=content, image=image, synthetic=made)
        writer.close()
    begin = 1 if begins else None
    finish_source(
        folder, tokenizer_digest="made", vocab_size=low, root=str(world), begin_of_text=begin
    )
    return Source(name, folder, world)


def hash_of(source: Source, example: int) -> bytes:
    """What an example's split follows from."""
    shard, local = source.locate(example)
    hashed: bytes = shard.hashes[local].tobytes()
    return hashed


def supervised(source: Source, example: int, caption: int = 0) -> np.ndarray | None:
    """Which tokens of an example are targets; None where all are."""
    shard, local = source.locate(example)
    start, end = shard.offsets_of(caption)[local : local + 2]
    return None if shard.supervised is None else shard.supervised[start:end]


def make_sources(
    base: Path, seed: int, *, longest: int, images: bool = True, begins: bool = False
) -> dict[str, Source]:
    """Texts up to three rows long, captions and conversations that fit; `longest` is a row's
    room beside an image."""
    random = np.random.default_rng(seed)

    def draw(count: int, high: int) -> list[int]:
        return [int(x) for x in random.integers(1, high + 1, count)]

    found = {
        "web": make_source(base, "web", "text", draw(60, 3 * longest)),
        "notes": make_source(base, "notes", "text", draw(40, max(1, longest // 3)), number=1),
    }
    if images:
        found["pics"] = make_source(
            base,
            "pics",
            "caption",
            draw(50, longest),
            number=2,
            pictures=list(range(50)),
            begins=begins,
        )
        found["talks"] = make_source(
            base,
            "talks",
            "instruct",
            draw(30, longest),
            number=3,
            pictures=[None if x % 3 == 0 else x % 7 for x in range(30)],
            begins=begins,
        )
    return found


def mixture(total_tokens: int, shares: Mapping[str, float], max_epochs: int = 1) -> Mixture:
    """A budget by the sources' names."""
    parts = tuple(Share(source=name, share=share) for name, share in shares.items())
    return Mixture(total_tokens=total_tokens, shares=parts, max_epochs=max_epochs)
