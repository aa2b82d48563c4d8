"""Midstream's training step against a plain PyTorch loop, on the same image-text examples.

Both sides start from the same weights and use the same attention. The plain loop takes one image
example a row with padding behind it, computes logits at every position and moves the weights with
AdamW as torch has it by default. Midstream is timed on these padded rows (the step alone) and on
its own filled rows. The sides take turns in one process; the first round is not counted, and the
losses of the first step must agree. A rate is tokens that are not padding by the median seconds.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from generated import continue_stage, model_79m, pocket_sources, rows_of
from midstream.batch import IGNORE, Batch
from midstream.config import AdamW, Machine, Rows
from midstream.data.loader import load_steps
from midstream.model.initialise import initialise
from midstream.model.vlm import VLM
from midstream.train.optim import make_optimizer
from midstream.train.parallel import Place, autocast, set_up
from midstream.train.step import train_step

RATE = 1e-3
SETTINGS = AdamW()
SHARES = {"pictures": 0.5, "web": 0.5}
# By scale: positions of a row, rows of a step, steps that are counted.
POCKET_ROWS = continue_stage().training.rows
SIZES = {
    "pocket": (POCKET_ROWS.row_length, POCKET_ROWS.batch_rows, 12),
    "79m": (1024, 1, 3),
}
Step = Callable[[Batch], float]


@dataclass
class Side:
    """One contestant: its batches, its step, and what was measured."""

    name: str
    batches: Iterator[list[Batch]]
    step: Step
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are not padding, a second of the median step."""
        return statistics.mean(self.tokens) / statistics.median(self.seconds)


def plain_step(model: VLM, device: torch.device) -> Step:
    """Logits everywhere, mean cross-entropy, AdamW as it comes."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=RATE,
        betas=(SETTINGS.beta1, SETTINGS.beta2),
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
    )

    def step(cpu_batch: Batch) -> float:
        batch = cpu_batch.to(device)
        optimizer.zero_grad()
        with autocast(device):
            hidden = model(batch, batch.images if len(batch.images) else None)
            logits = model.decoder.output(hidden).float()
            targets = batch.targets.flatten()
            loss = cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE)
            squares = torch.logsumexp(logits, dim=-1).flatten().square()
            z_loss = SETTINGS.z_loss * squares[targets != IGNORE].mean()
        (loss + z_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def midstream_step(model: VLM, device: torch.device) -> Step:
    """The step of every training stage."""
    optimizer = make_optimizer(model, SETTINGS)

    def step(batch: Batch) -> float:
        return train_step(
            model,
            optimizer,
            [batch],
            encode=lambda features: features,
            rate=RATE,
            settings=SETTINGS,
            place=Place(device),
        ).loss

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=sorted(SIZES), default="pocket")
    parser.add_argument("--steps", type=int, help="steps of each side that are counted")
    parser.add_argument("--batch-rows", type=int, help="rows of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args()
    row_length, batch_rows, steps = SIZES[options.scale]
    batch_rows, steps = options.batch_rows or batch_rows, options.steps or steps
    device = set_up(Machine(threads=options.threads, device=options.device)).device
    config = continue_stage().model if options.scale == "pocket" else model_79m()
    assert config.encoder is not None
    model = VLM(config)
    initialise(model, 0)
    with pocket_sources() as sources:

        def side(name: str, layout: str, make: Callable[[VLM, torch.device], Step]) -> Side:
            rows = Rows(row_length=row_length, batch_rows=batch_rows, layout=layout)
            tokens = (steps + 2) * batch_rows * row_length
            dataset = rows_of(sources, config.encoder, rows, SHARES, tokens)
            batches = load_steps(dataset, first_row=0, micro_rows=batch_rows)
            return Side(name, batches, make(copy.deepcopy(model).to(device), device))

        plain = side("plain loop, padded rows", "padded", plain_step)
        padded = side("midstream, padded rows", "padded", midstream_step)
        filled = side("midstream, filled rows", "filled", midstream_step)
        measure([plain, padded, filled], steps, device)
    print(
        f"scale {options.scale}: {batch_rows} rows of {row_length} a step, {steps} steps of each "
        f"side, {config.encoder.num_patches} patches an image, {device}, "
        f"{options.threads} thread(s), torch {torch.__version__}"
    )
    for one in (plain, padded, filled):
        print(
            f"  {one.name:<24} {one.tokens_per_second:>10,.0f} tokens/s   "
            f"{1000 * statistics.median(one.seconds):>8,.1f} ms a step   "
            f"{1 - statistics.mean(one.tokens) / (batch_rows * row_length):>4.0%} padding"
        )
    print(f"ratio, the step alone:   {padded.tokens_per_second / plain.tokens_per_second:.2f}")
    print(f"ratio, with filled rows: {filled.tokens_per_second / plain.tokens_per_second:.2f}")


def measure(sides: list[Side], steps: int, device: torch.device) -> None:
    """Let the sides take turns; raises SystemExit if the first losses disagree."""
    for number in range(steps + 1):
        losses = []
        for side in sides:
            (batch,) = next(side.batches)
            before = time.perf_counter()
            losses.append(side.step(batch))
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                side.seconds.append(time.perf_counter() - before)
                side.tokens.append(batch.counts.seen)
        if number == 0 and abs(losses[0] - losses[1]) > 1e-2:
            raise SystemExit(f"the sides do other work: first losses {losses[0]}, {losses[1]}")


if __name__ == "__main__":
    main()
