"""The parts of `gpu.py` that compute: each runs in a process of its own and keeps what it has
measured as soon as it has it, so that one that is ended goes on where it stood."""

import gc
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_sizes import DRY, FULL, Part
from midstream.config.model import encoder_flops
from midstream.core.storage import read_json, remove_folder
from midstream.core.tokens import TokenCount
from midstream.cost.cost import work_of
from midstream.cost.taken import Setting, memory
from midstream.data.feature_store import FeatureStore
from midstream.data.images import encode_fixed
from midstream.model.attention import attend, make_mask, move_mask
from midstream.study.stages import Continue, Stage, Trained
from midstream.train.checkpoint import Progress, Saver
from midstream.train.loop import Job
from midstream.train.parallel import Clock, data_workers, forget_peak, peak_memory_bytes
from midstream.work import run_stage
from midstream.work.open_model import on_device, open_encoder, open_sources
from midstream.work.profile_stage import WARM_STEPS, Steps, measured
from midstream.work.run_stage import StageRunner


def prepared(runner: StageRunner, stage: Stage) -> StageRunner:
    """The same, once all that the stage needs is done."""
    for parent in stage.parents:
        if not runner.ledger.is_done(parent):
            prepared(runner, parent).run(parent)
    return runner


# ----------------------------------------------------------------------------------- training


def training(
    part: Part, scale: str, *, pictures: bool, compiled: bool, precision: str = "auto"
) -> None:
    """Tokens a second of a stage by the rows of its micro-batches, as `midstream profile` has them.

    Eager steps begin at what the plan says that fits; compiled ones, each of which takes a while
    to be compiled, at what was best of those.
    """
    stage = part.stage(scale, pictures=pictures)
    chosen = {"compile": "blocks" if compiled else "off"}
    # On the way without a card it is whatever the CPU has.
    chosen |= {"precision": precision} if part.device == "cuda" else {}
    try:
        runner = part.runner(**chosen)
    except ValueError as error:
        if precision != "float8":
            raise
        part.keep(left_out=str(error))
        return
    part.values.pop("left_out", None)
    prepared(runner, stage)
    most = stage.training.rows.batch_rows
    planned = runner.machine_for(stage).micro_batch_rows or most
    start = _best_of(part.out / f"{part.name.rsplit('-', 1)[0]}-eager.json") or planned
    job = runner.job(stage, part.out / "unused")
    rows: list[dict[str, Any]] = part.values.get("rows", [])

    def speed(micro: int) -> float | None:
        known = [row for row in rows if row["micro_rows"] == micro]
        if not known:
            known = [_measured_row(part, job, runner, stage, micro, compiled)]
            rows.extend(known)
            part.keep(rows=rows, planned_micro_rows=planned, kind=_kind(stage))
        return known[0]["tokens_per_second"] if known[0]["fits"] else None

    search(speed, start=min(start, most), most=most, least=start if compiled else 1)
    part.keep(done=True)


def search(
    speed: Callable[[int], float | None], *, start: int, most: int, least: int = 1
) -> dict[int, float | None]:
    """Speeds by micro-batch; None for one that does not fit.

    `start` and its double, then halves, down to `least` or to one that is slower than its double,
    and on below `least` while none has fitted.
    """
    micro = 2 ** (start.bit_length() - 1)
    speeds = {micro: speed(micro)}
    if 2 * micro <= most:
        speeds[2 * micro] = speed(2 * micro)
    while micro > least or (micro > 1 and speeds[micro] is None):
        before, micro = speeds[micro], micro // 2
        now = speeds[micro] = speed(micro)
        if before is not None and now is not None and now < before:
            break
    return speeds


def _best_of(path: Path) -> int | None:
    rows = read_json(path).get("rows", []) if path.is_file() else []
    fitting = [row for row in rows if row["fits"]]
    best = max(fitting, key=lambda row: row["tokens_per_second"], default=None)
    return None if best is None else int(best["micro_rows"])


def _kind(stage: Trained) -> dict[str, Any]:
    decoder = stage.model.decoder
    return {
        "decoder_parameters": decoder.num_parameters,
        "row_length": stage.training.rows.row_length,
        "pictures": isinstance(stage, Continue),
    }


