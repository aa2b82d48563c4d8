"""The connector between encoder and decoder."""

from itertools import pairwise

from torch import nn

from midstream.config import ProjectorConfig
from midstream.model.initialise import Initialiser, Linear


class Projector(nn.Sequential):
    """Linear layers of `config.widths`, exact GELU between them; names as in Prismatic ("0", "2",
    "4").

    Weights and biases start uniform within fan_in^-1/2, as torch's own linear layers do (and with
    them LLaVA's and Prismatic's).
    """

    def __init__(self, config: ProjectorConfig, *, in_width: int, out_width: int) -> None:
        modules: list[nn.Module] = []
        for fan_in, fan_out in pairwise(config.widths(in_width, out_width)):
            modules += [*([nn.GELU()] if modules else []), Linear(fan_in, fan_out)]
        super().__init__(*modules)

    def initialisers(self) -> dict[str, Initialiser]:
        """One entry for each weight and bias."""
        return {
            f"{index}.{name}": Initialiser("uniform", linear.in_features**-0.5)
            for index, linear in enumerate(self)
            if isinstance(linear, nn.Linear)
            for name in ("weight", "bias")
        }
