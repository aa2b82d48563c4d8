"""README.md of an exported folder, and what an export reports.

The same store gives the same bytes: no date, no path of this machine.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined

from midstream.config import AnyEncoderConfig, DecoderConfig, FusedEncoder, PatchProjection
from midstream.model.vlm import VLM
from midstream.study.results import (
    RESULTS,
    EncoderResult,
    EvaluationResult,
    ImportedResult,
    SourceShare,
    TokenizerResult,
    TowersResult,
    TrainingResult,
)
from midstream.study.stages import (
    Continue,
    Evaluate,
    Finetune,
    FuseEncoders,
    LoadEncoder,
    LoadModel,
    PrepareSource,
    Pretrain,
    Stage,
    came_from,
)
from midstream.study.store import Ledger
from midstream.work.open_model import OpenedModel, evaluations

MARK = "midstream_export.json"


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

    def as_json(self) -> dict[str, Any]:
        """For the folder's mark."""
        return asdict(self)


MISSING = "missing"

_TITLES = {
    "train_encoder": "Encoder",
    "load_encoder": "Encoder, imported",
    "fuse_encoders": "Encoders, side by side",
    "load_decoder": "Language model, imported",
    "load_model": "Images and text, imported",
    "pretrain": "Text",
    "continue": "Images and text",
    "finetune": "Conversations",
}

_LOADING = {
    "text": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))""",
    "picture": """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(folder{trust})