def _measured_row(
    part: Part, job: Job, runner: StageRunner, stage: Trained, micro: int, compiled: bool
) -> dict[str, Any]:
    """Some steps with micro-batches of so many rows, or that they do not fit."""
    runner.machine = runner.machine.model_copy(update={"micro_batch_rows": micro})
    row: dict[str, Any] = {"micro_rows": micro, "compiled": compiled, "fits": True}
    row["precision"] = runner.place.precision_name
    work = work_of(stage, runner.ledger)
    assert work is not None, "its sources are prepared"
    row["planned_bytes"] = float(memory(stage, work, Setting(1, micro)).total)
    steps = None
    if compiled:
        # Else the second size is compiled for any size, which no run of one size has.
        torch._dynamo.reset()
    forget_peak(runner.device)
    try:
        before = time.perf_counter()
        steps = Steps(job, runner, stage)
        for _ in range(WARM_STEPS):
            steps.take(Clock(runner.device))
        steps.settle()
        row["warm_seconds"] = time.perf_counter() - before
        seconds, meters = measured(steps, part.size.steps)
        row["seconds_a_step"] = seconds / part.size.steps
        row |= {name: meters[name] for name in ("model_flops_per_second", "time_shares")}
        row["tokens_per_second"] = meters["useful_tokens_per_second"]
        row["images_per_second"] = meters["images_per_second"]
        row["product_flops_per_second"] = runner.place.peak_flops
        row["peak_memory_bytes"] = peak_memory_bytes(runner.device)
        row["syncs"] = count_syncs(runner.device, partial(steps.take, Clock(runner.device)))
    except torch.OutOfMemoryError as error:
        row |= {"fits": False, "reason": str(error).split(". ")[0]}
        print(f"{part.name}: micro-batches of {micro} rows do not fit: {row['reason']}", flush=True)
    # What did not fit is held by the optimiser and by gradients.
    del steps
    job.model.zero_grad(set_to_none=True)
    gc.collect()
    if runner.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def count_syncs(device: torch.device, take: Callable[[], object]) -> dict[str, int] | None:
    """How often the host waits for the device while `take` runs, by the line that asks for it;
    None on a CPU, which waits for nobody."""
    if device.type != "cuda":
        take()
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
    return dict(Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in told))


# ------------------------------------------------------------------------ encoder, saves, kernels


def encoder(part: Part) -> None:
    """Pictures a second: looked at out of memory, and stored out of files."""
    stage = part.size.encoder
    runner = part.runner()
    prepared(runner, stage)
    if not runner.ledger.is_done(stage):
        runner.run(stage)
    config, device = stage.encoder, runner.device
    encode = on_device(open_encoder(runner.ledger, stage).to(device).eval())
    chance = torch.Generator().manual_seed(0)
    shape = (part.size.pictures, 3, config.image_size, config.image_size)
    pixels = torch.rand(shape, generator=chance) * 2 - 1
    for _ in range(2):  # the first warms up
        before = time.perf_counter()
        encode_fixed(encode, pixels, config)
        _wait(device)
        seconds = time.perf_counter() - before
    per_second = len(pixels) / seconds
    flops = encoder_flops(config) * per_second
    peak = runner.place.peak_flops
    part.keep(images_per_second=per_second, flops_per_second=flops, product_flops=peak)
    source = open_sources(stage.data, ["pictures"], runner.ledger)["pictures"]
    folder = part.out / "features"
    if folder.exists():
        remove_folder(folder)
    before = time.perf_counter()
    FeatureStore(folder, config).fill(
        source,
        None,
        encode,
        lambda _done, _note: None,
        workers=data_workers(runner.machine, runner.device),
    )
    seconds = time.perf_counter() - before
    stored = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    part.keep(
        stored_images=source.num_images, stored_per_second=source.num_images / seconds,
        stored_bytes_per_second=stored / seconds, done=True,
    )  # fmt: skip


