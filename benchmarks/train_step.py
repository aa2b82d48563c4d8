"""Midstream's training step against a plain loop, OpenLM, nanoVLM and transformers' models.

    python benchmarks/train_step.py --threads 2 --openlm CHECKOUT --nanovlm CHECKOUT

Each side is a process of its own that lives as long as the comparison, and they take turns: one
step each a round; the first two rounds are not counted. Midstream's is set up as its workers are,
the others as torch is by default, with as many threads. On a CPU a rate is counted a CPU second,
since cores are shared; on a GPU a wall second. The share of the peak is the model FLOPs (6 N a
token without the input embedding, and attention) over what a product of two matrices of 1,024 or
2,048 reaches, measured in each round. A ratio is the median over the rounds of the side's rate by
that of the fastest other one in the same round. Memory is the peak of the side's process, and what
of it is the step's: beyond the process, its weights and their moments. It runs without any peer as
well. On a GPU: `--device cuda`; `--dry-run` goes through that path without one: shapes, kernels
chosen, the compiled graph of a block on the meta device.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from midstream.config import Machine
from midstream.model.attention import make_mask
from midstream.model.decoder import Decoder, Rotary
from midstream.model.vlm import VLM
from midstream.train.parallel import Place, product_seconds, set_up
from sides import (
    GPU_WORKS,
    WORKS,
    Side,
    Work,
    batch_of,
    drawn,
    encode_of,
    makers,
    model_of,
    our_step,
    side,
)

# -------------------------------------------------------------------------------- measuring


def peak_flops(place: Place) -> float:
    """FLOPs a CPU second (on a GPU a second) of the better of two matrix products."""
    if place.device.type == "cuda":
        return 2 * 8192**3 / product_seconds(place.device, place.precision, 8192)
    best = 0.0
    for size in (1024, 2048):
        left = torch.ones((size, size))
        for _ in range(3):
            before = time.process_time()
            left @ left
            best = max(best, 2 * size**3 / (time.process_time() - before))
    return best


def measure(side: Side, rounds: int, place: Place) -> list[float]:
    """Steps of one side on a GPU; returns the peak of each round."""
    peaks = []
    for number in range(rounds + 2):
        peak = peak_flops(place)
        before = time.perf_counter()
        side.step()
        torch.cuda.synchronize()
        if number >= 2:
            side.seconds.append(time.perf_counter() - before)
            peaks.append(peak)
    return peaks


def held_mib(field_name: str) -> float:
    """VmRSS or VmHWM of this process. Not getrusage's: that begins at what it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field_name}:")[1].split()[0]) / 1024


def serve_side(key: str, options: argparse.Namespace) -> None:
    """The process of one side: a step for each line it gets, and a line of JSON for each step."""
    work = WORKS[options.work[0]]
    place = Place(torch.device("cpu"))
    if key.startswith("midstream"):
        place = set_up(Machine(threads=options.threads, device="cpu"))
    torch.set_num_threads(options.threads)
    before = held_mib("VmRSS")
    made = makers(work, options, place)[key]()
    told = {"name": made.name, "tokens": made.tokens, "images": made.images, "flops": made.flops}
    print(json.dumps(told), flush=True)
    for _ in sys.stdin:
        wall, seconds = time.perf_counter(), time.process_time()
        made.step()
        seconds, wall = time.process_time() - seconds, time.perf_counter() - wall
        # Weights and two moments in float32.
        state = 12 * work.decoder.num_parameters / 2**20
        peak = held_mib("VmHWM")
        told = {"seconds": seconds, "wall": wall, "peak": peak, "step": peak - before - state}
        print(json.dumps(told), flush=True)


