"""A frozen encoder's outputs on disk, by the hash of the picture, whatever source it came from.

The store's name stands for the encoder's weights and configuration; the caller sees to it.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from midstream.config import PretrainedEncoder
from midstream.config.model import FILL_BATCH, picture_bytes
from midstream.core.identity import file_sha256
from midstream.core.storage import (
    MANIFEST,
    CorruptError,
    new_folder,
    read_json,
    remove_leftovers,
    write_json,
)
from midstream.data.images import Encode, ErrorMeter, encode_raw, pack, pixel_batches, unpack
from midstream.data.sources import Pictures, Source, Which, content_hash


class HashIndex:
    """Places of sixteen-byte hashes: 24 bytes each, in a few sorted runs that grow by merging."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(places) for _, places in self._runs)

    def add(self, hashes: np.ndarray, places: np.ndarray) -> None:
        """Note where the hashes (uint8 [n, 16]) lie (int64 [n], 0 or more)."""
        run = _keys(hashes), places
        # A run is merged into one at most twice its size: each hash moves a few times in all.
        while self._runs and len(self._runs[-1][1]) <= 2 * len(run[1]):
            before = self._runs.pop()
            run = np.concatenate([before[0], run[0]]), np.concatenate([before[1], run[1]])
        order = np.argsort(run[0], kind="stable")
        self._runs.append((run[0][order], run[1][order]))

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """int64 [n]: the place of each hash, -1 where it is not there."""
        wanted, found = _keys(hashes), np.full(len(hashes), -1, np.int64)
        for keys, places in self._runs:
            if len(keys):
                at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
                found = np.where(keys[at] == wanted, places[at], found)
        return found


def _keys(hashes: np.ndarray) -> np.ndarray:
    # Byte strings sort fast; numpy drops their trailing zeros, which at one length loses nothing.
    return np.ascontiguousarray(hashes, np.uint8).reshape(-1, 16).view("S16")[:, 0]


# A part holds at most this much; a fill that is killed loses the part that it was writing.
PART_BYTES = 256 * 2**20
# Pictures are dealt by their hashes into so many lots; whoever holds a lot's lock computes it.
NUM_LOTS = 64
# Of more pictures than this a process takes an eighth at a time, so that one that comes later has
# something to compute.
MOST_TAKEN = 1024
# Examples whose hashes are looked up at once.
BLOCK = 2**16
# Parts that stay mapped in one process.
OPEN_PARTS = 64
# The rounding error is measured on up to so many pictures, the first of a fill.
MEASURED_PICTURES = 64
MEASURED = "measured.json"
LOCKS = "locks"
# Who waits for other processes to finish their parts says so this often.
WAIT_SECONDS = 5.0

Progress = Callable[[float, str], None]
ShouldStop = Callable[[], bool]


