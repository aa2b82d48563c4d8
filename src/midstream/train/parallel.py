"""Where a process computes: device, threads, precision, determinism."""

import os
import resource
from contextlib import AbstractContextManager

import torch

from midstream.config import Machine


def set_up(machine: Machine) -> torch.device:
    """Choose the device, fix the thread count, and ask for deterministic kernels.

    On a CPU equal inputs then give equal bits for an equal number of threads.
    Raises ValueError where cuda is asked for and there is none.
    """
    torch.set_num_threads(machine.threads)
    has_cuda = torch.cuda.is_available()
    if machine.device == "cuda" and not has_cuda:
        raise ValueError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    device = torch.device("cuda" if has_cuda and machine.device != "cpu" else "cpu")
    if device.type == "cuda":
        # cuBLAS reads this at its first call; without it deterministic kernels are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    return device


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 on a GPU over float32 weights; float32 throughout on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