class Remote:
    """A side in its process, and what was measured of it."""

    def __init__(self, name: str, key: str, options: argparse.Namespace) -> None:
        self.ours, self.key = key.startswith("midstream"), key
        command = [sys.executable, __file__, "--serve-side", key, "--work", name]
        command += ["--threads", str(options.threads)]
        for option in ("openlm", "nanovlm"):
            if getattr(options, option):
                command += [f"--{option}", str(getattr(options, option))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        told = self._read()
        self.name, self.tokens = told["name"], told["tokens"]
        self.images, self.flops = told["images"], told["flops"]
        self.steps: list[dict[str, float]] = []

    def step(self) -> dict[str, float]:
        """Take a step; what it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Let the process go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def all(self, key: str) -> list[float]:
        """What was measured in each counted round."""
        return [step[key] for step in self.steps]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.key} has ended")
        found: dict[str, Any] = json.loads(line)
        return found


def spread(values: list[float]) -> str:
    """The median and the quarters around it."""
    if len(values) < 3:
        return f"{statistics.median(values):,.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:,.2f} ({low:,.2f} to {high:,.2f})"


def table(name: str, work: Work, options: argparse.Namespace, out: Console) -> None:
    """Measure one work and print it."""
    place = Place(torch.device("cpu"))
    sides = [Remote(name, key, options) for key in makers(work, options, place)]
    peaks = []
    for number in range(options.rounds + 2):
        peak = peak_flops(place)
        steps = [side.step() for side in sides]
        if number >= 2:
            peaks.append(peak)
            for side, step in zip(sides, steps, strict=True):
                side.steps.append(step)
    for side in sides:
        side.end()
    others = [side for side in sides if not side.ours and side.key != "plain"] or sides[:1]
    fastest = min(others, key=lambda side: statistics.median(side.all("seconds")))
    shown = Table(title=f"{name}: {work.rows} x {work.length:,} positions")
    shown.add_column("side")
    columns = ["useful tokens a CPU second", "images a CPU second", "tokens a wall second"]
    columns += ["share of peak", f"tokens by {fastest.name}'s", "images by theirs"]
    for heading in [*columns, "process, MiB", "step, MiB"]:
        shown.add_column(heading, justify="right")
    for side in sides:
        seconds = side.all("seconds")
        share = [side.flops / s / p for s, p in zip(seconds, peaks, strict=True)]
        slower = [b / a for a, b in zip(seconds, fastest.all("seconds"), strict=True)]
        images = [ratio * side.images / max(fastest.images, 1) for ratio in slower]
        shown.add_row(
            side.name,
            f"{side.tokens / statistics.median(seconds):,.0f}",
            f"{side.images / statistics.median(seconds):.3f}" if side.images else "",
            f"{side.tokens / statistics.median(side.all('wall')):,.0f}",
            spread(share),
            spread([ratio * side.tokens / fastest.tokens for ratio in slower]),
            spread(images) if side.images else "",
            f"{max(side.all('peak')):,.0f}",
            f"{max(side.all('step')):,.0f}",
        )
    out.print(shown)
    gflops = statistics.median(peaks) / 1e9
    out.print(f"matrix product {gflops:,.0f} GFLOP a CPU second; {options.rounds} rounds\n")


def gpu_table(options: argparse.Namespace, place: Place, out: Console) -> None:
    """Each work on a GPU by each choice: compiled or not, and how its gain over the first."""
    for name, work in GPU_WORKS.items():
        row = drawn(work, place.device)
        # A tenth of the tokens are patches.
        images = None
        if work.encoder is not None:
            images = max(1, round(0.1 * work.rows * work.length / work.encoder.num_patches))
        batch = batch_of(work, row, images=images)
        shown = Table(title=f"{name}: {work.rows} x {work.length:,}, {place.precision}")
        for heading in ("choice", "useful tokens/s", "TFLOP/s", "share of peak", "GiB"):
            shown.add_column(heading)
        for compiled in (False, True):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            model = model_of(work, place, compiled=compiled)
            step = our_step(model, batch, encode_of(work, place), place)
            one = side(work, name, step, batch, looks=True)
            peaks = measure(one, options.rounds, place)
            seconds, peak = statistics.median(one.seconds), statistics.median(peaks)
            shown.add_row(
                "compiled blocks" if compiled else "eager",
                f"{one.tokens / seconds:,.0f}",
                f"{one.flops / seconds / 1e12:,.1f}",
                f"{one.flops / seconds / peak:.3f}",
                f"{torch.cuda.max_memory_allocated() / 2**30:.1f}",
            )
            del model, step, one
        out.print(shown)
        out.print(f"matrix product {peak / 1e12:,.0f} TFLOP/s\n")


def dry_run(out: Console) -> None:
    """The way of a GPU without one: shapes, kernels, a block's graph in one piece, FLOPs."""
    for name, work in GPU_WORKS.items():
        with torch.device("meta"):
            model = VLM(work.model)
        assert isinstance(model.decoder, Decoder)
        size = (work.rows, work.length, work.decoder.hidden_size)
        hidden = torch.empty(size, device="meta", dtype=torch.bfloat16, requires_grad=True)
        position_ids = torch.arange(work.length, device="meta").expand(work.rows, -1)
        graphs: list[int] = []

        def count(graph: torch.fx.GraphModule, _inputs: object) -> object:
            graphs.append(len(list(graph.graph.nodes)))  # noqa: B023
            return graph.forward

        block = model.decoder.layers[0].to(torch.bfloat16)
        compiled = torch.compile(block, backend=count, fullgraph=True)
        rotary = Rotary(work.decoder, position_ids, torch.bfloat16)
        compiled(hidden, rotary, None, None).sum().backward()
        segments = torch.zeros((1, work.length), dtype=torch.long)
        segments[:, work.length // 2 :] = 1
        mask = make_mask(segments, None, "segments", kind="blocks")
        out.print(
            f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters on meta; a block "
            f"is {len(graphs)} graph of {graphs[0]} nodes, forward and backward, over {size}; "
            f"rows of one text: causal SDPA; packed rows: {type(mask).__name__}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", choices=sorted(WORKS), action="append")
    parser.add_argument("--openlm", type=Path, help="a checkout of OpenLM")
    parser.add_argument("--nanovlm", type=Path, help="a checkout of nanoVLM")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dry-run", action="store_true", help="the GPU's way without a GPU")
    parser.add_argument("--serve-side", metavar="KEY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = Console(width=180)
    if options.dry_run:
        dry_run(out)
        return
    if options.serve_side:
        serve_side(options.serve_side, options)
        return
    torch.set_num_threads(options.threads)
    if options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available()):
        place = set_up(Machine(threads=options.threads, device="cuda"))
        out.print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
        gpu_table(options, place, out)
        return
    out.print(f"torch {torch.__version__}, {options.threads} threads")
    for name in options.work or WORKS:
        table(name, WORKS[name], options, out)


if __name__ == "__main__":
    main()
