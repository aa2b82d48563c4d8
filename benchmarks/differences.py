# ruff: noqa: E402  (the builders of tests/ are found once the path is set)
"""How far Midstream is from OpenLM, from `transformers`, and from its own exports: in numbers.

    python benchmarks/differences.py [--openlm CHECKOUT] [--write docs/differences.md]

Largest absolute differences in float32 on the CPU, on random weights of tiny models (the builders
of `tests/`); OpenLM at the sizes of `openlm_parity.py`. With `--write` the tables become the page.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "exchange"), str(ROOT / "benchmarks")]

import exported
import test_export_vlm
from safetensors.torch import save_file

import checkpoints
import openlm_parity
import vision_checkpoints
from midstream.config import VLMConfig
from midstream.exchange.export import write_folder
from midstream.exchange.towers import read_encoder
from midstream.model.pretrained import TransformersDecoder, describe
from midstream.model.vision import build_encoder, load_encoder

Table = tuple[str, list[str], list[list[str]]]
SEEDS = range(5)


def shown(value: float) -> str:
    """A difference as it stands in a table."""
    return "0" if value == 0 else f"{value:.1e}"


def largest(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference."""
    return float((one - other).abs().max())


def openlm(checkout: Path) -> Table:
    """Logits of the OpenLM decoder."""
    rows = [
        [
            row["model"],
            "yes" if row["qk_norm"] else "no",
            shown(row["largest_difference"]),
            f"{row['largest_logit']:.2f}",
        ]
        for row in openlm_parity.differences(checkout)
    ]
    title = "OpenLM's `Transformer` and `model/decoder.py`: logits, 2 rows of 512 positions"
    return title, ["model", "qk-norm", "largest difference", "largest logit"], rows


@torch.no_grad()
def decoders() -> Table:
    """Logits of each family, on causal rows, on segments, and token by token with the cache."""
    rows = []
    for family in checkpoints.FAMILIES:
        causal = segments = cached = logit = 0.0
        for seed in SEEDS:
            model = checkpoints.build_model(family, seed=seed)
            ours = TransformersDecoder(describe(model.config))
            state = {
                str(ours.parameter_name(name)): value for name, value in model.state_dict().items()
            }
            ours.load_state_dict(state)
            ours.eval()
            source = torch.Generator().manual_seed(seed)
            ids = torch.randint(checkpoints.VOCAB_SIZE, (2, 48), generator=source)
            places = torch.arange(48).expand(2, -1)
            theirs = model(ids).logits
            mine = ours.output(ours(ours.embed(ids), places, None))
            causal, logit = (
                max(causal, largest(mine, theirs)),
                max(logit, float(theirs.abs().max())),
            )
            # Two documents in a row, against each of them alone.
            segment = (torch.arange(48) >= 20).long()
            mask = (segment[:, None] == segment).tril()[None, None].expand(2, -1, -1, -1)
            split = torch.cat((torch.arange(20), torch.arange(28))).expand(2, -1)
            apart = ours.output(ours(ours.embed(ids), split, mask))
            alone = torch.cat((model(ids[:, :20]).logits, model(ids[:, 20:]).logits), dim=1)
            segments = max(segments, largest(apart, alone))
            cache = ours.new_cache(rows=2, columns=48, dtype=torch.float32, device=ids.device)
            steps = [
                ours.output(
                    ours(
                        ours.embed(ids[:, at : at + 1]),
                        places[:, at : at + 1],
                        torch.ones((2, 1, 1, at + 1), dtype=torch.bool),
                        cache,
                    )
                )
                for at in range(48)
            ]
            cached = max(cached, largest(torch.cat(steps, dim=1), theirs))
        values = [shown(causal), shown(segments), shown(cached), f"{logit:.2f}"]
        rows.append([f"`{family}`", *values])
    title = "`transformers`' language models and `model/pretrained.py`: logits, five seeds"
    heads = ["family", "causal rows", "segments, against each alone", "one token at a time"]
    return title, [*heads, "largest logit"], rows


