"""How long a prepared source's examples are: for plans by classes, for rows one by one; and how
often a plan shows each picture.

Of an example too long for a row only its number and its excess are held in memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from midstream.config import Caption, Overflow, Rows, check_picture
from midstream.core.tokens import num_shown, shown_name
from midstream.data.columns import Shard
from midstream.data.sources import Source
from midstream.order.mixture import Quota
from midstream.order.stream import parts_of
from midstream.study.results import PictureViews

# Of such classes follows the sum of squared lengths in rows of any length within some thousandths.
CLASSES_PER_DOUBLING = 4


def length_facts(shards: Iterable[Shard]) -> dict[str, Any]:
    """Of the training split: `num_targets`, and `lengths` of examples by their pictures.

    A target is a token with a loss that has another one before it in its example. Each class of
    `lengths["plain"]`, `lengths["image"]` and, where there are, `lengths["2 images"]` and so on
    (`shown_name`) is [examples, tokens, sum of squared tokens].
    """
    found = _Facts()
    for shard in shards:
        found.add(shard, 0, 1)
    return found.summary()


def caption_facts(shards: Iterable[Shard]) -> dict[str, Any]:
    """Of the training split: `captions`, how many examples have each kind.

    Where some have synthetic ones, `seen` is what plans count with: `num_tokens`, `num_targets` and
    `lengths` for "synthetic" (the first of each) and "random" (the mean of all), and the `longest`.
    """
    number, parts = 0, list[dict[str, Any]]()
    first, drawn = _Facts(), _Facts()
    longest: dict[int, dict[str, Any]] = {}
    for shard in shards:
        examples = int(shard.index["train"]["examples"])
        number += examples
        if "synthetic" not in shard.index:
            continue
        parts.append(shard.index["synthetic"]["train"])
        first.add(shard, 1, 1)
        numbered = range(1, 1 + shard.num_synthetic)
        rows = [shard.offsets_of(caption)[: examples + 1] for caption in numbered]
        numbers = np.count_nonzero(np.diff(rows, axis=1), axis=0)
        for caption in numbered:
            drawn.add(shard, caption, 1 / np.maximum(numbers, 1))
            mine = _longest(shard, caption)
            longest[caption] = max(longest.get(caption, mine), mine, key=_tokens)
    lack = sum(part["examples"] - part["originals"] for part in parts)
    pictures = sum(part["pictures"] for part in parts)
    captions = {"original": number - lack, "synthetic": pictures}
    if not pictures:
        return {"captions": captions}
    seen = {"synthetic": first.summary(), "random": drawn.summary()}
    seen["synthetic"]["num_tokens"] = sum(part["tokens"][0] for part in parts)
    seen["random"]["num_tokens"] = sum(part["mean_tokens"] for part in parts)
    seen["synthetic"]["longest"] = {"image": longest[1]}
    every = [longest[caption] for caption in sorted(longest)]
    seen["random"]["longest"] = {"image": max(every, key=_tokens)}
    return {"captions": captions, "seen": seen}


def _tokens(example: dict[str, Any]) -> int:
    return int(example["tokens"])


class _Facts:
    """Sums over examples, each counted by its weight; whole numbers where all weights are 1."""

    def __init__(self) -> None:
        self.targets: float = 0
        self.classes: dict[str, dict[int, np.ndarray]] = {"plain": {}, "image": {}}

    def add(self, shard: Shard, caption: int, weight: int | np.ndarray) -> None:
        """The training examples of a shard that have this caption."""
        number = int(shard.index["train"]["examples"])
        offsets = np.asarray(shard.offsets_of(caption)[: number + 1])
        lengths = np.diff(offsets)
        held = lengths > 0
        weights = np.broadcast_to(weight, lengths.shape)
        self.targets += _targets(shard, offsets, lengths, weights)
        shown = np.zeros(number, dtype=np.int64)
        if shard.num_images is not None:
            shown = np.diff(shard.num_images[: number + 1])
        keys = np.ceil(CLASSES_PER_DOUBLING * np.log2(np.maximum(lengths, 1))).astype(np.int64)
        for pictures in np.unique(shown[held]).tolist():
            chosen = held & (shown == pictures)
            found = self.classes.setdefault(shown_name(pictures), {})
            for key in np.unique(keys[chosen]).tolist():
                mine, share = lengths[chosen & (keys == key)], weights[chosen & (keys == key)]
                sums = np.array([share.sum(), (share * mine).sum(), (share * mine * mine).sum()])
                found[key] = found.get(key, 0) + sums

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        lengths = {
            name: [self.classes[name][key].tolist() for key in sorted(self.classes[name])]
            for name in sorted(self.classes, key=num_shown)
        }
        return {"num_targets": round(self.targets), "lengths": lengths}


def _longest(shard: Shard, caption: int) -> dict[str, Any]:
    """Tokens and place of the longest of these captions, over both splits."""
    lengths = np.diff(shard.offsets_of(caption))
    example = int(lengths.argmax())
    where = f"{shard.name_of(example)}, synthetic caption {caption}"
    return {"tokens": int(lengths[example]), "where": where}


def _targets(shard: Shard, offsets: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> float:
    held = lengths > 0
    if shard.supervised is None:
        return float(lengths.sum() - np.count_nonzero(held))
    column = shard.supervised[int(offsets[0]) : int(offsets[-1])]
    starts = (offsets[:-1] - offsets[0])[held]
    if not len(starts):
        return 0.0
    marked = np.add.reduceat((column > 0).astype(np.int64), starts) - (column[starts] > 0)
    return float((marked * weights[held]).sum())


# Examples that are looked up at once.
BLOCK_EXAMPLES = 2**16


@dataclass(frozen=True)
class Cuts:
    """Examples that do not fit into a row, in ascending order, and how many positions go beyond.

    A conversation is cut behind the last reply that fits, a caption (and a conversation whose first
    reply does not fit) at the row's last position.
    """

    examples: np.ndarray
    excess: np.ndarray

    def before(self, examples: np.ndarray) -> np.ndarray:
        """int64: what is cut off in the examples before each."""
        found: np.ndarray = self._sums[np.searchsorted(self.examples, examples)]
        return found

    @cached_property
    def _sums(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.excess)])

    def of(self, examples: np.ndarray) -> np.ndarray:
        """int64: what is cut off of each."""
        found: np.ndarray = self.before(examples + 1) - self.before(examples)
        return found


class SourceLengths:
    """The lengths of a source's examples in a row, `num_patches` for each picture, none cut."""

    def __init__(self, source: Source, num_patches: int, caption: Caption = "original") -> None:
        self.source, self.num_patches, self.caption = source, num_patches, caption
        # By caption, as `cut_to` finds them.
        self.cuts: dict[int, Cuts] = {}

    @property
    def drawn(self) -> bool:
        """Whether the caption that is seen is drawn for each view."""
        return self.caption == "random"

    @property
    def numbers(self) -> range:
        """The captions that may be seen: 0 the picture's own, n its n-th synthetic one."""
        if self.drawn:
            return range(1, 1 + self.source.most_synthetic)
        return range(1, 2) if self.caption == "synthetic" else range(1)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def total(self) -> int:
        """Sum over all examples; where captions are drawn, as expected."""
        images = self.num_patches * self.source.num_images
        if not self.drawn:
            ends = np.array([len(self)])
            return int(self._before(ends, self.numbers[0])[0])
        off = sum(
            float((cuts.excess / self.source.num_synthetic(cuts.examples)).sum())
            for cuts in self.cuts.values()
        )
        return self.source.mean_tokens + images - round(off)

    def captions(self, examples: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
        """Which caption of each example is seen."""
        if draws is None:
            return np.full(len(examples), self.numbers[0])
        chosen = draws % self.source.num_synthetic(examples).astype(np.uint64)
        return 1 + chosen.astype(np.int64)

    def of(self, examples: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
        """The length of each of these examples."""
        if draws is None:
            number = self.numbers[0]
            found: np.ndarray = self._before(examples + 1, number) - self._before(examples, number)
            return found
        captions = self.captions(examples, draws)
        sizes = self.source.sizes_of(examples, captions)
        found = sizes[:, 0] + self.num_patches * sizes[:, 1] - self.excess(examples, captions)
        return found

    def parts(self, example: int) -> list[int]:
        """The lengths of a document's texts and pictures: `parts_of`."""
        shard, local = self.source.locate(example)
        low, high = shard.offsets[local : local + 2].tolist()
        return parts_of(shard.places_of(local), high - low, self.num_patches)

    def excess(self, examples: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """int64: positions that are cut off of each example with this caption."""
        found = np.zeros(len(examples), dtype=np.int64)
        for caption, cuts in self.cuts.items():
            mine = captions == caption
            found[mine] = cuts.of(examples[mine])
        return found

    def totals(self, chunks: np.ndarray, size: int, draws: np.ndarray | None = None) -> np.ndarray:
        """Summed length of each chunk of `size` examples."""
        found = np.zeros(len(chunks), dtype=np.int64)
        if draws is not None and not self.source.even_synthetic:
            self._follow(chunks, size, draws, found)
            return found
        starts, ends = chunks * size, np.minimum((chunks + 1) * size, len(self))
        captions = self.captions(chunks, draws)
        for caption in np.unique(captions).tolist():
            mine = captions == caption
            found[mine] = self._before(ends[mine], caption) - self._before(starts[mine], caption)
        return found

    def _follow(self, chunks: np.ndarray, size: int, draws: np.ndarray, found: np.ndarray) -> None:
        """The totals where a draw means another caption from picture to picture: one by one."""
        at_once = max(1, BLOCK_EXAMPLES // size)
        for low in range(0, len(chunks), at_once):
            part = slice(low, low + at_once)
            examples = chunks[part, None] * size + np.arange(size)
            held = examples < len(self)
            lengths = np.zeros(examples.shape, dtype=np.int64)
            lengths[held] = self.of(
                examples[held], np.broadcast_to(draws[part, None], examples.shape)[held]
            )
            found[part] = lengths.sum(axis=1)

    def _before(self, examples: np.ndarray, caption: int) -> np.ndarray:
        found = self.source.before(examples, caption)
        before: np.ndarray = found[:, 0] + self.num_patches * found[:, 1]
        if caption in self.cuts:
            before -= self.cuts[caption].before(examples)
        return before


def fit_to_rows(lengths: SourceLengths, rows: Rows, overflow: Overflow) -> None:
    """Cut captions and conversations that are longer than a row; documents go on in other rows.

    Raises ValueError with both numbers for pictures that no row holds and, with the longest record,
    if what is longer is to be refused, as documents are in other rows than filled ones.
    """
    source, row_length = lengths.source, rows.row_length
    if source.num_images:
        # What begins a document may stand in another row than its first picture.
        head = int(source.begin_of_text is not None and source.kind != "interleaved")
        check_picture(source.name, lengths.num_patches + head, row_length)
    if source.kind == "interleaved":
        overflow = "refuse"
        if rows.layout == "filled":
            return
    for caption in lengths.numbers:
        cuts = _cuts(lengths.source, lengths.num_patches, caption, row_length)
        if not len(cuts.examples):
            continue
        if overflow == "refuse":
            raise _too_long(lengths, cuts, caption, row_length)
        lengths.cuts[caption] = cuts


def _cuts(source: Source, num_patches: int, caption: int, row_length: int) -> Cuts:
    found = [Cuts(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for first, shard, mine in source.longer_shards(row_length, num_patches, caption):
        part = _cuts_of_shard(shard, mine, num_patches, caption, row_length)
        found.append(replace(part, examples=part.examples + first))
    return Cuts(*(np.concatenate([getattr(p, n) for p in found]) for n in ("examples", "excess")))


def _cuts_of_shard(
    shard: Shard, mine: slice, num_patches: int, caption: int, row_length: int
) -> Cuts:
    offsets = shard.offsets_of(caption)[mine.start : mine.stop + 1]
    lengths = np.diff(offsets)
    limits = np.full(len(lengths), row_length)
    if shard.num_images is not None:
        limits -= num_patches * np.diff(shard.num_images[mine.start : mine.stop + 1])
    long = np.flatnonzero(lengths > limits)
    if not len(long):
        return Cuts(long, long)
    if shard.pictures is not None:
        excess = [
            _excess_among_pictures(shard, mine.start + one, num_patches, row_length)
            for one in long.tolist()
        ]
        return Cuts(long, np.array(excess))
    starts, kept = offsets[long], limits[long]
    if shard.kind == "instruct":
        ends = offsets[0] + _reply_ends(shard, int(offsets[0]), int(offsets[-1]))
        last = np.searchsorted(ends, starts + kept, side="right") - 1
        whole = np.where(last >= 0, ends[np.maximum(last, 0)] if len(ends) else 0, 0) - starts
        kept = np.where(whole > 0, whole, kept)
    return Cuts(long, lengths[long] - kept)


def _reply_ends(shard: Shard, low: int, high: int) -> np.ndarray:
    """Where replies end among these tokens of a shard, but one that ends them all."""
    assert shard.supervised is not None
    # A token that is learnt has one that is not behind it.
    learnt = shard.supervised[low:high] > 0
    ends: np.ndarray = 1 + np.flatnonzero(learnt[:-1] & ~learnt[1:])
    return ends


def _excess_among_pictures(shard: Shard, example: int, num_patches: int, row_length: int) -> int:
    """Positions of a conversation beyond what fits: whole replies, else whole pictures."""
    low, high = shard.offsets[example : example + 2].tolist()
    # A picture is kept where the separator behind it is.
    before = np.searchsorted(shard.places_of(example), np.arange(high - low + 1))
    positions = np.arange(high - low + 1) + num_patches * before
    ends = positions[_reply_ends(shard, low, high)]
    fitting = ends[ends <= row_length]
    kept = fitting if len(fitting) else positions[positions <= row_length]
    return int(positions[-1] - kept[-1])


def _too_long(lengths: SourceLengths, cuts: Cuts, caption: int, row_length: int) -> ValueError:
    source, captions = lengths.source, np.full(len(cuts.examples), caption)
    sizes = source.sizes_of(cuts.examples, captions)
    positions = sizes[:, 0] + lengths.num_patches * sizes[:, 1]
    worst = int(positions.argmax())
    others = f" (nor do {len(positions) - 1:,} others)" if len(positions) > 1 else ""
    cut = 'cut such records (rows: overflow="cut")'
    if source.kind == "interleaved":
        cut = 'choose filled rows, which documents go on in (rows: layout="filled")'
    return ValueError(
        f"{source.describe(int(cuts.examples[worst]), caption)}: {int(positions[worst]):,} "
        f"positions do not fit into a row of {row_length:,}{others}; raise row_length, {cut}, or "
        "leave them out (midstream prepare --max-tokens)"
    )


# Sources of more examples or pictures are not counted: their hashes and what sorts them take 48
# bytes each.
MOST_PICTURES = 2**25


def picture_views(quota: Quota, source: Source) -> PictureViews | None:
    """The views of a source's pictures in a plan; examples that share a picture's bytes add up.

    None for a source without pictures, and for one of more than MOST_PICTURES examples or
    pictures.
    """
    if (
        quota.divisible
        or not source.num_images
        or max(len(source), source.num_images) > MOST_PICTURES
    ):
        return None
    numbers, hashes = _taken(quota, source)
    order = np.argsort(hashes)
    hashes, numbers = hashes[order], numbers[order]
    del order
    # Where another picture begins.
    begins = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))[: len(hashes)]
    del hashes
    each = np.add.reduceat(numbers, begins, dtype=np.int64) if len(begins) else numbers
    times, how_many = np.unique(each, return_counts=True)
    return PictureViews(
        distinct=len(each),
        views=int(each.sum()),
        times=tuple(zip(times.tolist(), how_many.tolist(), strict=True)),
    )


def _taken(quota: Quota, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Views (uint32 [n], above 0) and hashes (S16 [n]) of the pictures of the examples taken."""
    views = quota.views()
    taken = np.flatnonzero(views)
    most = source.num_images
    numbers, hashes, at = np.zeros(most, np.uint32), np.zeros((most, 16), np.uint8), 0
    for low in range(0, len(taken), BLOCK_EXAMPLES):
        found = source.pictures_of(taken[low : low + BLOCK_EXAMPLES])
        here = slice(at, at + len(found.which))
        numbers[here], hashes[here] = views[found.which[:, 0]], found.hashes
        at = here.stop
    return numbers[:at], hashes[:at].view("S16")[:, 0]
