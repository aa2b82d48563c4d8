"""Which token comes next: the likeliest, or one drawn at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from midstream.model.initialise import generator


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), cut to the `top_k` likeliest, then
    to the fewest of those that make up `top_p` of what is left.

    A draw is a function of the seed, the prompt's number and the count of tokens drawn before.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature {self.temperature} must be above 0; leave sampling out for the "
                "likeliest token each time"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must lie above 0 and at most at 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be at least 1; leave it out for all tokens")


def choose(
    logits: Float[Tensor, "rows vocab"],
    sampling: Sampling | None,
    prompts: Sequence[int],
    step: int,
) -> list[int]:
    """The next token of each row: the likeliest without `sampling`.

    `prompts` numbers the rows for their draws, `step` counts the tokens drawn before.
    """
    if sampling is None:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    # In float64, so that the order of summation does not show, and on the CPU: a GPU's running sum
    # has no deterministic kernel.
    scaled, tokens = (logits.double().cpu() / sampling.temperature).sort(
        descending=True, stable=True
    )
    mass = scaled[:, : sampling.top_k].softmax(dim=-1).cumsum(dim=-1)
    # A token is kept while those before it make up less than top_p: the first one always is.
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), dim=1)
    last = (before < sampling.top_p).sum(dim=1, keepdim=True) - 1
    places = [
        torch.rand(
            (), generator=generator(sampling.seed, f"token/{index}/{step}"), dtype=mass.dtype
        )
        for index in prompts
    ]
    place = torch.stack(places)[:, None] * mass.gather(1, last)
    # The first token whose mass reaches beyond the drawn place.
    chosen = torch.minimum((mass <= place).sum(dim=1, keepdim=True), last)
    return [int(token) for token in tokens.gather(1, chosen)[:, 0].tolist()]
