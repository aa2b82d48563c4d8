"""What `midstream plan` predicts against what torch counts: FLOPs and peak memory of real stages.

Each stage is trained in a process of its own: FLOPs over all its steps, as torch's counter has
them; memory over a step with all its moments, as torch's allocator has it (on a CPU from the
profiler's record, on a GPU `max_memory_allocated`). The process's resident memory is printed
beside it: it also holds what the heap keeps between allocations.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = {"small": (256, 4), "wide": (512, 4), "deep": (384, 8)}
KINDS = ("text", "image", "trained", "patches", "chat")


def main() -> None:
    """Run each stage in a process of its own and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["small", "wide"], choices=SIZES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--micro-rows", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("SIZE", "KIND", "STORE"), help="internal")
    options = parser.parse_args()
    if options.child:
        from plan_reality_stage import measure

        print(json.dumps(measure(options)))
        return
    print(f"{'stage':<16}{'FLOPs':>12}{'ratio':>8}{'memory':>12}{'ratio':>8}{'resident':>12}")
    with tempfile.TemporaryDirectory(prefix="midstream-reality-") as store:
        for size in options.sizes:
            for kind in options.kinds:
                found = _child(sys.argv[1:], size, kind, store)
                print(
                    f"{size + ' ' + kind:<16}{found['flops']:>12.4g}{found['flops_ratio']:>8.4f}"
                    f"{found['memory'] / 2**20:>8.0f} MiB{found['memory_ratio']:>8.3f}"
                    f"{found['resident'] / 2**20:>8.0f} MiB",
                    flush=True,
                )


def _child(arguments: list[str], size: str, kind: str, store: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), *arguments, "--child", size, kind, store]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
