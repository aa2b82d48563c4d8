"""Scenes of the pocket world: what a picture shows, how it is drawn, which split it belongs to."""

import hashlib
import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw

# 3x3 cells: an encoder with 24-pixel patches sees one cell a patch, and JPEG's blocks of 8 pixels
# do not bleed over.
IMAGE_SIZE = 72
CELL_SIZE = 24
# Concepts, the commonest first: captions show all of them, conversations not the last ones.
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (235, 190, 20),
    "purple": (130, 50, 170),
    "brown": (125, 75, 30),
    "pink": (240, 120, 190),
    "cyan": (60, 200, 220),
}
SHAPES = (
    *("circle", "square", "triangle", "cross", "star", "ring", "arrow", "heart"),
    *("house", "moon", "bolt", "flag", "cup", "tree", "fish", "key"),
)
# Sides of the box around a thing, in pixels.
# A box of the other size in the same cell still covers a thing by more than half (IoU .58).
SIZES = {"small": 16, "large": 21}
WORDS = (
    *("go", "up", "hi", "ox", "me", "us", "by", "pi"),
    *("be", "so", "he", "my", "oh", "ex", "ye", "mi"),
)
POSITIONS = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
)
# The cell of "the thing left of X" seen from the cell of X, as (rows, columns).
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
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

CONCEPTS = (*COLORS, *SHAPES, *WORDS)
Pair = tuple[str, str]
# How often a concept is seen, by its place in its list.
Frequency = Literal["common", "seldom", "captions only"]
FREQUENCIES: tuple[Frequency, ...] = get_args(Frequency)
# Whose concepts a scene is made of: benchmarks ask about all alike.
Style = Literal["even", "captions", "instruct"]
# The share of a conversation's concepts that are seldom ones, and the long tail of captions: the
# n-th is n to this power as frequent as the first.
SELDOM_SHARE, TAIL = 0.12, -0.5
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


def frequency(name: str) -> Frequency:
    """How often conversations show a colour, shape or word: five eighths of each list are common,
    about two eighths seldom, and the rest captions alone show."""
    names = next(names for names in (tuple(COLORS), SHAPES, WORDS) if name in names)
    place = names.index(name) / len(names)
    return "common" if place < 5 / 8 else "seldom" if place < 7 / 8 else "captions only"


@cache
def _steps(names: tuple[str, ...], style: Style) -> tuple[float, ...]:
    """The running sum of the names' probabilities."""
    weights = [1.0] * len(names)
    if style == "captions":
        weights = [number**TAIL for number in range(1, len(names) + 1)]
    elif style == "instruct":
        kinds = [frequency(name) for name in names]
        shares = {"common": 1 - SELDOM_SHARE, "seldom": SELDOM_SHARE, "captions only": 0.0}
        weights = [shares[kind] / kinds.count(kind) for kind in kinds]
    return tuple(value / sum(weights) for value in accumulate(weights))


def draw(rng: np.random.Generator, names: tuple[str, ...], style: Style) -> str:
    """One of the names, as frequent as the style has it."""
    return names[min(bisect_right(_steps(names, style), rng.random()), len(names) - 1)]


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
        return ", ".join(f"{POSITIONS[cell]}: {name}" for cell, name in sorted(self.named("word")))

    def named(self, word: str = "the word") -> list[tuple[int, str]]:
        """The cells of its things, and of its word, and what stands there."""
        named = [(thing.cell, f"{thing.color} {thing.shape}") for thing in self.things]
        return named + ([(self.word_cell, f"{word} {self.word}")] if self.word else [])

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
    words: Sequence[str | None] | None = None,
    style: Style = "even",
) -> Scene:
    """A random scene with `plan` in it, of the style's concepts; its word is one of `words`, each
    as likely. None: half of the scenes have one, of the style's.

    Raises ValueError if the plan's pairs are more than `num_things`.
    """
    if len(plan.pairs) > num_things:
        raise ValueError(f"{len(plan.pairs)} planned things do not fit into {num_things}")
    pairs = list(plan.pairs)
    while len(pairs) < num_things:
        pair = (draw(rng, tuple(COLORS), style), draw(rng, SHAPES, style))
        if pair not in pairs and plan.allowed(pair):
            pairs.append(pair)
    free = [cell for cell in rng.permutation(9).tolist() if cell not in plan.cells]
    cells = [*plan.cells, *free]
    things = []
    for index, (color, shape) in enumerate(pairs):
        size = plan.sizes[index] if index < len(plan.sizes) else pick(rng, ("small", "large"))
        side = SIZES[size]
        row, column = divmod(cells[index], 3)
        left = column * CELL_SIZE + margin(side)
        top = row * CELL_SIZE + margin(side)
        things.append(Thing(cells[index], color, shape, size, left, top, side))
    # The order of planning must not show in the picture's record.
    things.sort(key=lambda thing: thing.cell)
    if words is None:
        word = draw(rng, WORDS, style) if rng.random() < 0.5 else None
    else:
        word = pick(rng, words)
    if word is None:
        return Scene(tuple(things), None, -1, 0, 0)
    row, column = divmod(cells[num_things], 3)
    mask = word_mask(word)
    left = column * CELL_SIZE + margin(mask.width)
    top = row * CELL_SIZE + margin(mask.height)
    return Scene(tuple(things), word, cells[num_things], left, top)


