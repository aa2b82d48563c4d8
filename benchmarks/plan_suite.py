"""Seconds and memory of `midstream plan` for a whole suite, as one process from its start."""

import argparse
import resource
import subprocess
import sys
import time


def main() -> None:
    """Plan it, and print how long that took and what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", default="paper.suite")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--store", default="runs/of-nobody")
    options = parser.parse_args()
    settings = options.settings or ["scale=1b"]
    command = [sys.executable, "-m", "midstream", "plan", options.study, "--store", options.store]
    command += [part for setting in settings for part in ("--set", setting)]
    program = (
        "import sys\nfrom midstream.cli.app import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as reason:\n    assert not reason.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    command[1:3] = ["-c", program]
    before = time.perf_counter()
    ended = subprocess.run(command)
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{seconds:.2f} s, {peak:.0f} MiB, torch not imported")
    raise SystemExit(ended.returncode)


if __name__ == "__main__":
    main()
