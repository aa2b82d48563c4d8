"""README.md of an exported folder (model_card.md.jinja), and what an export reports.

The same store gives the same bytes: no date, no path of this machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined

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
    model = opened.vlm.config
    sees = None if report.kind == "text" else model.encoder
    # Markdown, not HTML: names and numbers of our own ledger.
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent}
    source = files("midstream.exchange").joinpath("model_card.md.jinja").read_text("utf-8")
    return environment.from_string(source).render(
        name=opened.name,
        report=report,
        model=model,
        encoder=sees,
        widths=sees and model.projector.widths(sees.hidden_size, model.decoder.hidden_size),
        trust=", trust_remote_code=True" if report.own_code else "",
        stages=[
            {"share": share, **_results(stage, opened.ledger)} for stage, share in _history(opened)
        ],
        scores=[_results(stage, opened.ledger) for stage in evaluations(opened)],
    )


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
