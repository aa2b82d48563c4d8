"""A plan over a billion captions and ten billion documents, whose lengths are computed on demand.

The paper's image-text stage: 28.8 billion tokens in rows of 1,024, 729 patches a picture. Printed
are the time to the first row, that of rows anywhere in the plan, and the memory of the process.
"""

import argparse
import resource
import statistics
import time

import numpy as np

from midstream.config import Mixture, Rows, Share
from midstream.order.mixture import Supply
from midstream.order.plan import make_plan

PATCHES = 729
# Lengths repeat a drawn table, turned by another amount in each block of its size.
TABLE = 256


class DrawnLengths:
    """Lengths of `count` examples, none of them stored: a table, turned by a hash of the block."""

    drawn = False

    def __init__(self, count: int, table: np.ndarray) -> None:
        self.count, self.table = count, table.astype(np.int64)

    def __len__(self) -> int:
        return self.count

    @property
    def total(self) -> int:
        """Sum over all examples."""
        blocks, rest = divmod(self.count, TABLE)
        return blocks * int(self.table.sum()) + int(self.of(np.arange(rest) + blocks * TABLE).sum())

    def captions(self, examples: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        """The only one of each."""
        return np.zeros(len(examples), dtype=np.int64)

    def of(self, examples: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
        """The length of each of these examples."""
        turned = (examples // TABLE) * 2654435761 + examples
        found: np.ndarray = self.table[turned % TABLE]
        return found

    def totals(self, chunks: np.ndarray, size: int, draws: np.ndarray | None = None) -> np.ndarray:
        """Summed length of each chunk of `size` examples."""
        assert size % TABLE == 0
        full = np.full(len(chunks), size // TABLE * int(self.table.sum()))
        for index in np.flatnonzero((chunks + 1) * size > self.count):
            rest = np.arange(chunks[index] * size, self.count)
            full[index] = int(self.of(rest).sum())
        return full

    def parts(self, example: int) -> list[int]:
        """One."""
        return [int(length) for length in self.of(np.array([example]))]


def drawn(count: int, median: float, spread: float, low: int, high: int) -> DrawnLengths:
    """Log-normal lengths between `low` and `high`."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(np.log(median), spread, TABLE))
    return DrawnLengths(count, np.clip(lengths.round(), low, high))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=28_795_904_000)
    parser.add_argument("--captions", type=int, default=1_000_000_000)
    parser.add_argument("--documents", type=int, default=10_000_000_000)
    parser.add_argument("--image-share", type=float, default=0.1)
    parser.add_argument("--layout", default="filled", choices=["filled", "padded"])
    parser.add_argument("--rows", type=int, default=100, help="rows asked for at each depth")
    options = parser.parse_args()
    captions = drawn(options.captions, PATCHES + 16, 0.01, PATCHES + 4, PATCHES + 200)
    documents = drawn(options.documents, 600, 1.0, 20, 8192)
    supplies = [Supply("captions", captions, False), Supply("web", documents, True)]
    shares = (
        Share(source="captions", share=options.image_share),
        Share(source="web", share=1 - options.image_share),
    )
    budget = Mixture(total_tokens=options.tokens, shares=shares)
    rows = Rows(row_length=1024, batch_rows=256, layout=options.layout)
    before = time.perf_counter()
    plan = make_plan(supplies, budget, rows, 0)
    plan.layout.row(0)
    print(f"{len(captions):,} captions and {len(documents):,} documents of lengths drawn on demand")
    print(f"{options.layout} plan of {plan.seen_tokens:,} tokens in {len(plan):,} rows")
    print(f"first row after {time.perf_counter() - before:.2f} s")
    held = sum(part.length for part in plan.layout.row(0))
    padding = 1 - plan.seen_tokens / (len(plan) * 1024)
    print(f"row 0 holds {held} of 1024 positions; padding over all rows {padding:.2%}")
    random = np.random.default_rng(1)
    for name, low, high in (("first", 0.0, 0.01), ("middle", 0.5, 0.51), ("last", 0.99, 1.0)):
        asked = random.integers(int(low * len(plan)), int(high * len(plan)), options.rows)
        times = []
        for index in asked:
            before = time.perf_counter()
            plan.layout.row(int(index))
            times.append(1000 * (time.perf_counter() - before))
        print(
            f"any row of the {name} hundredth: median {statistics.median(times):.1f} ms, "
            f"slowest of {options.rows} {max(times):.1f} ms"
        )
    for name, supply, quota in zip(("captions", "web"), supplies, plan.quotas, strict=True):
        print(
            f"{name}: planned {quota.planned_tokens:,} tokens, realised {quota.tokens:,}; "
            f"{quota.tokens / supply.lengths.total:.5f} passes"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
