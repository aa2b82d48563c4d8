"""How long training waits for a save, and how long saves and starts take: as before, and now.

Before: every rank gathered every tensor whole, one thread wrote, files were hashed one by one, and
again for each question. Ranks are processes over gloo on the CPU; files lie in the page cache. The
last lines compute from what was measured what share of the time a model of 1b on eight GPUs stands
still; what crosses GPUs and the bus cannot be measured here and is assumed.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from midstream.config import DECODERS, AdamW, DecoderConfig, Training, VLMConfig, WarmupCosine
from midstream.config.budget import Mixture, Rows, Share
from midstream.core.digests import file_sha256
from midstream.core.storage import finish_folder, in_threads, seal, start_folder
from midstream.core.tokens import TokenCount
from midstream.model.vlm import VLM
from midstream.model.weights import fill, initialise, read_tensors, tensor_digest, whole
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress, Saver
from midstream.train.parallel import Place
from midstream.train.step import build_model, make_optimizer

MEDIUM = DecoderConfig(hidden_size=512, num_layers=4, num_heads=8, vocab_size=8192)
TRAINING = Training(
    budget=Mixture(total_tokens=1, shares=(Share(source="text", share=1.0),)),
    rows=Rows(row_length=1024, batch_rows=1),
    schedule=WarmupCosine(peak_rate=1e-3),
)
PROGRESS = Progress(1, 1, 1, 1e-3, TokenCount(text=1))
# Weights and two moments in float32.
STATE_BYTES = 12
# Assumed: a GPU to pinned memory (PCIe 4 x16 reaches about so much), and what it gets from others.
TO_HOST, FROM_GPUS = 20e9, 50e9
EVERY_SECONDS, GPUS = 600.0, 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to be measured; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        one, two, writing, removing = _bandwidths(Path(folder))
        print(f"sha256, one thread {one / 1e9:.2f} GB/s, two {two / 1e9:.2f} GB/s")
        print(
            f"writing, brought to the disk {writing / 1e9:.2f} GB/s, deleting {removing / 1e9:.1f}",
            flush=True,
        )
        arguments = (options.ranks, folder, options.rounds)
        spawn(_rank, arguments, nprocs=options.ranks)  # type: ignore[no-untyped-call]
        settle = float((Path(folder) / "settle").read_text())
    _print_share(one, writing, removing, settle)


def _bandwidths(folder: Path) -> tuple[float, float, float, float]:
    """Bytes a second of hashing with one thread and two, of writing, and of deleting."""
    size = 2**27
    tensor = torch.arange(size // 4, dtype=torch.float32)
    before = time.perf_counter()
    save_file({"a": tensor}, folder / "a")
    seconds = time.perf_counter() - before
    (folder / "b").write_bytes((folder / "a").read_bytes())
    before = time.perf_counter()
    hashed = seal(folder, ["a"])["a"]["sha256"]
    # Brought to the disk and hashed: what hashing alone takes is measured below.
    sealed = time.perf_counter() - before
    found: list[float] = []
    for names in (["a"], ["a", "b"]):
        before = time.perf_counter()
        assert in_threads(lambda name: file_sha256(folder / name), names)[0] == hashed
        found.append(len(names) * size / (time.perf_counter() - before))
    before = time.perf_counter()
    (folder / "a").unlink()
    removing = size / (time.perf_counter() - before)
    return found[0], found[1], size / (seconds + sealed - size / found[0]), removing


def _rank(rank: int, ranks: int, folder: str, rounds: int) -> None:
    base = Path(folder)
    torch.set_num_threads(1)
    day = timedelta(days=1)
    met = f"file://{base}/meeting"
    dist.init_process_group("gloo", init_method=met, rank=rank, world_size=ranks, timeout=day)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    group, cpu = dist.new_group(), torch.device("cpu")
    place = Place(cpu, rank=rank, world_size=ranks, mesh=mesh, scalars=group)
    model = build_model(VLMConfig(decoder=MEDIUM), TRAINING, place)
    initialise(model, 0)
    optimizer = make_optimizer(model, AdamW())
    for value in model.parameters():
        moments = {name: value.detach().clone() for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[value] = {**moments, "step": torch.tensor(1.0)}
    side = Sides(place, model, optimizer, base)
    for _ in range(rounds):
        for name, measure in side.pairs():
            place.barrier()
            side.seconds.setdefault(name, []).append(measure())
    if rank == 0:
        medians = {name: statistics.median(found) for name, found in side.seconds.items()}
        size = STATE_BYTES * MEDIUM.num_parameters
        print(f"{ranks} ranks, {size / 1e9:.2f} GB of weights and moments, seconds:")
        for name in ("stands still", "save", "resume", "start from weights"):
            old, new = medians[f"{name}, before"], medians[f"{name}, now"]
            print(f"  {name:<20} before {old:6.2f}, now {new:6.2f}: {old / new:.2f} times")
        print(f"  of it at the end of a save, now {medians['settle']:.3f}")
        (base / "settle").write_text(str(medians["settle"]))
    dist.destroy_process_group()


class Sides:
    """The same saves and starts as they were and as they are; seconds of each by name."""

    def __init__(
        self, place: Place, model: VLM, optimizer: torch.optim.Optimizer, base: Path
    ) -> None:
        self.place, self.model, self.optimizer, self.base = place, model, optimizer, base
        self.seconds: dict[str, list[float]] = {}

    def pairs(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """Names and what measures them, the sides by turns."""
        yield "save, before", self.save_before
        yield "save, now", self.save_now
        yield "resume, before", self.resume_before
        yield "resume, now", self.resume_now
        yield "start from weights, before", self.weights_before
        yield "start from weights, now", self.weights_now

    def _note(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def _stems(self) -> dict[str, dict[str, Tensor]]:
        return checkpoint._stems(self.model, self.optimizer)

    def save_before(self) -> float:
        """Whole tensors on every rank, one thread that writes, hashes files, then tensors."""
        place, began = self.place, time.perf_counter()
        made = str(start_folder(self.base / "before")) if place.rank == 0 else None
        temporary = Path(place.gather(made)[0])
        held: dict[str, dict[str, Tensor]] = {}
        for stem, tensors in self._stems().items():
            held[stem] = {}
            for at, (name, value) in enumerate(tensors.items()):
                full = whole(value.detach())
                if at % place.world_size == place.rank:
                    held[stem][name] = full.cpu().contiguous()
        waited = time.perf_counter() - began
        entries: dict[str, dict[str, object]] = {}

        def write() -> None:
            for stem, tensors in held.items():
                name = f"{stem}-{place.rank}.safetensors"
                save_file(tensors, temporary / name)
                entries.update(seal(temporary, [name]))
                for value in tensors.values():
                    tensor_digest(value)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        written = time.perf_counter()
        everyone = place.gather(entries)
        if place.rank == 0:
            listed = {name: entry for rank in everyone for name, entry in rank.items()}
            finish_folder(temporary, self.base / "before", listed)
        place.barrier()
        self._note("stands still, before", waited + time.perf_counter() - written)
        return time.perf_counter() - began

    def save_now(self) -> float:
        """The saver of the training loop."""
        saver, began = Saver(self.place, background=True), time.perf_counter()
        saver.start(self.base / "now", self.model, self.optimizer, PROGRESS)
        waited = time.perf_counter() - began
        asked = time.perf_counter()
        while not saver.proceed():
            time.sleep(0.05)  # about a step
            asked = time.perf_counter()
        named = time.perf_counter() - asked
        self._note("settle", named)
        self._note("stands still, now", waited + named)
        saver.settle()
        return time.perf_counter() - began

    def _hash(self, *, share: bool) -> None:
        files = sorted(path for path in (self.base / "now").iterdir())
        for path in files[self.place.rank :: self.place.world_size] if share else files:
            file_sha256(path)

    def _digests_before(self) -> None:
        for tensors in self._stems().values():
            for value in tensors.values():
                full = whole(value.detach())
                if self.place.rank == hash(value.shape) % self.place.world_size:
                    tensor_digest(full)

    def resume_before(self) -> float:
        """Files hashed one by one, a part on each rank; tensors after loading, and for the log."""
        began = time.perf_counter()
        self._hash(share=True)
        self.place.barrier()
        checkpoint.load_moments(self.base / "now", self.model, self.optimizer)
        fill(self.model, read_tensors(self.base / "now"), path=self.base)
        self._digests_before()
        self._digests_before()
        self.place.barrier()
        return time.perf_counter() - began

    def resume_now(self) -> float:
        """What the loop does."""
        began = time.perf_counter()
        checkpoint.load(self.base / "now", self.model, self.optimizer, place=self.place)
        checkpoint.digests(self.model, self.optimizer, place=self.place)
        return time.perf_counter() - began

    def weights_before(self) -> float:
        """All files on every rank for the rate, a part of them again, then the weights."""
        began = time.perf_counter()
        self._hash(share=False)
        self._hash(share=True)
        self.place.barrier()
        fill(self.model, read_tensors(self.base / "now"), path=self.base)
        self.place.barrier()
        return time.perf_counter() - began

    def weights_now(self) -> float:
        """The rate out of its own file; the weights' files once."""
        began = time.perf_counter()
        checkpoint.read_progress(self.base / "now")
        checkpoint.check_files(self.base / "now", place=self.place)
        fill(self.model, read_tensors(self.base / "now"), path=self.base)
        self.place.barrier()
        return time.perf_counter() - began