def saving(part: Part, scale: str) -> None:
    """Seconds to save weights and moments: how long training waits, and until all is on disk."""
    stage = part.stage(scale, pictures=False)
    # Weights and two moments in float32, the folder before not yet removed.
    need, free = 24 * stage.model.decoder.num_parameters, shutil.disk_usage(part.out).free
    if free < need:
        raise ValueError(
            f"{part.out} has {free / 2**30:.0f} GiB free and saving {scale} wants "
            f"{need / 2**30:.0f}; give an --out on a larger disk"
        )
    runner = prepared(part.runner(compile="off", micro_batch_rows=1), stage)
    job = runner.job(stage, part.out / "unused")
    steps = Steps(job, runner, stage)
    steps.take(Clock(runner.device))
    folder = part.out / "checkpoint"
    for name in ("foreground", "background"):
        if folder.exists():
            remove_folder(folder)
        saver = Saver(runner.place, background=name == "background")
        _wait(runner.device)
        before = time.perf_counter()
        saver.start(folder, job.model, steps.optimizer, Progress(1, 1, 1, 1e-3, TokenCount()))
        waited = time.perf_counter() - before
        saver.settle()
        whole = time.perf_counter() - before
        part.keep(**{f"{name}_wait_seconds": waited, f"{name}_seconds": whole})
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    remove_folder(folder)
    part.keep(bytes=written, done=True)


def attention(part: Part) -> None:
    """Forward and backward of one block's attention by each kernel that torch has, with and without
    deterministic algorithms, and by FlexAttention over packed rows."""
    runner = part.runner(compile="off")
    device, (num_rows, num_heads, channels) = runner.device, part.size.heads
    length = part.size.rows.row_length
    shape = (num_rows, num_heads, length, channels)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    segments = torch.arange(length).div(length // 4, rounding_mode="floor")
    made = make_mask(segments.expand(num_rows, -1), None, "segments", kind="blocks")
    # It has no backward pass on a CPU.
    mask = move_mask(made, device) if device.type == "cuda" else None
    found: dict[str, Any] = {}
    backends = {one: getattr(SDPBackend, one) for one in ("FLASH_ATTENTION", "CUDNN_ATTENTION")}
    backends |= {one: getattr(SDPBackend, one) for one in ("EFFICIENT_ATTENTION", "MATH")}
    for certain in (True, False):
        torch.use_deterministic_algorithms(certain)
        for name, backend in backends.items():
            with sdpa_kernel([backend]):
                took = _seconds(lambda: attend(query, key, value, None), device)
            found[f"{name.lower()}{', deterministic' if certain else ''}"] = took
        if mask is not None:
            took = _seconds(lambda: attend(query, key, value, mask), device)
            found[f"flex, 4 segments{', deterministic' if certain else ''}"] = took
    torch.use_deterministic_algorithms(True)
    part.keep(shape=list(shape), kernel_seconds=found, done=True)


def _seconds(compute: Callable[[], torch.Tensor], device: torch.device) -> float | str:
    """The best of three, or why it cannot be computed."""
    best = float("inf")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(4):
                _wait(device)
                before = time.perf_counter()
                compute().sum().backward()  # type: ignore[no-untyped-call]
                _wait(device)
                best = min(best, time.perf_counter() - before)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trained(scale: str, pictures: bool, compiled: bool) -> Callable[[Part], None]:
    return partial(training, scale=scale, pictures=pictures, compiled=compiled)


# In order of their worth.
PARTS: dict[str, Callable[[Part], None]] = {
    "79m-text-eager": _trained("79m", False, False),
    "79m-text-compiled": _trained("79m", False, True),
    "1b-text-eager": _trained("1b", False, False),
    "1b-text-compiled": _trained("1b", False, True),
    "1b-image-text-eager": _trained("1b", True, False),
    "1b-image-text-compiled": _trained("1b", True, True),
    "1b-text-float8": partial(
        training, scale="1b", pictures=False, compiled=True, precision="float8"
    ),
    "encoder": encoder,
    "saving-79m": partial(saving, scale="79m"),
    "saving-1b": partial(saving, scale="1b"),
    "attention": attention,
}


@torch.no_grad()
def _drawn(module: torch.nn.Module, seed: int) -> None:
    """Weights of some size, drawn where they lie: what they are changes no time, and the processor
    on which stages draw theirs takes a minute for 1b."""
    chance = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=chance)


def compute(name: str, out: Path, *, dry_run: bool) -> None:
    """Compute one part in this process."""
    with patch.object(run_stage, "initialise", _drawn), ExitStack() as held:
        if dry_run:
            # A processor's kernels take minutes to compile: the graphs are made, and run without.
            graphs = partialmethod(torch.nn.Module.compile, backend="aot_eager")
            held.enter_context(patch.object(torch.nn.Module, "compile", graphs))
        PARTS[name](Part(name, out, "cpu" if dry_run else "cuda", DRY if dry_run else FULL))
