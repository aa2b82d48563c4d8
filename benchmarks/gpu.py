"""One command for a card: is what it computes right, how fast is it, what does it wait for.

    python benchmarks/gpu.py --minutes 10

In order of worth: the tests marked `gpu`; text at 79m and 1b, and captions and text at 1b behind an
encoder of SigLIP so400m's shape, eager and compiled (1b in float8 too, where torchao is), by
micro-batch: tokens a second, utilisation of the maker's peak and of a measured product, memory
beside the plan's, how often the host waits for the device; the encoder and its feature store;
saving; attention's kernels. The steps are those of `midstream profile`, over the generated world.

Each part is a process with a time limit. What is done lies in `--out` and is not done again; what
the time did not suffice for is left to the next call. `results.json` has all of it, `table.txt` the
table, `best.json` what was fastest by scale, as the `measured.json` of the package has it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from midstream.core.storage import read_json, write_json

ROOT = Path(__file__).parents[1]
TESTS = "correctness"
# Seconds that each part has at most, in order of worth.
LIMITS = {
    TESTS: 300,
    "79m-text-eager": 120,
    "79m-text-compiled": 150,
    "1b-text-eager": 180,
    "1b-text-compiled": 200,
    "1b-image-text-eager": 240,
    "1b-image-text-compiled": 240,
    "1b-text-float8": 150,
    "encoder": 120,
    "saving-79m": 60,
    "saving-1b": 180,
    "attention": 90,
}
# Less is not worth starting a process for.
LEAST_SECONDS = 20
CARD_SECONDS = 60
GRACE_SECONDS = 10


@dataclass(frozen=True)
class Ended:
    """How a part's process ended: what it said last, and whether its time was over."""

    returncode: int
    said: str = ""
    late: bool = False


# A part's name, the folder of the results, whether it is a dry run, and its seconds.
Start = Callable[[str, Path, bool, float], Ended]


def child(name: str, out: Path, dry_run: bool, seconds: float) -> Ended:
    """Run a part in a process of its own; all that it has started ends with it."""
    if name == TESTS:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += [f"--junitxml={out / (TESTS + '.xml')}", *_marked_files()]
        command += ["--gpu-stand-in"] if dry_run else []
    else:
        command = [sys.executable, __file__, "--out", str(out), "--compute", name]
        command += ["--dry-run"] if dry_run else []
    log = out / f"{name}.log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            _end(process)
        except BaseException:
            _end(process)
            raise
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Ended(process.returncode, lines[-1] if lines else "", late)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a part and what it has started; pytest first writes down how far it came."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _marked_files() -> list[str]:
    """The files that hold tests marked `gpu`: to collect all of them takes longer than to run."""
    # Those of whole stages first.
    found = sorted((ROOT / "tests").rglob("test_*.py"), reverse=True)
    return [str(path) for path in found if "mark.gpu" in path.read_text(encoding="utf-8")]


def main(arguments: Sequence[str] | None = None, start: Start = child) -> int:
    """Run what is left of the parts, print the table; 1 where a part failed, 2 without a card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="results")
    parser.add_argument("--dry-run", action="store_true", help="the same way on the CPU, small")
    parser.add_argument("--compute", metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.compute:
        return _compute(options.compute, out, options.dry_run)
    console = Console(width=180)
    until = time.monotonic() + 60 * options.minutes
    try:
        card = _card(out, options.dry_run, start)
    except ValueError as error:
        console.print(f"[red]{error}[/red]")
        return 2
    if card["shared"]:
        console.print(f"[yellow]{card['shared']}[/yellow]")
    for name in options.parts:
        _run(name, out, options.dry_run, until, start, console)
    results = gathered(out)
    write_json(out / "results.json", results)
    write_json(out / "best.json", best(results))
    with (out / "table.txt").open("w") as written:
        for one in (console, Console(file=written, width=180)):
            show(results, one)
    failed = [name for name in options.parts if results["parts"].get(name, {}).get("failed")]
    return 1 if failed else 0


def _compute(name: str, out: Path, dry_run: bool) -> int:
    if name == "card":
        from gpu_card import find_card, no_card

        try:
            found = no_card() if dry_run else find_card()
        except ValueError as error:
            write_json(out / "card.json", {"error": str(error)})
            return 0
        told = {"shared": found.shared(), "vendor_tflops": found.vendor_tflops}
        write_json(out / "card.json", vars(found) | told)
        return 0
    from gpu_parts import compute

    try:
        compute(name, out, dry_run=dry_run)
    except ValueError as error:
        print(error, flush=True)
        return 1
    return 0


def _card(out: Path, dry_run: bool, start: Start) -> dict[str, Any]:
    """The card; the folder's results must be of the same one. Raises ValueError with the remedy."""
    path, same = out / "card.json", ("name", "driver", "torch", "cuda")
    before = read_json(path) if path.is_file() else {}
    ended = start("card", out, dry_run, CARD_SECONDS)
    if ended.returncode:
        raise ValueError(f"the look at the card failed: {ended.said}; {out / 'card.log'} has it")
    found: dict[str, Any] = read_json(path)
    if "error" in found:
        if before:
            write_json(path, before)
        raise ValueError(found["error"])
    if before and any(before.get(key) != found[key] for key in same):
        write_json(path, before)
        raise ValueError(
            f"{out} holds results of {_title(before)}, this is {_title(found)}; give another --out"
        )
    return found


