"""Seconds of `midstream plan` over a world whose text lies in many files, whole processes.

The first plan reads and hashes every file; later ones read what was kept of them. The study is
`docs/examples/own_data.py`, whose world is a folder as users have it. Printed are seconds of the
clock and of processor time, the fastest of the rounds, and beside them what planning the same study
over one file takes.
"""

import argparse
import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from midstream.config import PocketWorld
from midstream.core.digests import SETTLED_SECONDS
from midstream.worlds.pocket_world import write_pocket_world

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "own_data.py"


def world(folder: Path, files: int) -> Path:
    """A small pocket world with so many files of text of one line each."""
    small = PocketWorld(
        num_documents=10, num_captions=20, num_conversations=10, num_questions=8, num_text_items=8
    )
    with contextlib.redirect_stdout(io.StringIO()):
        write_pocket_world(small, folder)
    (text,) = (folder / "text").iterdir()
    for number in range(files - 1):
        inside = text / f"{number // 1000:03d}"
        inside.mkdir(exist_ok=True)
        (inside / f"{number:06d}.jsonl").write_text(f'{{"text": "The number {number}."}}\n')
    return folder


def plan(folder: Path, store: Path) -> tuple[float, float]:
    """Seconds of the clock and of processor time of one process that plans."""
    command = [sys.executable, "-m", "midstream", "plan", f"{EXAMPLE}:study"]
    command += ["--set", f"data={folder}", "--store", str(store)]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    before, start = used.ru_utime + used.ru_stime, time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, used.ru_utime + used.ru_stime - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        one, many = world(root / "one", 1), world(root / "many", options.files)
        # A file that has only just been written might be written again within one tick.
        time.sleep(SETTLED_SECONDS + 1)
        first = plan(many, root / "store")
        plan(one, root / "store")
        turns = [
            [plan(folder, root / "store") for folder in (many, one)] for _ in range(options.rounds)
        ]
        kept, alone = (min(turn[side] for turn in turns) for side in (0, 1))
    print(f"{options.files:,} files, seconds of the clock and of processor time")
    for name, (clock, used) in (("first", first), ("kept", kept), ("one file", alone)):
        print(f"  {name:<10}{clock:8.2f}{used:8.2f}")


if __name__ == "__main__":
    main()
