"""How parameters start: drawn by seed and name, alike on every device.

Each module states its table in `initialisers`; `initialise` fills it.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from midstream.model.weights import put


@dataclass(frozen=True)
class Initialiser:
    """How a parameter starts: `scale` is sigma (cut at three), the half width, or the value."""

    kind: Literal["truncated_normal", "uniform", "constant"]
    scale: float

    def draw(self, shape: torch.Size, source: torch.Generator) -> Tensor:
        """A float32 CPU tensor of these values."""
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        if self.kind == "constant":
            return value.fill_(self.scale)
        if self.kind == "uniform":
            return value.uniform_(-self.scale, self.scale, generator=source)
        bound = 3 * self.scale
        return nn.init.trunc_normal_(value, std=self.scale, a=-bound, b=bound, generator=source)


class HasInitialisers(Protocol):
    """A module that states how each of its parameters starts."""

    def initialisers(self) -> dict[str, Initialiser]:
        """One entry for each parameter, by name."""
        ...


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose alone."""
    number = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(number, "big") >> 1)


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a module that has `initialisers`.

    A value is a function of the seed and the parameter's name in `module` alone; it is drawn on
    the CPU in float32, so that device, precision and order of parameters change nothing.
    """
    table = cast(HasInitialisers, module).initialisers()
    parameters = dict(module.named_parameters())
    assert table.keys() == parameters.keys(), table.keys() ^ parameters.keys()
    for name, parameter in parameters.items():
        put(parameter, table[name].draw(parameter.shape, generator(seed, name)))


class _Unset(nn.Module):
    def reset_parameters(self) -> None:
        """Draw nothing: NaN until initialised or loaded, so that forgetting shows."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))


class Linear(_Unset, nn.Linear):
    """A linear layer that is unset (NaN) until initialised or loaded."""


class Embedding(_Unset, nn.Embedding):
    """An embedding that is unset (NaN) until initialised or loaded."""