model = AutoModelForImageTextToText.from_pretrained(folder{trust})
content = [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}])
inputs = processor(images=Image.open("picture.jpg"), text=prompt, return_tensors="pt")
new = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(new, skip_special_tokens=True))""",
}


@dataclass(frozen=True)
class StageEntry:
    """A training stage as the card tells it; `sources` are rows of a table."""

    title: str
    name: str
    lines: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ScoreEntry:
    """An evaluation as the card tells it."""

    name: str
    how: str
    rows: tuple[tuple[str, ...], ...]


def model_card(opened: OpenedModel, report: ExportReport) -> str:
    """The card as Markdown."""
    config = opened.vlm.config
    sees = report.kind != "text"
    trust = ", trust_remote_code=True" if report.own_code else ""
    source = files("midstream.exchange").joinpath("model_card.md.jinja").read_text("utf-8")
    # Markdown, not HTML: names and numbers of our own ledger.
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        source
    )
    return template.render(
        name=opened.name,
        report=report,
        num_parameters=report.num_parameters,
        decoder=_decoder(opened.vlm),
        encoder=_encoder(config.encoder) if sees and config.encoder else None,
        projector=_projector(opened.vlm),
        attention=config.attention,
        loading=_LOADING["picture" if sees else "text"].format(trust=trust),
        stages=[_entry(stage, share, opened.ledger) for stage, share in _history(opened)],
        scores=[_score(stage, opened.ledger) for stage in evaluations(opened)],
    )


# ------------------------------------------------------------------------------- the model


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


def _projector(vlm: VLM) -> str:
    config = vlm.config
    if config.encoder is None:
        return "none"
    widths = config.projector.widths(config.encoder.hidden_size, config.decoder.hidden_size)
    return f"widths {', '.join(f'{width:,}' for width in widths)}"


# ---------------------------------------------------------------------------- the training


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


def _entry(stage: Stage, share: float, ledger: Ledger) -> StageEntry:
    results = ledger.result(stage, RESULTS[stage.kind]) if ledger.is_done(stage) else None
    lines: list[str] = []
    if isinstance(stage, LoadEncoder):
        contents = ", ".join(f"`{tower.content}`" for tower in stage.towers)
        lines.append(f"Imported weights, by their content: {contents}")
    if isinstance(stage, FuseEncoders):
        lines += [f"Tower: `{tower.name}`" for tower in stage.towers]
    match results:
        case None:
            lines.append("Its results are missing: the store does not hold this stage.")
        case EncoderResult():
            lines += [
                f"{name}: {_number(getattr(results, name))}"
                for name in ("steps", "final_loss", "retrieval")
            ]
        case TowersResult() | ImportedResult():
            lines += [f"Imported from {one}" for one in results.imported_from]
        case TrainingResult():
            lines += _trained(results)
    if isinstance(results, ImportedResult):
        lines += [
            f"Tokens seen before: {_number(results.tokens_seen_before)}",
            f"Learning rate there: {_number(results.last_rate)}",
        ]
    if share != 1.0:
        lines.append(f"Of this stage, the weights at {share * 100:g} % of its tokens were used.")
    if isinstance(stage, Pretrain | Continue | Finetune):
        lines += _settings(stage)
    if not isinstance(stage, LoadEncoder | FuseEncoders):
        lines.append(f"Data: {_data(stage, ledger)}")
    taken = results.sources if isinstance(results, TrainingResult) else {}
    sources = tuple(_source(name, source) for name, source in sorted(taken.items()))
    return StageEntry(_TITLES[stage.kind], stage.name, tuple(lines), sources)


def _trained(results: TrainingResult) -> list[str]:
    tokens = ", ".join(f"{kind} {count:,}" for kind, count in vars(results.tokens).items() if count)
    return [
        f"Tokens seen: {results.tokens_seen:,} in {results.steps:,} steps, by kind: {tokens}",
        f"Learning rate: first step {results.first_rate:.3g}, last {results.last_rate:.3g}",
        f"Loss at the end: {_number(results.final_loss)}",
    ]


def _settings(stage: Pretrain | Continue | Finetune) -> list[str]:
    training = stage.training
    schedule = training.schedule
    stated = ", ".join(
        f"{name} {value}" for name, value in schedule.model_dump().items() if name != "kind"
    )
    rows = training.rows
    factor = training.encoder_rate_factor
    encoder = "frozen" if factor is None else f"trained at {factor} times the rate"
    lines = [
        f"Schedule: {schedule.kind}, {stated}",
        f"Rows of {rows.row_length:,} tokens, {rows.batch_rows:,} a step; seed {training.seed}; "
        f"weight decay {training.optimizer.weight_decay}",
    ]
    if training.freeze_decoder:
        lines.append("Language model: frozen")
    return lines if isinstance(stage, Pretrain) else [*lines, f"Encoder: {encoder}"]


def _data(stage: Any, ledger: Ledger) -> str:
    data = stage.data
    world = data.world
    name = {"pocket": "the generated pocket world", "small_real": "small real data sets"}.get(
        world.kind, "a folder of the owner's"
    )
    read = [parent for parent in stage.parents if isinstance(parent, PrepareSource)]
    sources = ", ".join(f"{source.source} (`{source.name}`)" for source in read)
    tokenizer = data.vocabulary
    done = ledger.is_done(tokenizer)
    sha256 = ledger.result(tokenizer, TokenizerResult).tokenizer_sha256 if done else MISSING
    sha256 = f"tokenizer sha256 {sha256}"
    return f"{name}{': ' if sources else ''}{sources}; {sha256}"


def _source(name: str, source: SourceShare) -> tuple[str, ...]:
    planned = source.planned_tokens
    return (
        name,
        source.kind,
        _number(source.realised_tokens),
        # The budget says something else than tokens: passes over the source, or sequences.
        "-" if planned is None else _number(planned),
        _number(source.epochs),
        _number(source.examples),
    )


# ------------------------------------------------------------------------------ the scores


def _score(stage: Evaluate, ledger: Ledger) -> ScoreEntry:
    asked = stage.evaluation
    limit = "all examples" if asked.limit is None else f"at most {asked.limit:,} examples a task"
    results = ledger.result(stage, EvaluationResult)
    stable = ", ".join(f"{name} {_percent(value)}" for name, value in results.stable)
    rows = tuple(
        (
            task,
            found.metric,
            *(
                _percent(value) if found.chance is not None else _number(value)
                for value in (found.score, found.stderr, found.chance)
            ),
            "-" if found.kind == "text" else _percent(found.blind),
            _number(found.num_examples),
            _number(found.unparsable),
        )
        for task, found in sorted(results.tasks.items())
    )
    how = f"{limit}, prompts {asked.prompts}; mean of score minus chance: {stable}"
    return ScoreEntry(stage.name, how, rows)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"


def _number(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
