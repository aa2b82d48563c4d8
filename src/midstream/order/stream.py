"""The examples of one source in a seeded order, by index or by token, without a list of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from midstream.config import Sampling

ROUNDS = 6
# With more examples than this, chunks of at least 256 are permuted in place of examples.
MAX_CHUNKS = 2**22
MIN_CHUNK = 256
# Examples that are permuted together: the memory and the time of one look-up.
GROUP_EXAMPLES = 2**14
KEPT_GROUPS = 8


@runtime_checkable
class Lengths(Protocol):
    """The lengths, in positions of a row, of a source's examples; none is below 1.

    Where `drawn`, which caption of an example is seen, and so its length, follows from a number
    that is drawn for each view (`draws`, uint64); elsewhere `draws` is None.
    """

    @property
    def drawn(self) -> bool:
        """Whether lengths follow from draws."""

    def __len__(self) -> int:
        """Examples."""

    @property
    def total(self) -> int:
        """Sum over all examples; where drawn, as expected."""

    def captions(self, examples: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        """int64: which caption of each is seen (0: its own, n: its n-th synthetic one)."""

    def of(self, examples: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        """int64: the length of each of these examples."""

    def totals(self, chunks: np.ndarray, size: int, draws: np.ndarray | None) -> np.ndarray:
        """int64: for each c the summed length of examples c * size to (c + 1) * size or the end.

        A draw stands for all examples of its chunk.
        """

    def parts(self, example: int) -> list[int]:
        """The lengths of the parts that an example which is longer than a row is cut between; only
        a part that is longer than a row is cut itself."""


class ArrayLengths:
    """Lengths held in an array."""

    drawn = False

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self._before = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Sum over all examples."""
        return int(self._before[-1])

    def captions(self, examples: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
        """The only one of each."""
        return np.zeros(len(examples), dtype=np.int64)

    def of(self, examples: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
        """The length of each of these examples."""
        found: np.ndarray = self.lengths[examples]
        return found

    def totals(self, chunks: np.ndarray, size: int, draws: np.ndarray | None = None) -> np.ndarray:
        """Summed length of each chunk of `size` examples."""
        ends = np.minimum((chunks + 1) * size, len(self))
        found: np.ndarray = self._before[ends] - self._before[chunks * size]
        return found

    def parts(self, example: int) -> list[int]:
        """One."""
        return [int(self.lengths[example])]


def parts_of(places: Sequence[int], num_tokens: int, num_patches: int) -> list[int]:
    """The lengths of a document's parts: texts, and pictures with their separator."""
    parts, at = list[int](), 0
    for place in places:
        # Before each picture its text, which there may be none of.
        parts += [place - at, num_patches + 1]
        at = place + 1
    return [part for part in [*parts, num_tokens - at] if part]


def pieces_of(parts: Sequence[int], row_length: int) -> list[int]:
    """The lengths of the fewest pieces, each at most a row, that parts are cut into; one that is
    longer than a row begins in what is left of a piece."""
    pieces = [0]
    for part in parts:
        if part > row_length:
            part -= (room := row_length - pieces[-1])
            pieces[-1] += room
            whole, part = divmod(part, row_length)
            pieces += [row_length] * whole
        if pieces[-1] + part > row_length:
            pieces.append(0)
        pieces[-1] += part
    return [piece for piece in pieces if piece]


@dataclass(frozen=True)
class Stretch:
    """Consecutive examples of a stream: numbers, first position of each that counts, lengths, and
    which caption is seen.

    `starts` is above 0 and `lengths` below the example's own only where a stretch that was asked
    for by tokens begins or ends inside an example.
    """

    examples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    captions: np.ndarray

    def part(self, items: slice) -> "Stretch":
        """Some of them."""
        return Stretch(*(getattr(self, field.name)[items] for field in fields(self)))


class Kept:
    """What it keeps of look-ups does not travel: a worker process makes that anew."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _CACHES}


_CACHES = ("_kept", "_orders")


class Stream(Kept):
    """The seeded order of a source's examples; index p and token t are looked up in constant time.

    Chunks of consecutive examples (of one, up to four million examples) are ordered by a keyed
    permutation, or drawn; the examples of neighbouring chunks, a group, are then permuted together.
    Only the sizes of groups are stored: a billion examples need a few megabytes. Each time a chunk
    is read, a number is drawn for it; where a picture has several captions, that chooses one.

    sampling="permutation": passes over all examples, each in an order of its own.
    sampling="replacement": chunks drawn from the whole source each time, without an end.
    pool=N: of the source the first N examples of the first pass alone, whose numbers are held; that
    pass is theirs, the next ones are orders of the N. A pool is contained in every larger one.
    """

    def __init__(
        self,
        lengths: Lengths,
        key: str,
        sampling: Sampling = "permutation",
        pool: int | None = None,
    ) -> None:
        if not len(lengths):
            raise ValueError(f"{key}: the source holds no example")
        self.lengths, self.key, self.sampling = lengths, key, sampling
        size = -(-len(lengths) // MAX_CHUNKS)
        self.chunk = 1 if size == 1 else -(-size // MIN_CHUNK) * MIN_CHUNK
        self.num_chunks = -(-len(lengths) // self.chunk)
        self._pool: np.ndarray | None = None
        if pool is not None:
            assert pool <= len(lengths), "config.check_pool refuses it"
            self._pool = Stream(lengths, key).places(0, pool).examples
            self.chunk, self.num_chunks = 1, pool
        self.chunks_of_group = max(1, GROUP_EXAMPLES // self.chunk)
        self._groups_of_pass = -(-self.num_chunks // self.chunks_of_group)
        # Examples and tokens before each group that was needed so far.
        self._examples = np.zeros(1, dtype=np.int64)
        self._tokens = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        """Examples of one pass."""
        return len(self.lengths) if self._pool is None else len(self._pool)

    @cached_property
    def total(self) -> int:
        """Tokens of one pass; where captions are drawn, as expected."""
        if self._pool is None:
            return self.lengths.total
        if self.lengths.drawn:
            return round(self.lengths.total * len(self._pool) / len(self.lengths))
        return int(self.lengths.of(self._pool, None).sum())

    def reach(self, tokens: int, examples: int | None = None) -> bool:
        """Learn the sizes of all groups up to a token, so that later look-ups cost the same.

        False if the first `examples` examples hold fewer tokens.
        """
        while self._tokens[-1] <= tokens and (examples is None or self._examples[-1] < examples):
            self._extend()
        return examples is None or self.tokens_before(examples) >= tokens

    def count_before(self, twice_tokens: int) -> int:
        """Examples whose middle lies before token `twice_tokens` / 2 of the stream."""
        group = self._group_at(twice_tokens // 2)
        lengths = self._kept(group).lengths
        ends = np.cumsum(lengths)
        middles = 2 * (int(self._tokens[group]) + ends) - lengths
        return int(self._examples[group]) + int(np.searchsorted(middles, twice_tokens))

    def tokens_before(self, place: int) -> int:
        """Tokens in the first `place` examples."""
        group = self._group_of(place)
        inside = self._kept(group).lengths[: place - int(self._examples[group])]
        return int(self._tokens[group]) + int(inside.sum())

    def cut_near(self, token: int, size: int) -> int:
        """The nearest token where an example begins, or in a longer one a multiple of `size`."""
        group = self._group_at(token)
        lengths = self._kept(group).lengths
        ends = int(self._tokens[group]) + np.cumsum(lengths)
        item = int(np.searchsorted(ends, token, side="right"))
        begin = int(ends[item] - lengths[item])
        low = begin + (token - begin) // size * size
        high = min(low + size, int(ends[item]))
        return low if token - low < high - token else high

    def places(self, low: int, high: int) -> Stretch:
        """Whole examples at places `low` to `high`."""
        if high <= low:
            return _EMPTY
        parts = []
        for group in range(self._group_of(low), self._group_of(high - 1) + 1):
            first = int(self._examples[group])
            parts.append(self._kept(group).part(slice(max(0, low - first), high - first)))
        return _joined(parts)

    def tokens(self, low: int, high: int) -> Stretch:
        """Tokens `low` to `high`: the examples that hold them, cut at both ends."""
        if high <= low:
            return _EMPTY
        parts = []
        for group in range(self._group_at(low), self._group_at(high - 1) + 1):
            found = self._kept(group)
            ends = int(self._tokens[group]) + np.cumsum(found.lengths)
            begins = ends - found.lengths
            first = int(np.searchsorted(ends, low, side="right"))
            mine = slice(first, int(np.searchsorted(begins, high)))
            cut = np.maximum(low - begins[mine], 0)
            kept = np.minimum(ends[mine], high) - np.maximum(begins[mine], low)
            parts.append(replace(found.part(mine), starts=cut, lengths=kept))
        return _joined(parts)

    def _group_of(self, place: int) -> int:
        while self._examples[-1] <= place:
            self._extend()
        return int(np.searchsorted(self._examples, place, side="right")) - 1

    def _group_at(self, token: int) -> int:
        while self._tokens[-1] <= token:
            self._extend()
        return int(np.searchsorted(self._tokens, token, side="right")) - 1

    def _extend(self) -> None:
        # As many groups again as are known: their number is never known beforehand.
        known = len(self._examples) - 1
        groups = np.arange(known, known + min(max(1, known), 4096))
        chunks = [self._chunks(int(group)) for group in groups]
        flat = np.concatenate(chunks)
        first = np.cumsum([0, *(len(part) for part in chunks[:-1])])
        drawn = None
        if self.lengths.drawn:
            read = zip(groups.tolist(), chunks, strict=True)
            drawn = np.concatenate([self._draws(group, part) for group, part in read])
        sizes = np.minimum(self.chunk, len(self.lengths) - flat * self.chunk)
        tokens = np.add.reduceat(self.lengths.totals(flat, self.chunk, drawn), first)
        examples = np.add.reduceat(sizes, first)
        self._examples = np.append(self._examples, self._examples[-1] + np.cumsum(examples))
        self._tokens = np.append(self._tokens, self._tokens[-1] + np.cumsum(tokens))

    def _chunks(self, group: int) -> np.ndarray:
        """The chunks of a group, in their order."""
        if self.sampling == "replacement":
            low = group * self.chunks_of_group
            places = np.arange(low, low + self.chunks_of_group)
            chunks = drawn_from(places, self.num_chunks, self.key)
        else:
            epoch, number = divmod(group, self._groups_of_pass)
            low = number * self.chunks_of_group
            chunks = np.arange(low, min(low + self.chunks_of_group, self.num_chunks))
            # A pool is held in the order of its first pass.
            if epoch or self._pool is None:
                chunks = permuted(chunks, self.num_chunks, f"{self.key}/pass {epoch}")
        return chunks if self._pool is None else self._pool[chunks]

    def _draws(self, group: int, chunks: np.ndarray) -> np.ndarray:
        """uint64: what is drawn for each chunk of a group, another number each time it is read."""
        if self.sampling == "replacement":
            low = group * self.chunks_of_group
            return draws(np.arange(low, low + self.chunks_of_group), f"{self.key}/captions")
        return draws(chunks, f"{self.key}/captions/pass {group // self._groups_of_pass}")

    @cached_property
    def _kept(self) -> Callable[[int], Stretch]:
        return lru_cache(KEPT_GROUPS)(self._load)

    def _load(self, group: int) -> Stretch:
        chunks, drawn = self._chunks(group), None
        examples = (chunks[:, None] * self.chunk + np.arange(self.chunk)).reshape(-1)
        held = examples < len(self.lengths)
        examples = examples[held]
        if self.lengths.drawn:
            drawn = np.repeat(self._draws(group, chunks), self.chunk)[held]
        if self.chunk > 1:
            order = permuted(np.arange(len(examples)), len(examples), f"{self.key}/group {group}")
            examples, drawn = examples[order], None if drawn is None else drawn[order]
        return Stretch(
            examples=examples,
            starts=np.zeros_like(examples),
            lengths=self.lengths.of(examples, drawn),
            captions=self.lengths.captions(examples, drawn),
        )


_EMPTY = Stretch(*(np.zeros(0, dtype=np.int64) for _ in range(4)))


def _joined(parts: list[Stretch]) -> Stretch:
    if len(parts) == 1:
        return parts[0]
    return Stretch(
        *(np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(Stretch))
    )


def permuted(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a keyed permutation of `range(size)` sends `indices` (int64, any shape).

    A Feistel network on the smallest even number of bits that covers `size`; results outside are
    sent through it again until they fall inside. Random access, no memory.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    seed = hashlib.sha256(key.encode()).digest()
    keys = np.frombuffer(seed + hashlib.sha256(seed).digest(), dtype=np.uint64)[:ROUNDS]
    result = _network(indices.astype(np.uint64).reshape(-1), keys, half)
    outside = result >= size
    while outside.any():
        result[outside] = _network(result[outside], keys, half)
        outside = result >= size
    return result.astype(np.int64).reshape(indices.shape)


def _network(values: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    # Of numbers of 2 * half bits.
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for round_key in keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    mixed: np.ndarray = (left << shift) | right
    return mixed


def drawn_from(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """For each index a draw from `range(size)`, independent of the others (int64)."""
    drawn: np.ndarray = (draws(indices, key) % np.uint64(size)).astype(np.int64)
    return drawn


def draws(indices: np.ndarray, key: str) -> np.ndarray:
    """For each index a number of 64 random bits, independent of the others (uint64)."""
    seed = np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    with np.errstate(over="ignore"):
        spread = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    return _mix(spread)


def _mix(values: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64: every input bit reaches every output bit.
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
