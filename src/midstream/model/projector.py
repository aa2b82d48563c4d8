"""The connector between encoder and decoder."""

from itertools import pairwise

from torch import nn

from midstream.config import ProjectorConfig
from midstream.model.initialise import Initialiser, Linear


class Projector(nn.Sequential):
    """Linear layers with exact GELU between: encoder -> 4 encoder -> decoder, and a third one at
    decoder width where the config says 3 layers (Prismatic's fused projector, same indices).

    Weights and biases start uniform within fan_in^-1/2, as torch's own linear layers do.
    """

    def __init__(self, config: ProjectorConfig, *, in_width: int, out_width: int) -> None:
        widths = [in_width, 4 * in_width, *[out_width] * (config.num_layers - 1)]
        modules: list[nn.Module] = [Linear(widths[0], widths[1])]
        for fan_in, fan_out in pairwise(widths[1:]):
            modules += [nn.GELU(), Linear(fan_in, fan_out)]
        super().__init__(*modules)

    def initialisers(self) -> dict[str, Initialiser]:
        """One entry for each weight and bias."""
        return {
            f"{index}.{name}": Initialiser("uniform", linear.in_features**-0.5)
            for index, linear in enumerate(self)
            if isinstance(linear, nn.Linear)
            for name in ("weight", "bias")
        }
