"""The devices that plans are priced for and training is measured against: dense bfloat16 peak and
memory, as the makers' data sheets state them (without sparsity, at full power)."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite

# Model FLOPs (`config/flops.py`) over the peak: the paper's 1.4B text run, 4.32 T tokens in rows of
# 2,048 and 106,000 hours of A100s, had 97.6 of 312 TFLOP/s.
UTILISATION = 0.313
# What the driver, the libraries and the allocator's gaps take of a device's memory.
HEADROOM = 0.08
# Fewer GPU-hours are not told apart.
LEAST_HOURS = 0.01


@dataclass(frozen=True)
class Gpu:
    """TFLOP/s of dense bfloat16 products, and GiB of memory."""

    name: str
    tflops: float | int
    gib: float | int

    @property
    def room(self) -> float:
        """Bytes that a stage may take."""
        return (1 - HEADROOM) * self.gib * 2**30


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 312, 40),
        Gpu("A100-80", 312, 80),
        Gpu("A10", 125, 24),
        Gpu("L4", 121, 24),
        Gpu("L40S", 362, 48),
        Gpu("RTX4090", 165, 24),
        Gpu("H100", 989, 80),
        Gpu("H100-PCIe", 756, 80),
        Gpu("H200", 989, 141),
        Gpu("B200", 2250, 180),
        Gpu("MI300X", 1307, 192),
    )
}

# By what a driver calls the device. A part of one (MIG) has another name, and so no peak here.
DEVICES: Mapping[str, str] = {
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-PCIE-40GB": "A100-40",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA A100 80GB PCIe": "A100-80",
    "NVIDIA A10": "A10",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX4090",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "AMD Instinct MI300X": "MI300X",
}


def gpu_of_device(device: str) -> Gpu | None:
    """The device that a driver calls so; None for one whose peak is not known."""
    name = DEVICES.get(device)
    return None if name is None else GPUS[name]


def find_gpu(text: str) -> Gpu:
    """A known device by name, or one's own as TFLOPS:GIB. Raises ValueError for anything else."""
    for name, gpu in GPUS.items():
        if name.lower() == text.lower():
            return gpu
    peak, colon, gib = text.partition(":")
    if colon:
        try:
            tflops, memory = float(peak), float(gib)
        except ValueError:
            tflops = memory = 0.0
        if min(tflops, memory) > 0 and isfinite(tflops) and isfinite(memory):
            return Gpu(text, tflops, memory)
    near = [name for name in GPUS if name.startswith(f"{text.upper()}-")]
    near = near or get_close_matches(text.upper(), GPUS, n=1)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"no GPU {text!r}; {hint}there are {', '.join(GPUS)}, or give TFLOPS:GIB, such as 312:80"
    )
