"""Where a process computes, and with whom: device, precision, determinism, ranks, the mesh.

Blocks in float8 (by torchao); seconds by part of a step; a sharded model's tensors dealt out over
ranks and gathered whole.
"""

import ctypes
import json
import math
import os
import resource
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from itertools import chain, zip_longest
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from midstream.config import Machine
from midstream.core.storage import num_cores
from midstream.model.weights import shard_of, shard_rows

# How much faster bfloat16 must multiply than float32 to be what a device computes in by itself.
# Processors without units for it take eight times as long, those with them half or less.
_WORTH_IT = 1.5
# A core decodes 75 pictures of 384 pixels a second; what so many decode feeds small models too.
MOST_DATA_WORKERS = 8
# glibc's names for what `mallopt` sets (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# A file holds about so many bytes at most: several are written, and hashed, at a time.
FILE_BYTES = 2**31
# The first cards with units for float8: Ada and Hopper.
_FLOAT8_CAPABILITY = (8, 9)
# Kernels of float8 want sizes that this divides.
_FLOAT8_MULTIPLE = 16
# For torchao's Float8LinearConfig: a tensor has one scale, computed at each product, and any number
# of positions is filled up to what the kernels want.
_FLOAT8_SETTINGS: dict[str, Any] = {"pad_inner_dim": True}


