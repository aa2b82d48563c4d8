"""Scales along the checkpoints of other people's models: the paper's settings around them.

Our choice (U) where the paper's numbers are its models': 20 image-text tokens a parameter, a
twentieth of them warming up again to the run's own peak, and an end at a hundredth of that (as the
paper's 3e-3 and 3e-5).
"""

from dataclasses import replace
from pathlib import Path

from midstream.config import AnyDecoderConfig, EncoderConfig
from midstream.recipes.paper_scale import Asked, scale_of
from midstream.recipes.paper_sources import imported, world
from midstream.recipes.scale import Scale
from midstream.study.families import rates_along
from midstream.study.imported import ImportRecord, Position, read_import
from midstream.study.revisions import PUBLIC_MODELS
from midstream.study.stage import PLANNED, Imported, LoadDecoder

IMPORTED = "imported"
IMAGE_TEXT_MULTIPLE = 20
WARMUP_SHARE = 0.05
END_SHARE = 0.01
# Where neither a table nor an import tells the run's peak: the paper's at most of its sizes.
PEAK = 3e-3


def public_scale(name: str, asked: Asked) -> Scale:
    """A public model by its name in `study/revisions.py`, or the checkpoints of your own.

    Those of your own lie under INPUTS/checkpoints, in folders named by the percentage of their run.
    Raises ValueError where there are none, or where they are not of one model.
    """
    found = _own(asked) if name == IMPORTED else _public(name, asked)
    records = {
        share: read_import(one.folder) for share, (one, _) in found.items() if _is_there(one)
    }
    decoder = _decoder(name, records)
    folders = [one.folder for one, _ in found.values() if _is_there(one)]
    positions = {share: position for share, (_, position) in found.items()}
    positions |= {share: one.position for share, one in records.items() if one.position is not None}
    peak = next((p.peak_rate for p in positions.values() if p.peak_rate), PEAK)
    end = round(END_SHARE * peak, 12)
    tokens = IMAGE_TEXT_MULTIPLE * decoder.num_parameters
    tokenizer = folders[0] / "tokenizer.json" if folders else None
    data = world(asked.inputs if folders else None, tokenizer)
    text = {
        share: LoadDecoder(
            data=data,
            checkpoint=one,
            decoder=decoder,
            planned_rate=positions[share].rate,
            planned_tokens=positions[share].tokens_seen,
            planned_total_tokens=positions[share].total_tokens,
        )
        for share, (one, _) in found.items()
    }
    made = scale_of(
        name,
        decoder,
        data,
        text,
        asked,
        image_text_tokens=tokens,
        rewarm_peak=peak,
        rewarm_steps=0.0,
        end_rate=end,
        text_rates=() if name == IMPORTED else rates_along(PUBLIC_MODELS[name].repository),
        notes=(
            f"{name} is no model of the paper. Settings are the paper's; {IMAGE_TEXT_MULTIPLE} "
            "image-text tokens a parameter, and a rate that is warmed up again to "
            f"{peak:g} or ends at {end:g}, are our choice.",
        ),
    )
    return replace(made, rewarm=made.rewarm.model_copy(update={"warmup_fraction": WARMUP_SHARE}))


def _public(name: str, asked: Asked) -> dict[float, tuple[Imported, Position]]:
    model = PUBLIC_MODELS[name]
    return {
        share: (
            imported(asked.inputs, "checkpoints", f"{name}/{share * 100:.0f}", model.source(share)),
            model.position(share),
        )
        for share in model.revisions
    }


def _own(asked: Asked) -> dict[float, tuple[Imported, Position]]:
    folder = (asked.inputs or Path("INPUTS")) / "checkpoints"
    found: dict[float, tuple[Imported, Position]] = {}
    for path in folder.glob("*") if asked.inputs else ():
        try:
            share = float(path.name) / 100
        except ValueError:
            continue
        found[share] = (imported(asked.inputs, "checkpoints", path.name, ""), Position())
    if not found:
        raise ValueError(
            f"scale 'imported' goes along the checkpoints of {folder}, in folders named by the "
            "percentage of their run (20, 37.5, 100), and there is none; make them with midstream "
            "import and name their folder with --set inputs=DIR"
        )
    return dict(sorted(found.items()))


def _is_there(one: Imported) -> bool:
    return not one.content.startswith(PLANNED)


def _decoder(name: str, records: dict[float, ImportRecord]) -> AnyDecoderConfig:
    """The model that all imported checkpoints are of; as published where none is there."""
    known = {share: record.config for share, record in records.items()}
    for share, config in known.items():
        first, other = next(iter(known.items()))
        if isinstance(config, EncoderConfig):
            raise ValueError(
                f"the checkpoint at {share:.0%} is a vision encoder, no language model"
            )
        if config != other:
            raise ValueError(
                f"the checkpoints at {first:.0%} and {share:.0%} are of two models; import "
                "revisions of one, with the same --add-token and --pad-vocab-to"
            )
    for config in known.values():
        assert not isinstance(config, EncoderConfig), "refused above"
        return config
    return PUBLIC_MODELS[name].decoder
