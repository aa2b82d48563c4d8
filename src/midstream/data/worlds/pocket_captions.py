"""The pocket world's captions: full descriptions, and what a web page would say of a picture.

The descriptions stand in for synthetic captions (DataComp-DR's); alt texts for captions as they are
found (DataComp's, CC12M's): short, partly wrong or beside the point. They never say where a thing
is.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from midstream.config import PocketWorld
from midstream.data.worlds.pocket_files import Sample, write_shards
from midstream.data.worlds.pocket_language import NAMES, describe
from midstream.data.worlds.pocket_scenes import (
    COLORS,
    SHAPES,
    Pair,
    Scene,
    below,
    draw_jpeg,
    generator,
    pick,
    shuffled,
)

BESIDE_THE_POINT = ("click to enlarge", "photo", "free download", "see more", "no image", "logo")
CAMERAS = ("img_{:04d}.jpg", "dsc{:05d}.jpg", "{:06d}.png")


def write_captions(world: PocketWorld, scenes: Sequence[Scene], folder: Path) -> None:
    """Write shards with a picture of each scene, its description and its record."""
    samples = (_sample(world, scene, index) for index, scene in enumerate(scenes))
    write_shards(samples, len(scenes), folder)


def write_alt_texts(world: PocketWorld, scenes: Sequence[Scene], folder: Path) -> None:
    """Write the same pictures and records with an alt text each, but for the last scene."""
    samples = (
        _sample(
            world, scene, index, alt_text(generator(world.seed, "alt text", index), scene, after)
        )
        for index, (scene, after) in enumerate(pairwise(scenes))
    )
    write_shards(samples, len(scenes) - 1, folder)


def alt_text(rng: np.random.Generator, scene: Scene, other: Scene) -> str:
    """The alt text of a picture of `scene`; one in ten is of `other`, another picture's scene.

    Of twenty: ten name half of what is there, three also but with one colour or shape wrong, three
    are a file named after a thing, two another picture's text and two nothing of any picture.
    """
    chosen = below(rng, 20)
    kind = next(kind for limit, kind in _KINDS if chosen < limit)
    return kind(rng, scene, other)


def _sample(world: PocketWorld, scene: Scene, index: int, text: str | None = None) -> Sample:
    """The files of a picture; the text is its description where none is given."""
    rng = generator(world.seed, "caption", index)
    yield f"{index:08d}.jpg", draw_jpeg(rng, scene)
    yield f"{index:08d}.txt", (describe(rng, scene) if text is None else text).encode()
    yield f"{index:08d}.json", json.dumps(scene.record()).encode()


def _half(rng: np.random.Generator, scene: Scene, other: Scene) -> str:
    """Half of the things (rounded up), each by colour, by shape or by both; perhaps the word."""
    names = [_name(rng, pair) for pair in _half_of(rng, scene)]
    if scene.word and rng.random() < 0.5:
        names.append(scene.word)
    return _joined(rng, names)


def _wrong(rng: np.random.Generator, scene: Scene, other: Scene) -> str:
    """Half of the things, the first of them in a colour or of a shape that it has not."""
    (color, shape), *rest = _half_of(rng, scene)
    present = {thing.pair for thing in scene.things}
    wrong = [(c, shape) for c in COLORS] + [(color, s) for s in SHAPES]
    pairs = [pick(rng, [pair for pair in wrong if pair not in present]), *rest]
    return _joined(rng, [" ".join(pair) for pair in pairs])


def _file(rng: np.random.Generator, scene: Scene, other: Scene) -> str:
    """A file named after one thing."""
    color, shape = pick(rng, scene.things).pair
    return f"{pick(rng, (f'{color}-{shape}', f'{shape}_{color}', shape))}{below(rng, 100)}.jpg"


def _elsewhere(rng: np.random.Generator, scene: Scene, other: Scene) -> str:
    """The text of another picture."""
    return _half(rng, other, scene)


def _nothing(rng: np.random.Generator, scene: Scene, other: Scene) -> str:
    """A camera's file name, or what every page says."""
    if rng.random() < 0.5:
        return pick(rng, CAMERAS).format(below(rng, 10_000))
    return pick(rng, (*BESIDE_THE_POINT, f"photo of {pick(rng, NAMES)}"))


Kind = Callable[[np.random.Generator, Scene, Scene], str]
_KINDS: tuple[tuple[int, Kind], ...] = (
    (10, _half),
    (13, _wrong),
    (16, _file),
    (18, _elsewhere),
    (20, _nothing),
)


def _half_of(rng: np.random.Generator, scene: Scene) -> list[Pair]:
    number = (len(scene.things) + 1) // 2
    return [thing.pair for thing in shuffled(rng, scene.things)[:number]]


def _name(rng: np.random.Generator, pair: Pair) -> str:
    color, shape = pair
    return pick(rng, (f"{color} {shape}", f"{color} {shape}", shape, f"something {color}"))


def _joined(rng: np.random.Generator, names: list[str]) -> str:
    text = pick(rng, (" and ", ", ")).join(names)
    return pick(rng, ("{}", "{}", "{} picture", "a {}", "{} - free image")).format(text)