@torch.no_grad()
def towers(scratch: Path) -> Table:
    """Patch features of each tower, as it is and with its positions interpolated."""
    rows = []
    for kind in vision_checkpoints.BUILD:
        folder = vision_checkpoints.save_tower(kind, scratch / kind)
        config, tensors, _, _ = read_encoder(folder)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "tower.safetensors")
        found = []
        for size in (config.image_size, config.image_size * 3 // 2 // 8 * 8):
            encoder = build_encoder(config.model_copy(update={"image_size": size}))
            load_encoder(encoder, folder / "tower.safetensors")
            pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
            expected = vision_checkpoints.hidden_states(kind, pixels)[config.feature_layer]
            found.append(largest(encoder(pixels), expected))
            scale = float(expected.abs().max())
        rows.append([kind, *map(shown, found), f"{scale:.2f}"])
    title = (
        "`transformers`' vision towers and `model/vision.py`: features of the layer before the last"
    )
    heads = ["tower", "its own resolution", "one and a half times", "largest feature"]
    return title, heads, rows


def with_features(config: VLMConfig, dtype: str) -> VLMConfig:
    """The same model, its encoder's features rounded otherwise."""
    assert config.encoder is not None
    encoder = config.encoder.model_copy(update={"feature_dtype": dtype})
    return config.model_copy(update={"encoder": encoder})


def parts_of(config: VLMConfig) -> list[str]:
    """What a model is made of, for a table."""
    decoder, encoder = config.decoder, config.encoder
    kind = getattr(decoder, "model_type", "OpenLM")
    kind += ", tied" if getattr(decoder, "tied_embeddings", False) else ""
    if encoder is None:
        return [kind, "", "", config.attention, ""]
    sees = getattr(encoder, "family", encoder.kind)
    sees += ", registers" if getattr(encoder, "num_registers", 0) else ""
    sees += ", interpolated" if getattr(encoder, "position_size", None) else ""
    sees += ", final norm" if getattr(encoder, "final_norm", False) else ""
    widths = config.projector.widths(encoder.hidden_size, decoder.hidden_size)
    dtype = "owned" if config.owns_encoder else str(getattr(encoder, "feature_dtype", ""))
    return [kind, sees, "-".join(map(str, widths)), config.attention, dtype]


def exports(scratch: Path) -> Table:
    """Logits of exported folders, read back, for one question (about a picture)."""
    configs = [VLMConfig(decoder=exported.OPENLM), VLMConfig(decoder=exported.stock())]
    stock = list(test_export_vlm.STOCK.values())
    # As trained with float32 features; and once as with the default's bfloat16.
    configs += [*(with_features(config, "float32") for config in stock), stock[0]]
    configs += test_export_vlm.OWN.values()
    rows = []
    for number, config in enumerate(configs):
        vlm, encoder = exported.made(config)
        folder = scratch / f"export{number}"
        folder.mkdir()
        report = write_folder(vlm, exported.codec(), encoder, folder)
        rows.append([*parts_of(config), report.architecture, shown(report.largest_difference)])
    title = "Exported folders and the models they came from: logits"
    heads = ["decoder", "encoder", "projector", "attention", "features", "class"]
    return title, [*heads, "largest difference"], rows


def text_of(table: Table) -> Iterator[str]:
    """A table in Markdown."""
    title, heads, rows = table
    yield f"## {title}\n"
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


INTRODUCTION = """# How equal

Written by `benchmarks/differences.py`: largest absolute differences on a CPU in float32, torch
{torch}, transformers {transformers}. Weights are random, norms and biases too; the models are tiny,
OpenLM's are `79m` and a narrow `1b` (24 layers). `tests/` hold each of these below a bound.

Zero means the same bits. What is not zero comes from sums in another order: a row of several
documents or of one token has other shapes than one alone. Stock Llava classes round no features:
where training saw a frozen encoder's features in bfloat16, which is the default of most recipes,
that is the difference; with `feature_dtype` float32, or an encoder that is the model's own, there
is none. A modelling file of our own rounds as training does.
"""


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--openlm", type=Path, help="a checkout of github.com/mlfoundations/open_lm"
    )
    parser.add_argument("--write", type=Path, help="the page to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables: list[Any] = [] if arguments.openlm is None else [openlm(arguments.openlm)]
    with tempfile.TemporaryDirectory() as scratch:
        tables += [decoders(), towers(Path(scratch)), exports(Path(scratch))]
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    lines = [INTRODUCTION.format(**versions), *(line for one in tables for line in text_of(one))]
    page = "\n".join(lines)
    if arguments.write is None:
        print(page)
    else:
        arguments.write.write_text(page)


if __name__ == "__main__":
    main()
