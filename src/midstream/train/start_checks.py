"""What is looked at whenever a stage starts or resumes, so that nothing is trained by mistake.

Ranks run the same code on the same data; the rate is the formula's; every trained parameter gets a
gradient; what is frozen stays as it was. Each start is a line of `starts.jsonl`.
"""

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import midstream
from midstream.config import Machine
from midstream.identity import folder_fingerprint
from midstream.model.vlm import VLM
from midstream.model.weights import joint_digest, tensor_digest
from midstream.storage import append_line
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress
from midstream.train.parallel import Place
from midstream.train.sharding import local
from midstream.train.step import StepResult

# Reached by gradients only where a step shows a picture.
_SEEING = ("encoder.", "projector.")


class StartChecks:
    """The checks of one start of a stage; every rank makes them at the same points."""

    def __init__(self, model: VLM, place: Place, origin: Mapping[str, str]) -> None:
        self._model, self._place = model, place
        self._alike({"code": code_digest(), "torch": torch.__version__, **origin})
        named = list(model.named_parameters())
        self._pending = {name for name, value in named if value.requires_grad}
        self._frozen = self._frozen_digest()

    def begin(
        self,
        folder: Path,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        rate: float,
        machine: Machine,
    ) -> None:
        """Before the first step: the rate is the formula's; writes the line of this start.

        Raises ValueError with both rates.
        """
        if progress.rate != rate:
            raise ValueError(
                f"{folder}: the checkpoint goes on at a rate of {progress.rate}, the schedule says "
                f"{rate} at {progress.tokens_seen:,} tokens; it is another schedule's checkpoint"
            )
        self._frozen = self._frozen_digest()
        digests = checkpoint.digests(self._model, optimizer, place=self._place)
        if self._place.rank == 0:
            append_line(folder / "starts.jsonl")(
                {
                    "step": progress.step,
                    "tokens_seen": progress.tokens_seen,
                    "rate": rate,
                    "weights_digest": digests["model"],
                    "moments_digest": digests["optimizer"],
                    "parameters": parameter_table(self._model),
                    "ranks": self._place.world_size,
                    "device": str(self._place.device.type),
                    "precision": str(self._place.precision).removeprefix("torch."),
                    "threads": machine.threads,
                    "compiled": self._place.compile_blocks,
                    "code": code_digest(),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                }
            )

    def after_step(self, result: StepResult) -> None:
        """After each step until all is seen to: trained matrices had a gradient other than zero,
        and other trained parameters one at all.

        Those that look at pictures are judged by the first step that shows one. Raises ValueError
        with the names.
        """
        if not self._pending:
            return
        judged = {n for n in self._pending if result.num_images or not n.startswith(_SEEING)}
        parameters = {n: value for n, value in self._model.named_parameters() if n in judged}
        mine = [float(_reached(value)) for value in parameters.values()]
        anywhere = self._place.sum(mine)
        unreached = {name for name, found in zip(parameters, anywhere, strict=True) if not found}
        unreached |= judged & set(result.untouched)
        if unreached:
            raise ValueError(
                f"{len(unreached)} trained parameters got no gradient in a step that uses them: "
                f"{', '.join(sorted(unreached)[:5])}; freeze them, or mend the model"
            )
        self._pending -= judged

    def end(self) -> None:
        """Raises RuntimeError if a frozen parameter has changed since the start."""
        if self._frozen_digest() != self._frozen:
            raise RuntimeError(
                "parameters that this stage keeps frozen have changed while it ran; its weights "
                "are not kept. This is an error of Midstream or of the machine's memory"
            )

    def _alike(self, mine: Mapping[str, str]) -> None:
        ranks = self._place.gather(dict(mine))
        for rank, theirs in enumerate(ranks):
            for key, value in theirs.items():
                if value != ranks[0].get(key):
                    raise ValueError(
                        f"rank {rank} runs with {key} {value!r}, rank 0 with "
                        f"{ranks[0].get(key)!r}; start all ranks from one installation and store"
                    )

    def _frozen_digest(self) -> str:
        # Of this rank's parts, which it alone could change.
        return joint_digest(
            {
                name: tensor_digest(local(value))
                for name, value in self._model.named_parameters()
                if not value.requires_grad
            }
        )


def parameter_table(model: VLM) -> dict[str, dict[str, int]]:
    """By part of the model (decoder, projector, encoder): trained and frozen parameters."""
    table: dict[str, dict[str, int]] = {}
    for name, value in model.named_parameters():
        part = table.setdefault(name.split(".")[0], {"trained": 0, "frozen": 0})
        part["trained" if value.requires_grad else "frozen"] += value.numel()
    return table


@cache
def code_digest() -> str:
    """Sixteen digits that stand for the source files of this package."""
    return folder_fingerprint(Path(midstream.__file__).parent, ("**/*.py",))


def _reached(parameter: Tensor) -> bool:
    """Whether a gradient other than zero arrived; for vectors, whose gradient may vanish (a bias
    that softmax cancels), any."""
    gradient = parameter.grad
    if gradient is None:
        return False
    return gradient.ndim < 2 or bool(local(gradient).count_nonzero())
