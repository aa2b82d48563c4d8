"""README.md of an exported folder (model_card.md.jinja), and what an export reports.

The same store gives the same bytes: no date, no path of this machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined

from midstream.config import AnyEncoderConfig, DecoderConfig, FusedEncoder, PatchProjection
from midstream.model.vlm import VLM
from midstream.study.stages import (
    Continue,
    Finetune,
    FuseEncoders,
    LoadModel,
    PrepareSource,
    Stage,
    came_from,
)
from midstream.study.store import Ledger
from midstream.work.open_model import OpenedModel, evaluations

MARK = "midstream_export.json"
MISSING = "missing"


@dataclass(frozen=True)
class ExportReport:
    """`kind`: a language model, stock Llava classes, or a modelling file of our own.

    `reason` says why this kind. `largest_difference` is that of any logit from Midstream's own, on
    one fixed prompt; `notes` say what else differs.
    """

    kind: Literal["text", "llava", "own"]
    architecture: str
    own_code: bool
    reason: str
    num_parameters: int
    largest_difference: float
    notes: tuple[str, ...] = ()


def model_card(opened: OpenedModel, report: ExportReport) -> str:
    """The card as Markdown."""
    sees = opened.vlm.config.encoder if report.kind != "text" else None
    # Markdown, not HTML: names and numbers of our own ledger.
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent}
    source = files("midstream.exchange").joinpath("model_card.md.jinja").read_text("utf-8")
    return environment.from_string(source).render(
        name=opened.name,
        report=report,
        decoder=_decoder(opened.vlm),
        encoder=None if sees is None else _encoder(sees),
        projector=_widths(opened.vlm, sees),
        attention=opened.vlm.config.attention,
        trust=", trust_remote_code=True" if report.own_code else "",
        stages=[
            {"share": share, **_results(stage, opened.ledger)} for stage, share in _history(opened)
        ],
        scores=[_results(stage, opened.ledger) for stage in evaluations(opened)],
    )


def _decoder(vlm: VLM) -> str:
    config = vlm.config.decoder
    kind = "OpenLM" if isinstance(config, DecoderConfig) else config.model_type
    return (
        f"{kind}, width {config.hidden_size:,}, {config.num_layers} layers, {config.num_heads} "
        f"heads, {config.vocab_size:,} rows of vocabulary"
    )


def _encoder(config: AnyEncoderConfig) -> str:
    size = f"{config.image_size} x {config.image_size} pixels, {config.num_patches} patches"
    if isinstance(config, FusedEncoder):
        return f"{' and '.join(tower.family for tower in config.towers)} side by side, {size}"
    if isinstance(config, PatchProjection):
        return f"a linear map of raw patches, {size}"
    norm = "with" if config.final_norm else "without"
    return (
        f"{config.family}, width {config.hidden_size:,}, {config.num_layers} layers, features of "
        f"layer {config.feature_layer} {norm} the final norm, {size}"
    )


def _widths(vlm: VLM, sees: AnyEncoderConfig | None) -> tuple[int, ...]:
    config = vlm.config
    wide = config.decoder.hidden_size
    return () if sees is None else config.projector.widths(sees.hidden_size, wide)


def _history(opened: OpenedModel) -> Iterator[tuple[Stage, float]]:
    """The training stages behind the model with the share that was used, the first one first."""
    chain: list[tuple[Stage, float]] = []
    stage: Stage | None = opened.stage
    share = opened.completion
    while stage is not None:
        chain.append((stage, share))
        before = came_from(stage)
        encoder = None
        if isinstance(stage, LoadModel | Continue | Finetune):
            encoder = stage.encoder_stage
        # Before the first stage that sees.
        if encoder is not None and not (before and isinstance(before[0], LoadModel | Continue)):
            chain.append((encoder, 1.0))
            towers = encoder.towers if isinstance(encoder, FuseEncoders) else ()
            chain += [(tower, 1.0) for tower in reversed(towers)]
        stage, share = before or (None, 1.0)
    yield from reversed(chain)


def _results(stage: Any, ledger: Ledger) -> dict[str, Any]:
    """What the template tells of a stage; its results are empty where the store lacks them."""
    tokenizer = getattr(getattr(stage, "data", None), "vocabulary", None)
    held = ledger.results(tokenizer) if tokenizer and ledger.is_done(tokenizer) else {}
    return {
        "stage": stage,
        "results": ledger.results(stage) if ledger.is_done(stage) else {},
        "read": [parent for parent in stage.parents if isinstance(parent, PrepareSource)],
        "tokenizer": held.get("tokenizer_sha256", MISSING),
    }


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"


def _number(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