class FeatureStore:
    """Features of pictures under one encoder, read by memory map; safe to pickle and to share.

    `<folder>/part-<lot>-<digest>/` holds features.bin (uint8 [n, bytes of a picture],
    `images.pack`), hashes.npy (uint8 [n, 16], `sources.content_hash`) and sums.npy (uint64 [n],
    XXH3 of each row of features.bin); `measured.json` the rounding errors on some of the pictures
    (`ErrorMeter`); `locks/` a lock a lot, held by whoever computes pictures of it.
    """

    def __init__(
        self, folder: Path, config: PretrainedEncoder, part_bytes: int = PART_BYTES
    ) -> None:
        self.folder, self.config, self.part_bytes = folder, config, part_bytes
        self._parts: list[Path] = []
        self._known: set[str] = set()
        self._index = HashIndex()
        self._maps = lru_cache(OPEN_PARTS)(self._open)

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path, PretrainedEncoder, int]]:
        # Maps are opened anew in a worker process; pickled, they would be copied whole.
        return FeatureStore, (self.folder, self.config, self.part_bytes)

    def __len__(self) -> int:
        """Pictures whose features are there."""
        self._refresh()
        return len(self._index)

    def fill(
        self,
        source: Source,
        examples: Iterator[np.ndarray] | None,
        encode: Encode,
        progress: Progress,
        should_stop: ShouldStop = lambda: False,
        share: tuple[int, int] = (0, 1),
        workers: int = 0,
    ) -> bool:
        """Compute and store what is missing of the pictures of these examples, of all without.

        `examples` are arrays of example numbers; examples without a picture are passed over.
        Processes that fill at the same time compute different pictures: each takes lots that no
        other holds, an eighth of many pictures at a time, and waits for the others' at the end.
        With `share` (k, n) it is the k-th of n that are asked for the same examples, and takes an
        n-th at most. `workers` threads decode pictures ahead. `progress` gets the part done (0
        where `examples` are given) and may raise: finished parts stay. `should_stop` is asked
        before every batch that is to be computed and while other processes are waited for; what was
        computed until then is stored. Returns False if it said yes, True once all is there. Raises
        ValueError that names the record for a picture that cannot be read or whose features are not
        finite.
        """
        (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
        size = max(1, self.part_bytes // picture_bytes(self.config))
        mine, num_processes = share
        total = source.num_images if examples is None else None
        waiting: dict[bytes, Which] = {}
        num_seen = num_computed = 0
        meter = ErrorMeter(self.config)

        def tell(note: str) -> None:
            done = 0.0 if total is None else (num_seen - len(waiting)) / max(1, total)
            progress(max(0.0, done), f"features of {source.name}: {note}")

        def computed(pictures: list[Which]) -> Iterator[Tensor]:
            for at, pixels in enumerate(pixel_batches(source, pictures, self.config, workers)):
                tell(f"{num_computed + at * FILL_BATCH:,} computed")
                features = encode_raw(encode, pixels, self.config)
                if meter.pictures < MEASURED_PICTURES:
                    meter.add(features)
                yield features

        def write() -> bool:
            nonlocal num_computed
            taken = max(MOST_TAKEN, len(waiting) // 8)
            wanted = min(size, taken, -(-len(waiting) // num_processes))
            with self._lots(waiting, wanted, NUM_LOTS * mine // num_processes) as lots:
                if not lots:
                    tell("waiting for other processes that compute them")
                    return not should_stop()
                self._clear(lots)
                keys = [key for key in waiting if _lot(key) in lots][:size]
                chosen = {key: waiting.pop(key) for key in keys}
                number, stopped = self._write_part(lots[0], source, chosen, computed, should_stop)
            num_computed += number
            if meter.pictures >= MEASURED_PICTURES:
                self._keep_errors(meter)
            self._drop_stored(waiting)
            return not stopped

        for which, hashes in _shown(source, examples):
            num_seen += len(which)
            self._refresh()
            missing = self._index.find(hashes) < 0
            for (example, number), row in zip(
                which[missing].tolist(), hashes[missing], strict=True
            ):
                waiting.setdefault(row.tobytes(), (example, number))
            while len(waiting) >= size * num_processes:
                if not write():
                    return False
        while waiting:
            if not write():
                return False
        if meter.pictures:
            self._keep_errors(meter)
        return True

    def read_many(
        self, pictures: Sequence[tuple[Source, int, int]]
    ) -> Float[Tensor, "images patches width"]:
        """Features of pictures (source, example, number among its pictures), in their order, as
        `unpack` gives them.

        Raises ValueError that names the record if its features are not stored or it has no such
        picture, CorruptError if the bytes in the store changed.
        """
        packed = np.empty((len(pictures), picture_bytes(self.config)), np.uint8)
        for row, (source, example, picture) in zip(packed, pictures, strict=True):
            part, at = self._find(source, example, picture)
            features, sums = self._maps(part)
            row[:] = features[at]
            if xxhash.xxh3_64_intdigest(row.data) != int(sums[at]):
                raise CorruptError(
                    f"{self._parts[part] / 'features.bin'}, picture {at}, differs from its "
                    f"checksum; delete {self._parts[part]} and run again"
                )
        return unpack(torch.from_numpy(packed), self.config)

    def _find(self, source: Source, example: int, picture: int) -> tuple[int, int]:
        wanted = source.pictures_of(np.array([example])).hashes[picture : picture + 1]
        if not len(wanted):
            raise ValueError(f"{source.describe(example)} shows no picture and has no features")
        place = int(self._index.find(wanted)[0])
        if place < 0:
            self._refresh()
            place = int(self._index.find(wanted)[0])
        if place < 0:
            raise ValueError(
                f"{source.describe(example)}: none of the {len(self._index):,} pictures in "
                f"{self.folder} is this one; fill the store with it first"
            )
        return place >> 32, place & (2**32 - 1)

    def _refresh(self) -> None:
        """Take in the parts that were finished since the last look."""
        new = [p for p in sorted(self.folder.glob("part-*")) if p.name not in self._known]
        found = [self._hashes(path) for path in new]
        if not found:
            return
        starts = np.arange(len(self._parts), len(self._parts) + len(new), dtype=np.int64) << 32
        places = [
            start + np.arange(len(hashes)) for start, hashes in zip(starts, found, strict=True)
        ]
        self._index.add(np.concatenate(found), np.concatenate(places))
        self._parts += new
        self._known |= {path.name for path in new}

    def _hashes(self, part: Path) -> np.ndarray:
        """uint8 [n, 16] of a part whose files are as long as they were written."""
        remedy = f"delete {part} and run again"
        if not (part / MANIFEST).is_file():
            raise CorruptError(f"{part} has no {MANIFEST}: it was never finished; {remedy}")
        for name, entry in read_json(part / MANIFEST).items():
            file = part / name
            have = file.stat().st_size if file.is_file() else 0
            if have != entry["bytes"]:
                raise CorruptError(f"{file} has {have:,} of {entry['bytes']:,} bytes; {remedy}")
            # The features themselves are checked picture by picture when they are read.
            if name != "features.bin" and file_sha256(file) != entry["sha256"]:
                raise CorruptError(f"{file} differs from its manifest; {remedy}")
        hashes: np.ndarray = np.load(part / "hashes.npy")
        have = (part / "features.bin").stat().st_size
        if have != len(hashes) * picture_bytes(self.config):
            raise CorruptError(
                f"{part} holds {have:,} bytes, {len(hashes):,} pictures of this encoder take "
                f"{len(hashes) * picture_bytes(self.config):,}; {remedy}"
            )
        return hashes

    def _open(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        path, shape = self._parts[part], (-1, picture_bytes(self.config))
        features = np.memmap(path / "features.bin", np.uint8, mode="r").reshape(shape)
        return features, np.load(path / "sums.npy")

    @contextmanager
    def _lots(
        self, waiting: Mapping[bytes, Which], num_pictures: int, first: int
    ) -> Iterator[list[int]]:
        """Hold lots with so many of the waiting pictures, or as many as are free, in the block.

        They are looked for from lot `first` on. None after WAIT_SECONDS in which all of them were
        other processes'.
        """
        counts = Counter(_lot(key) for key in waiting)
        order = [lot for at in range(NUM_LOTS) if (lot := (first + at) % NUM_LOTS) in counts]
        held: list[int] = []
        with ExitStack() as locks:

            def take(lot: int, seconds: float) -> None:
                lock = FileLock(self.folder / LOCKS / f"lot-{lot:02}.lock")
                with suppress(Timeout):
                    locks.enter_context(lock.acquire(timeout=seconds))
                    held.append(lot)

            for lot in order:
                if sum(counts[one] for one in held) < num_pictures:
                    take(lot, 0.0)
            if not held:
                take(order[0], WAIT_SECONDS)
            self._refresh()
            yield held

    def _clear(self, lots: Sequence[int]) -> None:
        """Delete what was left in the middle by fills of these lots, and by those that came before
        there were lots."""
        (self.folder / "fill.lock").unlink(missing_ok=True)
        for left in self.folder.glob(".part-*"):
            lot, dash, _ = left.name.removeprefix(".part-").partition("-")
            if not dash or int(lot) in lots:
                shutil.rmtree(left, ignore_errors=True)  # others may clear it as well

    def _drop_stored(self, waiting: dict[bytes, Which]) -> None:
        """Take out what is stored by now."""
        every = np.frombuffer(b"".join(waiting), np.uint8).reshape(-1, 16)
        for row in every[self._index.find(every) >= 0]:
            del waiting[row.tobytes()]

    def _keep_errors(self, meter: ErrorMeter) -> None:
        """Write what rounding changes, where nobody has."""
        with FileLock(self.folder / LOCKS / "measured.lock"):
            remove_leftovers(self.folder, MEASURED)
            if not (self.folder / MEASURED).is_file():
                write_json(self.folder / MEASURED, meter.errors())

    def _write_part(
        self,
        lot: int,
        source: Source,
        chosen: Mapping[bytes, Which],
        computed: Callable[[list[Which]], Iterator[Tensor]],
        should_stop: ShouldStop,
    ) -> tuple[int, bool]:
        """Store what is missing of these, up to a stop, as one whole part; how many, and whether
        it was stopped."""
        every = np.frombuffer(b"".join(chosen), np.uint8).reshape(-1, 16)
        missing = self._index.find(every) < 0
        hashes = every[missing]
        pictures = [one for one, here in zip(chosen.values(), missing, strict=True) if here]
        if not pictures:
            return 0, False
        if stopped := should_stop():
            return 0, True
        sums: list[int] = []
        name = f"part-{lot:02}-{content_hash(hashes.tobytes()).hex()}"
        with new_folder(self.folder / name) as temporary:
            with (temporary / "features.bin").open("wb") as stream:
                for features in computed(pictures):
                    packed = pack(features, self.config).cpu()
                    finite = unpack(packed, self.config).isfinite().flatten(1).all(1)
                    for row, fine in zip(packed.numpy(), finite.tolist(), strict=True):
                        if not fine:
                            where = source.describe(pictures[len(sums)][0])
                            raise ValueError(
                                f"{where}: the encoder's features "
                                "are not finite; look at its weights and at this picture"
                            )
                        sums.append(xxhash.xxh3_64_intdigest(row.data))
                        stream.write(row.data)
                    stopped = len(sums) < len(pictures) and should_stop()
                    if stopped:
                        break
            np.save(temporary / "hashes.npy", hashes[: len(sums)])
            np.save(temporary / "sums.npy", np.array(sums, np.uint64))
        self._refresh()
        return len(sums), stopped


@dataclass(frozen=True)
class StoredImages:
    """Features of a row's pictures, read from a store that was filled with them."""

    store: FeatureStore
    sources: Mapping[str, Source]
    names: tuple[str, ...]

    def __call__(self, images: np.ndarray) -> Float[Tensor, "images patches width"]:
        """Features of the pictures that `Row.images` names, in their order."""
        named = images.tolist()
        return self.store.read_many(
            [(self.sources[self.names[source]], example, at) for source, example, at in named]
        )


def unchanged(images: Float[Tensor, "images ..."]) -> Float[Tensor, "images ..."]:
    """Stored features are what the model takes; it widens them where it uses them."""
    return images


def _lot(key: bytes) -> int:
    # Hashes are spread evenly.
    return key[0] % NUM_LOTS


def _shown(source: Source, examples: Iterator[np.ndarray] | None) -> Iterator[Pictures]:
    """The pictures of the examples, of all without, in blocks."""
    if examples is None:
        starts = range(0, len(source), BLOCK)
        examples = (np.arange(low, min(low + BLOCK, len(source))) for low in starts)
    yield from map(source.pictures_of, examples)