@dataclass(frozen=True)
class Place:
    """The device of this process, what it computes in, and its rank among those of a stage.

    `mesh` is None for one process without a process group; `scalars` is the group on the CPU
    over which counts, flags and texts travel. `peak_flops`: FLOPs a second of a large matrix
    product in `precision`, of all ranks together. `note` says where another precision is faster.
    """

    device: torch.device
    precision: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    scalars: "dist.ProcessGroup | None" = None
    peak_flops: float = 0.0
    compile_blocks: bool = False
    checkpoint_blocks: bool = False
    float8_blocks: bool = False
    note: str | None = None

    @property
    def precision_name(self) -> str:
        """What the blocks' products are computed in."""
        return "float8" if self.float8_blocks else str(self.precision).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in `precision`, over float32 weights."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def sum(self, values: Sequence[float | int]) -> list[float]:
        """The float64 sums over the ranks."""
        if self.scalars is None:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.scalars)
        return cast(list[float], total.tolist())

    def add_up(self, value: torch.Tensor) -> None:
        """Make of a tensor on the device its sum over the ranks, in place; a GPU's host goes on."""
        if self.scalars is not None:
            dist.all_reduce(value)

    def gather(self, value: Any) -> list[Any]:
        """A JSON-able value of every rank, in their order; on every rank."""
        if self.scalars is None:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self.scalars)
        room = max(int(size) for size in sizes)
        padded = torch.zeros(room, dtype=torch.uint8)
        padded[: len(mine)] = mine
        parts = [torch.zeros(room, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, padded, group=self.scalars)
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def meet(self) -> None:
        """Let what the device computes next wait for all ranks; the host waits on a CPU alone."""
        if self.mesh is None:
            return
        if self.device.type == "cpu":
            self.barrier()
        else:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if self.scalars is not None:
            dist.barrier(group=self.scalars)
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.scalars is not None:
            dist.barrier(group=self.scalars)


# One process on a CPU.
ALONE = Place(torch.device("cpu"))


def set_up(machine: Machine) -> Place:
    """Choose device and precision, fix the thread count, ask for deterministic kernels.

    On a CPU equal inputs then give equal bits for an equal number of threads. Where torchrun has
    started this process among others, the process groups and the mesh are made: one axis that
    shards, or with `shard_ranks` two, copies and shards. Raises ValueError where cuda is asked
    for and there is none, float8 where it cannot be, or torchrun started another number of
    processes than `machine` says.
    """
    torch.set_num_threads(machine.threads)
    device = _device(machine)
    if device.type == "cpu":
        _keep_memory()
    torch.use_deterministic_algorithms(True)
    # Else every new tensor is filled first: a twentieth of a step.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size != machine.world_size:
        raise ValueError(
            f"{world_size} processes were started, the machine says {machine.ranks} ranks on "
            f"{machine.nodes} nodes; give both the same"
        )
    mesh, scalars = None, None
    if world_size > 1:
        # Whether a rank is lost is for `Watch` to say; one that compiles or loads may take long.
        timeout = timedelta(days=1)
        kinds = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        dist.init_process_group(kinds, timeout=timeout)
        scalars = dist.new_group(backend="gloo", timeout=timeout)
        shards = machine.shard_ranks or world_size
        axes = {"copy": world_size // shards, "shard": shards}
        if shards == world_size:
            del axes["copy"]
        mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    precision, note = _precision(machine, device)
    size = 768 if device.type == "cpu" else 8192
    compiled = machine.compile == "blocks" or (machine.compile == "auto" and device.type == "cuda")
    return Place(
        device=device,
        precision=precision,
        note=note,
        rank=rank,
        world_size=world_size,
        mesh=mesh,
        scalars=scalars,
        peak_flops=world_size * (2.0 * size**3 / product_seconds(device, precision, size)),
        compile_blocks=compiled,
        checkpoint_blocks=machine.activation_checkpointing == "blocks",
        float8_blocks=machine.precision == "float8",
    )


def _device(machine: Machine) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if machine.device == "cuda" and not has_cuda:
        raise ValueError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    if not has_cuda or machine.device == "cpu":
        return torch.device("cpu")
    # cuBLAS reads this at its first call; without it deterministic kernels are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _keep_memory() -> None:
    """Let glibc keep what is freed: a sixth of a step's time (`benchmarks/train_step.py`)."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _precision(machine: Machine, device: torch.device) -> tuple[torch.dtype, str | None]:
    """What was asked for; by itself float32 on a CPU, and on a GPU the faster of the two.

    What is not in float8 is in bfloat16.
    """
    if machine.precision == "float8":
        check_float8(device)
        return torch.bfloat16, None
    # A CPU does not choose by measurement: a resumed stage has to go on with equal bits.
    gain = product_seconds(device, torch.float32) / product_seconds(device, torch.bfloat16)
    chosen = machine.precision
    if chosen == "auto":
        chosen = "bfloat16" if device.type == "cuda" and gain >= _WORTH_IT else "float32"
    if chosen == "bfloat16":
        slow = f"bfloat16 multiplies at {gain:.2f} of float32's speed here"
        return torch.bfloat16, slow if gain < 1 else None
    fast = f"bfloat16 multiplies {gain:.1f} times as fast as float32 here; --machine "
    return torch.float32, fast + "precision=bfloat16 uses it" if gain >= _WORTH_IT else None


@cache
def product_seconds(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """The best of three products of two square matrices of `size` (by the device, where 0).

    Measured once a process.
    """
    # Larger ones take processors without units for bfloat16 a second.
    size = size or (256 if device.type == "cpu" else 4096)
    left = torch.ones((size, size), dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):  # the first warms up and is slower
        before = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return best


def data_workers(machine: Machine, device: torch.device) -> int:
    """Processes, or threads where features are stored, that load ahead of this one.

    As `machine` says; else none on a CPU, whose cores compute, and on a GPU of the cores that the
    machine's threads leave a rank's share of up to MOST_DATA_WORKERS, one at least.
    """
    if machine.data_workers is not None:
        return machine.data_workers
    if device.type == "cpu":
        return 0
    cores = num_cores() // (machine.workers * machine.ranks)
    return min(MOST_DATA_WORKERS, max(1, cores - machine.threads))


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """What encoders and answers are computed in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def device_bytes(device: torch.device) -> int:
    """The memory of a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def device_name(device: torch.device) -> str:
    """What the driver calls a GPU; "cpu" for the processor."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else str(device)


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most that torch's allocator held of a GPU since `forget_peak`; elsewhere the largest
    resident memory of this process so far."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: torch.device) -> None:
    """Let the peak of a GPU's memory begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(place: Place) -> dict[str, Any]:
    """`peak_memory_bytes` and whose they are, `memory_of`: of a GPU those of the rank that took
    most, of a CPU all ranks' processes together. Every rank calls it."""
    held = place.gather(peak_memory_bytes(place.device))
    if place.device.type == "cuda":
        return {"peak_memory_bytes": max(held), "memory_of": "device"}
    return {"peak_memory_bytes": sum(held), "memory_of": "processes"}


# The parts of a step. An encoder that the stage trains is part of the model's work; "ranks" is
# waiting for other ranks (`Place.meet`).
PARTS = ("data", "encoder", "model", "ranks", "optimizer", "checkpoint")


class Clock:
    """Seconds by part of the work, of this process; kernels of a GPU by their own time."""

    def __init__(self, device: torch.device, before: Mapping[str, float] | None = None) -> None:
        self._gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0) | dict(before or {})
        self._events = deque[tuple[str, Any, Any]]()

    @contextmanager
    def part(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """What runs in the block belongs to `name`; `on_device`: it starts kernels, or they wait
        for it."""
        if on_device and self._gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        before = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Seconds of each part so far, of the kernels that have ended by now."""
        while self._events and self._events[0][2].query():
            name, first, last = self._events.popleft()
            self._seconds[name] += first.elapsed_time(last) / 1000
        return dict(self._seconds)


def check_float8(device: torch.device) -> None:
    """Raises ValueError, with the remedy, where float8 products cannot be computed."""
    otherwise = "; --machine precision=bfloat16 goes without"
    if device.type != "cuda":
        raise ValueError(f"precision float8 needs a GPU, this stage runs on a CPU{otherwise}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLOAT8_CAPABILITY:
        raise ValueError(
            f"precision float8 needs a GPU of compute capability 8.9 or above (L40S, H100), this "
            f"one has {'.'.join(map(str, capability))}{otherwise}"
        )
    if find_spec("torchao") is None:
        raise ValueError(
            f'precision float8 needs torchao: pip install "midstream[float8]"{otherwise}'
        )


def to_float8(block: nn.Module) -> None:
    """Have a block's linear layers multiply in float8; weights and their names stay."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: nn.Module, _name: str) -> bool:
        assert isinstance(layer, nn.Linear), "no other is asked about"
        return layer.in_features % _FLOAT8_MULTIPLE == 0 == layer.out_features % _FLOAT8_MULTIPLE

    convert_to_float8_training(
        block, module_filter_fn=fits, config=Float8LinearConfig(**_FLOAT8_SETTINGS)
    )


def deal(tensors: Mapping[str, Tensor], world_size: int) -> list[list[str]]:
    """The names in each file, large tensors first, each into the file with the fewest bytes so far;
    file i is rank i % world_size's."""
    sizes = {name: value.numel() * value.element_size() for name, value in tensors.items()}
    files = world_size * max(1, math.ceil(sum(sizes.values()) / (world_size * FILE_BYTES)))
    load, names = [0] * files, [list[str]() for _ in range(files)]
    for name in sorted(sizes, key=lambda one: -sizes[one]):
        at = load.index(min(load))
        names[at].append(name)
        load[at] += sizes[name]
    return names


def gathered(
    tensors: Mapping[str, Tensor], files: list[list[str]], place: Place
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one by one, each on the rank of its file alone; all ranks go to the end.

    The parts of a sharded tensor travel once. Beside it a rank holds the parts of one more.
    """
    if place.mesh is None:
        yield from ((name, tensors[name].detach()) for names in files for name in names)
        return
    # Each copy of the model gathers what its own ranks write.
    group = place.mesh.get_group(place.mesh.ndim - 1)
    members = dist.get_process_group_ranks(group)
    me = members.index(place.rank)
    queues = [chain.from_iterable(files[rank :: place.world_size]) for rank in members]
    for names in zip_longest(*queues):
        wanted = [None if name is None else tensors[name].detach() for name in names]
        received, name = _exchange(wanted, me, group), names[me]
        if name is not None and received is not None:
            yield name, received


def _exchange(wanted: list[Tensor | None], me: int, group: dist.ProcessGroup) -> Tensor | None:
    """What this rank of the group wants, whole; `wanted` is what each of them does."""
    mine = wanted[me]
    if not any(isinstance(value, DTensor) for value in wanted):
        return mine
    parts, sizes = [], [0] * len(wanted)
    for value in wanted:
        part = value.to_local() if isinstance(value, DTensor) else torch.empty(0)
        parts.append(part.contiguous().reshape(-1).view(torch.uint8))
    if isinstance(mine, DTensor):
        row = mine.element_size() * mine.shape[1:].numel()
        number, _ = shard_of(mine)
        cuts = [shard_rows(mine.shape[0], number, index) for index in range(number)]
        sizes = [(cut.stop - cut.start) * row for cut in cuts]
    device = next(value.device for value in wanted if value is not None)
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    sent = torch.cat([part.to(device) for part in parts])
    dist.all_to_all_single(whole, sent, sizes, [len(part) for part in parts], group=group)
    return whole.view(mine.dtype).view(mine.shape) if isinstance(mine, DTensor) else mine
