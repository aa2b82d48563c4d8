"""The card of `gpu.py`: what it is, and what stands in the way of measuring on it."""

import subprocess
from dataclasses import dataclass

import torch

from midstream.cost import gpu_of_device

# What the context and the libraries of one process take of a card.
CONTEXT_GIB = 1.0
OLDEST = (8, 0)


@dataclass(frozen=True)
class Card:
    """A CUDA device, its driver and torch; `held_gib` of its memory belongs to other processes.

    `holders` are those processes as the driver lists them, which it does not do in every container.
    """

    name: str
    gib: float
    capability: str
    driver: str
    torch: str
    cuda: str
    held_gib: float = 0.0
    holders: tuple[str, ...] = ()

    @property
    def vendor_tflops(self) -> float | None:
        """Its maker's dense bfloat16 peak; None for a card that `midstream.cost` does not know."""
        gpu = gpu_of_device(self.name)
        return None if gpu is None else float(gpu.tflops)

    def shared(self) -> str | None:
        """What is to be said where others hold memory of it."""
        if not self.held_gib:
            return None
        who = f" ({', '.join(self.holders)})" if self.holders else ""
        return (
            f"another process{who} holds {self.held_gib:.1f} of the {self.gib:.0f} GiB of this "
            "card: times and micro-batches are those of a shared card; end it, or choose another "
            "card by CUDA_VISIBLE_DEVICES"
        )


def find_card() -> Card:
    """The first CUDA device. Raises ValueError with the remedy where there is none to measure on:
    no device, a driver that is older than torch wants, a card without bfloat16."""
    if not torch.cuda.is_available():
        raise ValueError(_why_none())
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    if capability < OLDEST:
        raise ValueError(
            f"{properties.name} has compute capability {'.'.join(map(str, capability))} and no "
            "bfloat16 products, which need 8.0; take a card from Ampere (A100, A10) on. What a "
            "stage takes on this one in float32 says `midstream profile --machine "
            "precision=float32`"
        )
    free, total = torch.cuda.mem_get_info(0)
    held = (total - free) / 2**30
    return Card(
        name=properties.name,
        gib=total / 2**30,
        capability=".".join(map(str, capability)),
        driver=_ask_driver("--query-gpu=driver_version", "--id=0") or "unknown",
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        held_gib=held if held > CONTEXT_GIB else 0.0,
        holders=_holders() if held > CONTEXT_GIB else (),
    )


def no_card() -> Card:
    """What stands for a card on the way without one."""
    return Card("CPU (dry run)", 1.0, "0.0", "none", torch.__version__, "none")


def _why_none() -> str:
    otherwise = "; --dry-run goes the same way on the CPU"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a build with it "
            f"(docs/training.md){otherwise}"
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = f"{torch.cuda.device_count()} devices are visible"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    if "driver" in reason and "old" in reason:
        driver = _ask_driver("--query-gpu=driver_version", "--id=0")
        return (
            f"the NVIDIA driver {driver or '(version unknown)'} is older than torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}) wants: update the driver, or install "
            f"a torch that is built for an older CUDA; torch says: {reason}{otherwise}"
        )
    return (
        f"torch sees no CUDA device ({reason}); look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES"
        f"{otherwise}"
    )


def _holders() -> tuple[str, ...]:
    listed = _ask_driver("--query-compute-apps=pid,used_memory")
    return tuple(f"process {line.replace(',', ':')}" for line in (listed or "").splitlines())


def _ask_driver(*query: str) -> str | None:
    """What nvidia-smi says; None where it is not there or does not answer."""
    command = ["nvidia-smi", *query, "--format=csv,noheader"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None
