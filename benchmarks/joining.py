"""Joining captions with pictures by uid: made uids and captions of made lengths, no archives.

As many pictures as captions, of which a tenth has no partner; captions lie in another order. The
runs are those that reading archives leaves; timed are writing them, joining their partitions and
putting the captions into the pictures' order. Prints uids a second of the clock and of processor
time, what was lost, and the largest process.
"""

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from midstream.data.uids import (
    CAPTIONS,
    PICTURES,
    UID,
    count_up,
    in_groups,
    match_partition,
    matched_rows,
    notes_of,
    partition_of,
    write_run,
)

# As 16 archives of 10,000 samples make a run, and a partition.
RUN, PARTITION = 160_000, 160_000


def uids_of(numbers: np.ndarray) -> pa.Array:
    """Sixteen bytes of each number."""
    halves = np.stack([numbers * np.uint64(0x9E3779B97F4A7C15), numbers], axis=1)
    buffer = pa.py_buffer(halves.tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(UID, len(numbers), [None, buffer])


def write_runs(folder: Path, total: int, number: int) -> None:
    """A run of pictures and one of captions."""
    size = min(RUN, total - number * RUN)
    numbers = np.arange(number * RUN, number * RUN + size, dtype=np.uint64)
    partitions = -(-total // PARTITION)
    uids = uids_of(numbers)
    places = [np.full(size, number, np.int32), np.arange(size, dtype=np.int32)]
    table = pa.table([uids, pa.array(numbers), *places], schema=PICTURES)
    order, sizes = in_groups(partition_of(uids, partitions), partitions)
    write_run(folder / f"pictures/{number:06d}.arrow", table.take(pa.array(order)), sizes, {})
    numbers = (numbers * np.uint64(7919)) % np.uint64(total) + np.uint64(total // 10)
    uids, lengths = uids_of(numbers), np.random.default_rng(number).integers(200, 450, size)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    text = pa.py_buffer(b"x" * int(ends[-1]))
    texts = pa.BinaryArray.from_buffers(pa.binary(), size, [None, pa.py_buffer(ends), text])
    table = pa.table([uids, pa.array(numbers), texts], schema=CAPTIONS)
    order, sizes = in_groups(partition_of(uids, partitions), partitions)
    write_run(folder / f"captions/{number:06d}.arrow", table.take(pa.array(order)), sizes, {})


def match(folder: Path, parts: int, number: int) -> None:
    """Join a partition."""
    runs = {side: sorted((folder / side).iterdir()) for side in ("pictures", "captions")}
    match_partition(folder / f"matched/{number:06d}.arrow", number, parts, runs)


def gather(folder: Path, part: int) -> int:
    """How many pictures of a part have captions, read in the pictures' order."""
    return len(matched_rows(sorted((folder / "matched").iterdir()), part))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uids", type=int, default=500_000, help="on each side")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    total, parts, partitions = options.uids, -(-options.uids // RUN), -(-options.uids // PARTITION)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = (
            ("runs", partial(write_runs, folder, total), parts),
            ("partitions", partial(match, folder, parts), partitions),
            ("captions in order", partial(gather, folder), parts),
        )
        clock = cpu = 0.0
        for what, function, number in steps:
            started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            with ProcessPoolExecutor(options.workers, get_context("fork")) as pool:
                made = list(pool.map(function, range(number)))
            took, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            clock, cpu = clock + took, cpu + spent
            print(f"{what:<20} {took:8.1f} s, {spent:8.1f} s of processor time")
        lost = count_up([notes_of(path) for path in (folder / "matched").iterdir()])
        assert sum(number or 0 for number in made) == lost["joined"]
        print(
            f"{total:,} uids on each side: {total / clock:,.0f} a second with {options.workers} "
            f"workers, {total / cpu:,.0f} a second of processor time\n"
            f"the largest process {after.ru_maxrss / 2**20:.2f} GiB; "
            + ", ".join(f"{why} {number:,}" for why, number in lost.items() if number)
        )


if __name__ == "__main__":
    main()