def _run(name: str, out: Path, dry_run: bool, until: float, start: Start, console: Console) -> None:
    """Run a part where it is not done and there is time; note how it ended."""
    path = out / f"{name}.json"
    before: dict[str, Any] = read_json(path) if path.is_file() else {}
    if before.get("done"):
        console.print(f"{name}: done before")
        return
    left = min(LIMITS[name], until - time.monotonic())
    if left < LEAST_SECONDS:
        console.print(f"{name}: no time left; the same command goes on with it")
        return
    began = time.monotonic()
    ended = start(name, out, dry_run, left)
    seconds = time.monotonic() - began
    if name == TESTS:
        write_json(path, read_tests(out / f"{TESTS}.xml", ended))
    values: dict[str, Any] = read_json(path) if path.is_file() else {}
    values["seconds"] = values.get("seconds", 0.0) + seconds
    values.pop("failed", None)
    if ended.late:
        values["failed"] = f"not done in {left:.0f} s; the same command goes on with it"
    elif ended.returncode:
        values["failed"] = f"{ended.said} ({out / (name + '.log')})"
    write_json(path, values)
    console.print(
        f"{name}: {values.get('failed') or values.get('left_out') or 'done'} ({seconds:.0f} s)",
        markup=False,
    )


def read_tests(path: Path, ended: Ended) -> dict[str, Any]:
    """What pytest's report says: how many passed, which failed, and why others were skipped."""
    if not path.is_file():
        return {}
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed, skipped = [], {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (why := case.find("skipped")) is not None:
            skipped[name] = why.get("message", "")
    passed = len(cases) - len(failed) - len(skipped)
    done = passed > 0 and not failed and not ended.returncode
    return {"passed": passed, "failures": failed, "skipped": skipped, "done": done}


def gathered(out: Path) -> dict[str, Any]:
    """The results of all parts in a folder, with the card that they are of."""
    parts = {name: read_json(out / f"{name}.json") for name in LIMITS if _is_there(out, name)}
    return {"card": read_json(out / "card.json"), "parts": parts}


def _is_there(out: Path, name: str) -> bool:
    return (out / f"{name}.json").is_file()


def best(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was fastest by kind of stage, as `work/measured.json` of the package has it.

    float8 changes what is learnt, and is left to a person to choose.
    """
    found: dict[str, dict[str, Any]] = {}
    for part in results["parts"].values():
        for row in part.get("rows", []):
            key = json.dumps(part["kind"])
            if row.get("precision") == "float8":
                continue
            if row["fits"] and row["tokens_per_second"] > _speed(found.get(key)):
                found[key] = {
                    "device": results["card"]["name"],
                    **part["kind"],
                    "compile": "blocks" if row["compiled"] else "off",
                    "micro_batch_rows": row["micro_rows"],
                    "tokens_per_second": round(row["tokens_per_second"]),
                    "torch": results["card"]["torch"],
                }
    return list(found.values())


def _speed(entry: dict[str, Any] | None) -> float:
    return entry["tokens_per_second"] if entry else 0.0


def _title(card: dict[str, Any]) -> str:
    return f"{card['name']}, driver {card['driver']}, torch {card['torch']}, CUDA {card['cuda']}"


def show(results: dict[str, Any], console: Console) -> None:
    """The table, and a line for each of the other parts."""
    card, parts = results["card"], results["parts"]
    shown = Table(title=_title(card) + (" (shared)" if card["shared"] else ""))
    shown.add_column("stage")
    columns = ["rows", "tokens/s", "TFLOP/s", "of the maker's peak", "of a product", "GiB"]
    for heading in [*columns, "planned GiB", "waits a step"]:
        shown.add_column(heading, justify="right")
    for name, part in parts.items():
        for row in sorted(part.get("rows", []), key=lambda one: one["micro_rows"]):
            shown.add_row(name, str(row["micro_rows"]), *_cells(row, card))
    console.print(shown)
    for name, part in parts.items():
        if "rows" not in part:
            values = {k: v for k, v in part.items() if k not in ("done", "seconds", "failed")}
            if name == TESTS and "skipped" in values:
                values["skipped"] = len(values["skipped"])
            told = "; ".join(f"{key} {_short(value)}" for key, value in values.items())
            console.print(f"{name}: {told}", markup=False)
        if part.get("failed"):
            console.print(f"{name}: {part['failed']}", markup=False)


def _cells(row: dict[str, Any], card: dict[str, Any]) -> list[str]:
    planned = f"{row['planned_bytes'] / 2**30:.1f}"
    if not row["fits"]:
        return ["does not fit", "", "", "", "", planned, ""]
    flops, product = row["model_flops_per_second"], row["product_flops_per_second"]
    vendor = card["vendor_tflops"]
    return [
        f"{row['tokens_per_second']:,.0f}",
        f"{flops / 1e12:,.2f}",
        f"{flops / (vendor * 1e12):.3f}" if vendor else "unknown",
        f"{flops / product:.3f}" if product else "",
        f"{row['peak_memory_bytes'] / 2**30:.1f}",
        planned,
        "" if row["syncs"] is None else str(sum(row["syncs"].values())),
    ]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "none"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
