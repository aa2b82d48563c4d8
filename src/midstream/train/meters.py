"""What training takes: seconds by part of a step, model FLOPs, and the share of the device."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from midstream.config import AnyDecoderConfig, AnyEncoderConfig
from midstream.config.model import encoder_flops, frozen_saving, head_flops
from midstream.core.tokens import TokenCount

# The parts of a step. An encoder that the stage trains is part of the model's work.
PARTS = ("data", "encoder", "model", "optimizer", "checkpoint")


class Clock:
    """Seconds by part of the work, of this process; kernels of a GPU by their own time."""

    def __init__(self, device: torch.device, before: Mapping[str, float] | None = None) -> None:
        self._gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0) | dict(before or {})
        self._events = deque[tuple[str, Any, Any]]()

    @contextmanager
    def part(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """What runs in the block belongs to `name`; `on_device`: it starts kernels."""
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


def training_flops(
    decoder: AnyDecoderConfig,
    encoder: AnyEncoderConfig | None,
    counts: TokenCount,
    attended: float | int,
    encoded: float | int,
    *,
    encoder_trained: bool,
    decoder_trained: bool = True,
) -> float:
    """The model FLOPs of training on these positions: 6 N a token, attention, and the encoder.

    A frozen decoder has no gradients of its weights: 4 N a token.

    `attended`: the sum over positions of how many each looks at; `encoded`: images that the
    encoder saw. The input embedding costs nothing, padding does not count, and the head counts at
    every text position, also where it is left out because nothing is learnt there.
    """
    forward = 2.0 * decoder.linear_parameters * counts.seen
    forward += 4.0 * decoder.num_layers * decoder.hidden_size * attended
    forward += head_flops(decoder) * (counts.seen - counts.image)
    looks = encoder_flops(encoder) * encoded if encoder is not None else 0.0
    saved = 0.0
    if not decoder_trained:
        saved = frozen_saving(decoder, counts.seen, counts.seen - counts.image)
    return 3 * forward - saved + (3 if encoder_trained else 1) * looks


def report(
    *,
    counts: TokenCount,
    images: int,
    flops: float,
    seconds: float,
    parts: Mapping[str, float],
    peak_flops: float,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """The meters of a stage for its `results.json`.

    Tokens are all positions, useful ones those that are no padding; the utilisation is the model
    FLOPs a second over `peak_flops`, what the devices reach in a matrix product, measured when
    the stage began. `time_shares` are of the wall time of the first rank.
    """
    time_taken = max(seconds, 1e-9)
    shares = {name: parts.get(name, 0.0) / time_taken for name in PARTS}
    return {
        "tokens_per_second": counts.total / time_taken,
        "useful_tokens_per_second": counts.seen / time_taken,
        "images_per_second": images / time_taken,
        "model_flops_per_second": flops / time_taken,
        "peak_flops_per_second": peak_flops,
        "model_flops_utilisation": flops / time_taken / peak_flops if peak_flops else None,
        "time_shares": shares | {"other": max(0.0, 1.0 - sum(shares.values()))},
        "peak_memory_bytes": peak_memory_bytes,
    }
