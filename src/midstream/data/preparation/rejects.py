"""The list of a source's rejects, and the refusal of too many."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

from midstream.data.columns import SHARD_INDEX
from midstream.data.preparation.state import Job
from midstream.data.source_writer import REJECTS, Reject
from midstream.storage import read_json

# How many rejects, and how many broken files, an error lists.
NUM_LISTED = 20


def refuse_rejects(
    job: Job, stopped: Sequence[Reject], *, records: int, max_reject_fraction: float
) -> None:
    """Write all rejects to `rejects.jsonl`: those of the shards and of shards that were stopped.

    Raises ValueError with both numbers, counts by reason and the first rejects if they are more
    than `max_reject_fraction` of the `records` read, or if all are.
    """
    shards = sorted(path for path in job.shards.iterdir() if not path.name.startswith("."))
    counts = Counter(reject.reason for reject in stopped)
    for shard in shards:
        counts.update(read_json(shard / SHARD_INDEX)["rejects"])
    path = job.out / REJECTS
    _write(path, shards, stopped)
    num_rejects = counts.total()
    if num_rejects <= max_reject_fraction * records and num_rejects < max(records, 1):
        return
    reasons = [f"  {times:,} x {reason}" for reason, times in counts.most_common()]
    first = [f"  {reject}" for reject in islice(chain(_read(shards), stopped), NUM_LISTED)]
    under = f" (names start from {job.root})" if job.root else ""
    raise ValueError(
        f"{num_rejects:,} of {records:,} records read for {job.out} are rejects, "
        f"{num_rejects / records:.3%}; the limit is {max_reject_fraction:.3%}, "
        f"{int(max_reject_fraction * records):,} records\n"
        + "\n".join([*reasons, f"the first of them{under}:", *first])
        + f"\nall of them: {path}\n"
        "finished shards stay: mend the data, or raise the limit (--max-rejects, "
        "max_reject_fraction), and run the same again"
    )


def _read(shards: Sequence[Path]) -> Iterator[Reject]:
    for shard in shards:
        with (shard / REJECTS).open(encoding="utf-8") as lines:
            yield from (Reject(**json.loads(line)) for line in lines)


def _write(path: Path, shards: Sequence[Path], stopped: Sequence[Reject]) -> None:
    # Copied file by file: a list of a billion records' rejects need not fit in memory.
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        for shard in shards:
            with (shard / REJECTS).open("rb") as part:
                shutil.copyfileobj(part, stream)
        for reject in stopped:
            line = json.dumps(asdict(reject), ensure_ascii=False) + "\n"
            stream.write(line.encode("utf-8", errors="backslashreplace"))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