def margin(size: int) -> int:
    """Where something of `size` pixels begins in a cell that it stands in the middle of."""
    return (CELL_SIZE - size) // 2


def draw_jpeg(rng: np.random.Generator, scene: Scene) -> bytes:
    """The picture of a scene as a JPEG file (quality 92, full colour resolution)."""
    buffer = io.BytesIO()
    draw_scene(rng, scene).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def draw_scene(rng: np.random.Generator, scene: Scene) -> Image.Image:
    """The picture of a scene: a light background with a tint and slight noise, the things and the
    word."""
    tint = rng.integers(228, 248, size=3)
    noise = rng.integers(-3, 4, size=(IMAGE_SIZE, IMAGE_SIZE, 1))
    image = Image.fromarray((tint + noise).astype(np.uint8))
    for thing in scene.things:
        mask = shape_mask(thing.shape, thing.side)
        image.paste(COLORS[thing.color], (thing.left, thing.top), mask)
    if scene.word:
        image.paste(INK, (scene.word_left, scene.word_top), word_mask(scene.word))
    return image


# Outlines in a box of side 1; each touches all four of its sides. A circle is left, top, right,
# bottom. What begins with "-" is cut out again.
_CIRCLE = (0.0, 0.0, 1.0, 1.0)
OUTLINES: dict[str, tuple[tuple[str, tuple[float, ...]], ...]] = {
    "circle": (("+circle", _CIRCLE),),
    "square": (("+", (0, 0, 1, 0, 1, 1, 0, 1)),),
    "triangle": (("+", (0.5, 0, 1, 1, 0, 1)),),
    "cross": (
        ("+", (0.34, 0, 0.66, 0, 0.66, 1, 0.34, 1)),
        ("+", (0, 0.34, 1, 0.34, 1, 0.66, 0, 0.66)),
    ),
    "star": (("+", (0.5, 0, 1, 0.75, 0, 0.75)), ("+", (0.5, 1, 1, 0.25, 0, 0.25))),
    "ring": (("+circle", _CIRCLE), ("-circle", (0.27, 0.27, 0.73, 0.73))),
    "arrow": (("+", (0.5, 0, 1, 0.5, 0.5, 1)), ("+", (0, 0.35, 0.5, 0.35, 0.5, 0.65, 0, 0.65))),
    "heart": (
        ("+circle", (0, 0, 0.54, 0.54)),
        ("+circle", (0.46, 0, 1, 0.54)),
        ("+", (0.03, 0.4, 0.97, 0.4, 0.5, 1)),
    ),
    "house": (
        ("+", (0.5, 0, 1, 0.45, 1, 1, 0.62, 1, 0.62, 0.6, 0.38, 0.6, 0.38, 1, 0, 1, 0, 0.45)),
    ),
    "moon": (("+circle", (0, 0, 1.2, 1)), ("-circle", (0.42, -0.2, 1.5, 0.78))),
    "bolt": (("+", (0.6, 0, 0, 0.6, 0.45, 0.6, 0.3, 1, 1, 0.38, 0.55, 0.38)),),
    "flag": (("+", (0, 0, 0.16, 0, 0.16, 1, 0, 1)), ("+", (0.16, 0, 1, 0, 1, 0.5, 0.16, 0.5))),
    "cup": (
        ("+", (0, 0.1, 0.7, 0.1, 0.6, 1, 0.1, 1)),
        ("+circle", (0.5, 0, 1, 0.6)),
        ("-circle", (0.62, 0.14, 0.88, 0.46)),
    ),
    "tree": (("+circle", (0, 0, 1, 0.62)), ("+", (0.4, 0.5, 0.6, 0.5, 0.6, 1, 0.4, 1))),
    "fish": (("+circle", (0, 0.1, 0.75, 0.9)), ("+", (0.6, 0.5, 1, 0, 1, 1))),
    "key": (
        ("+circle", (0, 0, 0.5, 1)),
        ("-circle", (0.13, 0.28, 0.37, 0.72)),
        ("+", (0.45, 0.4, 1, 0.4, 1, 0.85, 0.84, 0.85, 0.84, 0.6, 0.45, 0.6)),
    ),
}


@cache
def shape_mask(shape: str, side: int) -> Image.Image:
    """How much of each pixel a shape covers (0 to 255); it touches all four sides of its box."""
    fine = 8
    large = Image.new("L", (side * fine, side * fine), 0)
    pen, end = ImageDraw.Draw(large), side * fine - 1
    for kind, numbers in OUTLINES[shape]:
        fill, at = 255 if kind[0] == "+" else 0, [number * end for number in numbers]
        if kind.endswith("circle"):
            pen.ellipse(at, fill=fill)
        else:
            pen.polygon(at, fill=fill)
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
