"""Midstream's decoder against OpenLM's own, on the same random weights: logits in float32.

    python benchmarks/openlm_parity.py PATH_TO_OPENLM_CHECKOUT

The checkout is github.com/mlfoundations/open_lm; nothing of it is copied. Two models: 79m at its
full size, and `1b narrow`, all 24 layers of 1b at an eighth of its width (256, of 2 heads, so heads
keep their 128 channels). Weights come from Midstream's initialisers; norm gains, which start at
one, are drawn from 0.5 to 1.5 so that a norm in the wrong place shows.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from midstream.config import DECODERS, DecoderConfig
from midstream.model.decoder import Decoder
from midstream.model.weights import generator, initialise

ROWS, LENGTH = 2, 512
MODELS = {
    "79m": DECODERS["79m"],
    "1b narrow": DECODERS["1b"].model_copy(update={"hidden_size": 256, "num_heads": 2}),
}
GOAL = 1e-5


def openlm(checkout: Path) -> Any:
    """The module open_lm.model of a checkout; ValueError if the folder is none."""
    if not (checkout / "open_lm" / "model.py").is_file():
        raise ValueError(f"{checkout} is no checkout of OpenLM: it has no open_lm/model.py")
    # model.py and attention.py import xformers at their head, for attention and feed-forward
    # variants that this comparison does not choose: an empty module does. Should OpenLM reach into
    # it after all, the missing attribute is an error.
    for name in ("xformers", "xformers.ops"):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout))
    return importlib.import_module("open_lm.model")


def theirs(checkout: Path, config: DecoderConfig) -> nn.Module:
    """OpenLM's transformer of the same sizes, as DCLM trains it."""
    model = openlm(checkout)
    norms = importlib.import_module("open_lm.norms")
    attention = importlib.import_module("open_lm.attention")
    built: nn.Module = model.Transformer(
        model.Params(
            dim=config.hidden_size,
            n_layers=config.num_layers,
            n_heads=config.num_heads,
            vocab_size=config.vocab_size,
            norm_eps=config.norm_eps,
            seq_len=2048,
            norm_type=norms.get_norm_class("gain_only_lp_layer_norm"),
            attn_func=attention.torch_attn,
            apply_qk_norm=config.qk_norm,
            positional_embedding_type="rotary",
            ffn_type="swiglu_torch",
        )
    )
    return built


@torch.no_grad()
def compare(checkout: Path, name: str, config: DecoderConfig) -> dict[str, Any]:
    """One row: the largest absolute difference of the logits, and the largest logit."""
    ours, other = Decoder(config), theirs(checkout, config)
    initialise(ours, 0)
    for key, parameter in ours.named_parameters():
        if "norm" in key:
            parameter.uniform_(0.5, 1.5, generator=generator(0, f"gain {key}"))
    left = other.load_state_dict(ours.state_dict(), strict=False)
    # Rotary tables are computed on both sides, so a checkpoint of ours has none.
    wrong = [key for key in left.missing_keys if not key.endswith("inv_freq")]
    if wrong or left.unexpected_keys:
        raise ValueError(f"names differ: {wrong} and {left.unexpected_keys}")
    input_ids = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=generator(0, "ids"))
    position_ids = torch.arange(LENGTH).expand(ROWS, -1)
    mine = ours.output(ours(ours.embed(input_ids), position_ids, None))
    reference = other(input_ids)[0]
    return {
        "model": name,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "qk_norm": config.qk_norm,
        "rows": ROWS,
        "positions": LENGTH,
        "largest_difference": float((mine - reference).abs().max()),
        "largest_logit": float(reference.abs().max()),
        "same_argmax": float((mine.argmax(-1) == reference.argmax(-1)).float().mean()),
    }


def differences(checkout: Path) -> list[dict[str, Any]]:
    """Each model with and without qk-norm, in float32 on the CPU."""
    return [
        compare(checkout, name, config.model_copy(update={"qk_norm": qk_norm}))
        for name, config in MODELS.items()
        for qk_norm in (True, False)
    ]


def main() -> None:
    """Print the table; end with an error if a difference is above the goal."""
    parser = argparse.ArgumentParser(description="decoder parity with OpenLM")
    parser.add_argument("checkout", type=Path, help="folder of a checkout of OpenLM")
    rows = differences(parser.parse_args().checkout)
    columns = ("model", "sizes", "qk-norm", "largest difference", "largest logit", "same argmax")
    table = Table(*columns, title=f"float32 logits, {ROWS} rows of {LENGTH} positions")
    for row in rows:
        sizes = f"{row['num_layers']} x {row['hidden_size']}, {row['num_heads']} heads"
        table.add_row(
            row["model"],
            sizes,
            "yes" if row["qk_norm"] else "no",
            f"{row['largest_difference']:.2e}",
            f"{row['largest_logit']:.3f}",
            f"{row['same_argmax']:.2%}",
        )
    Console(width=100).print(table)
    above = [row for row in rows if not row["largest_difference"] <= GOAL]
    if above:
        sys.exit(f"{len(above)} of {len(rows)} are above {GOAL:g}")


if __name__ == "__main__":
    main()