def _print_share(hashing: float, writing: float, removing: float, settle: float) -> None:
    size = STATE_BYTES * DECODERS["1b"].num_parameters
    mine = size / GPUS
    collect, copy = mine / FROM_GPUS, mine / TO_HOST
    background = size / writing + 2 * mine / hashing + size / removing
    over = max(0.0, background - EVERY_SECONDS)
    waits = collect + copy + settle + over
    aside = waits - over + background
    print(
        f"1b on {GPUS} GPUs, {size / 1e9:.1f} GB, one save in {EVERY_SECONDS:.0f} s: gathered in "
        f"{collect:.2f} s (assumed {FROM_GPUS / 1e9:.0f} GB/s), to pinned memory in {copy:.2f} s "
        f"(assumed {TO_HOST / 1e9:.0f} GB/s), manifest and name {settle:.2f} s (measured): "
        f"training stands still {waits / EVERY_SECONDS:.2%} of the time.\n"
        f"Meanwhile {background:.0f} s of writing ({writing / 1e9:.2f} GB/s for all ranks), "
        f"hashing (twice, {hashing / 1e9:.2f} GB/s a rank) and deleting; waited for, it would be "
        f"{aside / EVERY_SECONDS:.1%}. The disk is enough from "
        f"{size / (EVERY_SECONDS - 2 * mine / hashing) / 1e6:.0f} MB/s on."
    )


if __name__ == "__main__":
    main()
