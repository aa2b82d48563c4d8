"""The devices that a plan is priced for: dense bfloat16 peak and memory, as their makers state."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

# Of the peak in matrix products, counted as in `cost.py`: the 1.4B text run of the paper's model
# family had 30.3 % of an A100's 312 TFLOP/s (6 N a token: 94.7 TFLOP/s).
UTILISATION = 0.303
# What the driver, the libraries and the allocator's gaps take of a device's memory.
HEADROOM = 0.08


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
        Gpu("H200", 989, 141),
        Gpu("B200", 2250, 180),
        Gpu("MI300X", 1307, 192),
    )
}


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
        if min(tflops, memory) > 0:
            return Gpu(text, tflops, memory)
    near = get_close_matches(text.upper(), GPUS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"no GPU {text!r}; {hint}there are {', '.join(GPUS)}, or give TFLOPS:GIB, such as 312:80"
    )
