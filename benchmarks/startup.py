"""How long the command line takes: `midstream --help`, and `midstream plan` of 300 lines.

Each command is started afresh a few times; the store is an empty temporary folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

COMPLETIONS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
NUM_SEEDS = 50


def seconds_of(arguments: list[str], repeats: int) -> list[float]:
    """Wall seconds of each run of the command; raises CalledProcessError if one fails."""
    found = []
    for _ in range(repeats):
        before = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "midstream.cli.app", *arguments], check=True, capture_output=True
        )
        found.append(time.perf_counter() - before)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    study = [
        "pocket.when_images_arrive",
        *("--set", f"completions={json.dumps(COMPLETIONS)}"),
        *("--set", f"seeds={json.dumps(list(range(NUM_SEEDS)))}"),
    ]
    with tempfile.TemporaryDirectory() as store:
        commands = {
            "midstream --help": ["--help"],
            f"midstream plan, {len(COMPLETIONS) * NUM_SEEDS} lines": [
                *("plan", *study, "--store", store)
            ],
        }
        for name, arguments in commands.items():
            found = seconds_of(arguments, options.repeats)
            print(
                f"{name:<32} median {statistics.median(found):.2f} s, "
                f"fastest {min(found):.2f} s of {len(found)}"
            )


if __name__ == "__main__":
    main()
