"""Scenes of the pocket world: what a picture shows, how it is drawn, which split it belongs to."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

# 3x3 cells: an encoder with 24-pixel patches sees one cell a patch, and JPEG's blocks of 8 pixels
# do not bleed over.
IMAGE_SIZE = 72
CELL_SIZE = 24
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (235, 190, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Sides of the box around a thing, in pixels.
SIZES = {"small": (14,), "large": (21,)}
# Things stand in the middle of their cell, up to this many pixels off in each direction.
JITTER = 1
WORDS = ("go", "up", "hi", "ox", "me", "us", "by", "pi")
POSITIONS = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
)
# The cell of "the thing left of X" seen from the cell of X, as (rows, columns).
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
# What `sample_scene` draws its word from so that about half of the scenes have one.
MAYBE_A_WORD: tuple[str | None, ...] = (*WORDS, *[None] * len(WORDS))

TASKS = ("vqav2", "gqa", "textvqa", "pope", "refcoco", "ocid_ref")
# A scene's hash picks one of these, so that no scene is in two splits.
SPLITS = (*["captions"] * 5, *["instruct"] * 5, *TASKS)

# Rows of 5 bits, the highest bit at the left; of the letters of WORDS.
GLYPHS = {
    "b": (16, 16, 30, 17, 17, 17, 30),
    "e": (0, 0, 14, 17, 31, 16, 14),
    "g": (0, 15, 17, 17, 15, 1, 14),
    "h": (16, 16, 30, 17, 17, 17, 17),
    "i": (4, 0, 12, 4, 4, 4, 14),
    "m": (0, 0, 26, 21, 21, 21, 21),
    "o": (0, 0, 14, 17, 17, 17, 14),
    "p": (0, 30, 17, 17, 30, 16, 16),
    "s": (0, 0, 15, 16, 14, 1, 30),
    "u": (0, 0, 17, 17, 17, 19, 13),
    "x": (0, 0, 17, 10, 4, 10, 17),
    "y": (0, 17, 17, 17, 15, 1, 14),
}
GLYPH_WIDTH, GLYPH_HEIGHT, INK = 5, 7, (45, 45, 45)
# Pixels of the picture for each pixel of the font.
GLYPH_SCALE = 2

Pair = tuple[str, str]
PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
T = TypeVar("T")


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A generator that depends on the three arguments alone."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))


def below(rng: np.random.Generator, limit: int) -> int:
    """A whole number from 0 to `limit` - 1."""
    return int(rng.random() * limit)


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each as likely."""
    return options[int(rng.random() * len(options))]


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """The items in a random order."""
    return [items[index] for index in rng.permutation(len(items)).tolist()]


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape in a cell; its box is `side` pixels wide and high at (left, top)."""

    cell: int
    color: str
    shape: str
    size: str
    left: int
    top: int
    side: int

    @property
    def pair(self) -> Pair:
        """Colour and shape, by which it is named."""
        return (self.color, self.shape)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels; the right and bottom edges lie outside."""
        return (self.left, self.top, self.left + self.side, self.top + self.side)


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in different cells, (colour, shape) unique, and perhaps a word in its own cell."""

    things: tuple[Thing, ...]
    word: str | None
    word_cell: int
    word_left: int
    word_top: int

    @property
    def key(self) -> str:
        """What makes two scenes the same: what is in which cell.

        Sizes are left out, since descriptions may leave them out.
        """
        named = [(thing.cell, f"{thing.color} {thing.shape}") for thing in self.things]
        if self.word:
            named.append((self.word_cell, f"word {self.word}"))
        return ", ".join(f"{POSITIONS[cell]}: {name}" for cell, name in sorted(named))

    @property
    def split(self) -> str:
        """The one split this scene may be used in: "captions", "instruct" or a benchmark."""
        key = hashlib.blake2b(self.key.encode(), digest_size=4).digest()
        return SPLITS[int.from_bytes(key, "little") % len(SPLITS)]

    def record(self) -> dict[str, Any]:
        """The scene as JSON values; boxes are left, top, right, bottom in pixels."""
        things = [
            {
                "color": t.color,
                "shape": t.shape,
                "size": t.size,
                "position": POSITIONS[t.cell],
                "box": list(t.box),
            }
            for t in self.things
        ]
        word = {"text": self.word, "position": POSITIONS[self.word_cell]} if self.word else None
        return {"image_size": IMAGE_SIZE, "objects": things, "word": word, "key": self.key}


@dataclass(frozen=True)
class Plan:
    """What a scene must contain: the first things' pairs, cells and sizes (each list may be shorter
    than the scene), and which other pairs may be added."""

    pairs: Sequence[Pair] = ()
    cells: Sequence[int] = ()
    sizes: Sequence[str] = ()
    allowed: Callable[[Pair], bool] = lambda pair: True


def sample_scene(
    rng: np.random.Generator,
    plan: Plan,
    *,
    num_things: int,
    words: Sequence[str | None] = MAYBE_A_WORD,
) -> Scene:
    """A random scene with `plan` in it; its word is one of `words`, each as likely.

    Raises ValueError if the plan's pairs are more than `num_things`.
    """
    if len(plan.pairs) > num_things:
        raise ValueError(f"{len(plan.pairs)} planned things do not fit into {num_things}")
    pairs = list(plan.pairs)
    while len(pairs) < num_things:
        pair = pick(rng, PAIRS)
        if pair not in pairs and plan.allowed(pair):
            pairs.append(pair)
    free = [cell for cell in rng.permutation(9).tolist() if cell not in plan.cells]
    cells = [*plan.cells, *free]
    things = []
    for index, (color, shape) in enumerate(pairs):
        size = plan.sizes[index] if index < len(plan.sizes) else pick(rng, ("small", "large"))
        side = pick(rng, SIZES[size])
        row, column = divmod(cells[index], 3)
        left = column * CELL_SIZE + near_middle(rng, side)
        top = row * CELL_SIZE + near_middle(rng, side)
        things.append(Thing(cells[index], color, shape, size, left, top, side))
    # The order of planning must not show in the picture's record.
    things.sort(key=lambda thing: thing.cell)
    word = pick(rng, words)
    if word is None:
        return Scene(tuple(things), None, -1, 0, 0)
    row, column = divmod(cells[num_things], 3)
    mask = word_mask(word)
    left = column * CELL_SIZE + near_middle(rng, mask.width)
    top = row * CELL_SIZE + near_middle(rng, mask.height)
    return Scene(tuple(things), word, cells[num_things], left, top)


def near_middle(rng: np.random.Generator, size: int) -> int:
    """Where something of `size` pixels begins in a cell: in its middle, `JITTER` off at most."""
    return (CELL_SIZE - size) // 2 + below(rng, 2 * JITTER + 1) - JITTER


def draw_jpeg(rng: np.random.Generator, scene: Scene) -> bytes:
    """The picture of a scene as a JPEG file (quality 92, full colour resolution).

    It has a light background with a tint and slight noise, the things and the word.
    """
    tint = rng.integers(228, 248, size=3)
    noise = rng.integers(-3, 4, size=(IMAGE_SIZE, IMAGE_SIZE, 1))
    image = Image.fromarray((tint + noise).astype(np.uint8))
    for thing in scene.things:
        mask = shape_mask(thing.shape, thing.side)
        image.paste(COLORS[thing.color], (thing.left, thing.top), mask)
    if scene.word:
        image.paste(INK, (scene.word_left, scene.word_top), word_mask(scene.word))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


@cache
def shape_mask(shape: str, side: int) -> Image.Image:
    """How much of each pixel a shape covers (0 to 255); it touches all four sides of its box."""
    fine = 8
    large = Image.new("L", (side * fine, side * fine), 0)
    pen, end = ImageDraw.Draw(large), side * fine - 1
    if shape == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        pen.rectangle((0, 0, end, end), fill=255)
    elif shape == "triangle":
        pen.polygon([(end / 2, 0), (end, end), (0, end)], fill=255)
    else:
        assert shape == "cross", shape
        near, far = 0.34 * end, 0.66 * end
        pen.rectangle((near, 0, far, end), fill=255)
        pen.rectangle((0, near, end, far), fill=255)
    return large.resize((side, side), Image.Resampling.BOX)


@cache
def word_mask(word: str) -> Image.Image:
    """A word in the pixel font, one column between letters."""
    mask = np.zeros((GLYPH_HEIGHT, (GLYPH_WIDTH + 1) * len(word) - 1), np.uint8)
    for place, letter in enumerate(word):
        for row, bits in enumerate(GLYPHS[letter]):
            for column in range(GLYPH_WIDTH):
                if bits >> (GLYPH_WIDTH - 1 - column) & 1:
                    mask[row, place * (GLYPH_WIDTH + 1) + column] = 255
    return Image.fromarray(mask.repeat(GLYPH_SCALE, axis=0).repeat(GLYPH_SCALE, axis=1))
