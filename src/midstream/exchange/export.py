"""`midstream export`: a model out of a store as a Hugging Face folder that needs no Midstream."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor, nn

from midstream.config import (
    AnyEncoderConfig,
    EncoderConfig,
    FusedEncoder,
    ImageTransform,
    PatchProjection,
)
from midstream.core.batch import IGNORE, Batch
from midstream.core.storage import new_folder, write_bytes, write_json
from midstream.core.tokens import TokenCount
from midstream.data.examples import IMAGE_MARK, TextCodec, question_ids
from midstream.data.images import encode_fixed
from midstream.exchange.export_stock import (
    OPENLM_CODE,
    finish,
    image_token,
    no_llava,
    text_config,
    text_weights,
    write_code,
    write_llava,
    write_text,
)
from midstream.exchange.towers import fixed_tower, inner_width
from midstream.model.pretrained import TransformersDecoder
from midstream.model.vision import FusedTowers, VisionEncoder, num_blocks
from midstream.model.vlm import VLM
from midstream.study.stages import (
    Continue,
    LoadModel,
    PrepareSource,
    Stage,
    came_from,
    encoders_of,
    lineage,
)
from midstream.study.store import Ledger
from midstream.work.open_model import OpenedModel, evaluations, open_model
from midstream.work.protocol import Channel, Request

MARK = "midstream_export.json"
MISSING = "missing"
_CODE = (
    *OPENLM_CODE,
    "modeling_connectors.py",
    "modeling_gated.py",
    "modeling_midstream.py",
    "processing_midstream.py",
)
_PROCESSOR = "processing_midstream.MidstreamProcessor"
_IMAGE_PROCESSOR = "processing_midstream.MidstreamImageProcessor"
_QUESTION = "What colour is the thing in the middle?"
# Two ways to the same float32 logits differ by this share of the largest one at most.
_TOLERANCE = 1e-3


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


class ExportRequest(Request):
    """A stage's folder or a milestone, and the folder that is written of it."""

    checkpoint: Path
    out: Path
    text_only: bool


def serve(request: ExportRequest, channel: Channel) -> None:
    """Export as the request says and print what was written."""
    opened = open_model(request.checkpoint, torch.device("cpu"))
    report = export(opened, request.out, text_only=request.text_only)
    print(f"{request.out}: {report.architecture}, {report.num_parameters:,} parameters")
    print(f"  {report.reason}")
    for note in report.notes:
        print(f"  {note}")
    print(f"  largest difference of a logit from Midstream's: {report.largest_difference:.1e}")


def export(opened: OpenedModel, out: Path, *, text_only: bool) -> ExportReport:
    """Write the folder `out`, whole or not at all, with a model card.

    Raises ValueError before anything is written if `out` is something else than an exported
    folder, a weight is not finite, `text_only` leaves nothing out, or the tokenizer cannot be
    written; RuntimeError if the folder, read back, computes something else than the model.
    """
    encoder = None if text_only else opened.encoder
    refuse(opened.vlm, opened.codec, encoder, out)
    if text_only and opened.encoder is None:
        raise ValueError(f"{opened.name} sees nothing and is exported as text; drop --text-only")
    with new_folder(out) as folder:
        report = write_folder(opened.vlm, opened.codec, encoder, folder)
        write_bytes(folder / "README.md", model_card(opened, report).encode())
        write_json(folder / MARK, asdict(report) | {"stage": opened.name})
    return report


def refuse(vlm: VLM, codec: TextCodec, encoder: VisionEncoder | None, out: Path) -> None:
    """Raises ValueError if the model cannot be exported to `out`."""
    if out.exists() and not (out / MARK).is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no exported folder; give another --out")
    if vlm.gated is not None and encoder is None:
        raise ValueError(
            "the gated blocks of this model change text, too; export it whole, or its text stage"
        )
    for module in (vlm, encoder):
        for name, value in module.state_dict().items() if module is not None else ():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} holds numbers that are not finite; nothing to export")
    rows = vlm.config.decoder.vocab_size
    if codec.size > rows:
        raise ValueError(f"the tokenizer has {codec.size:,} ids, the model {rows:,} rows for them")


def write_folder(
    vlm: VLM, codec: TextCodec, encoder: VisionEncoder | None, folder: Path
) -> ExportReport:
    """Fill an empty folder with the model; without `encoder` its language model alone.

    The folder is read back and compared: see `ExportReport`. Raises RuntimeError if it differs.
    """
    kind: Literal["text", "llava", "own"]
    notes: tuple[str, ...]
    if encoder is None:
        kind, reason = "text", "An OpenLM decoder brings its own modelling file."
        if isinstance(vlm.decoder, TransformersDecoder):
            reason = "A decoder of transformers is a folder of its own class."
        chats = vlm.config.encoder is not None
        model = write_text(vlm.decoder, codec, folder, chats=chats)
        notes = ("Without what the model sees with.",) if chats else ()
    elif (why := no_llava(vlm.config)) is None:
        kind, reason = "llava", "Stock Llava classes compute the same."
        model, notes = write_llava(vlm, codec, encoder, folder)
    else:
        kind, reason = "own", f"Own modelling file: {why}."
        model, notes = write_own(vlm, codec, encoder, folder)
    found = _logits(model, vlm, codec, sees=encoder is not None)
    features = None
    if encoder is not None:
        features = _features(vlm, encoder, rounded=kind == "own")
    expected = prompt_logits(vlm, codec, features)
    difference = float((found[:, : expected.shape[1]] - expected).abs().max())
    limit = _TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise RuntimeError(
            f"the exported folder, read back, gives logits that differ by {difference:.2e} from "
            f"the model's, more than {limit:.2e}: this version of transformers computes otherwise"
        )
    rounds = _is_frozen(vlm) and cast(Any, vlm.config.encoder).feature_dtype != "float32"
    if kind == "llava" and encoder is not None and rounds:
        # What is left is the rounding of features, which stock classes do not do.
        trained = prompt_logits(vlm, codec, _features(vlm, encoder, rounded=True))
        difference = float((found[:, : trained.shape[1]] - trained).abs().max())
        notes += ("Features are not rounded as in training; the difference is from that.",)
    return ExportReport(
        kind=kind,
        architecture=type(model).__name__,
        own_code=type(model).__module__.startswith("midstream."),
        reason=reason,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        largest_difference=difference,
        notes=notes,
    )


# --------------------------------------------------------------------- with our modelling file


def write_own(
    vlm: VLM, codec: TextCodec, encoder: VisionEncoder, folder: Path
) -> tuple[nn.Module, tuple[str, ...]]:
    """Write the folder; the model as read back from it, and notes on what differs."""
    from midstream.exchange.modeling.modeling_midstream import (
        MidstreamConfig,
        MidstreamForConditionalGeneration,
    )

    sees, decoder = vlm.config.encoder, vlm.config.decoder
    reduction, gated = vlm.config.projector.reduction, vlm.config.projector.gated
    assert sees is not None
    token = image_token(codec)
    config = MidstreamConfig(
        text_config=text_config(vlm.decoder, codec),
        vision={"num_patches": vlm.config.image_tokens, "towers": _descriptions(sees)},
        projector_widths=list(vlm.config.projector.widths(sees.hidden_size, decoder.hidden_size)),
        reduction=None if reduction is None else reduction.model_dump(),
        gated=None if gated is None else gated.model_dump(),
        # A row of theirs is one segment.
        attention="causal" if vlm.config.attention == "segments" else vlm.config.attention,
        feature_dtype=cast(Any, sees).feature_dtype if _is_frozen(vlm) else None,
        image_token_id=token,
        separator_token_id=codec.separator,
        auto_map={
            "AutoConfig": "modeling_midstream.MidstreamConfig",
            "AutoModelForImageTextToText": "modeling_midstream.MidstreamForConditionalGeneration",
            "AutoProcessor": _PROCESSOR,
            "AutoImageProcessor": _IMAGE_PROCESSOR,
        },
    )
    write_code(folder, *_CODE)
    words = {
        "processor_class": "MidstreamProcessor",
        "auto_map": {"AutoProcessor": _PROCESSOR},
        "num_image_tokens": vlm.config.image_tokens,
        "image_token": IMAGE_MARK,
    }
    write_json(folder / "processor_config.json", words)
    pictures = {
        "image_processor_type": "MidstreamImageProcessor",
        "auto_map": {"AutoImageProcessor": _IMAGE_PROCESSOR},
        "image_size": sees.transform.size,
        "resize": sees.transform.resize,
        "image_mean": list(sees.transform.mean),
        "image_std": list(sees.transform.std),
    }
    write_json(folder / "preprocessor_config.json", pictures)
    weights, build = _weights(vlm, encoder), MidstreamForConditionalGeneration
    model = finish(build, config, weights, codec, folder, sees=True, chats=True)
    note = f"{IMAGE_MARK} has the id {token}, behind the vocabulary's rows; it needs none."
    return model, (note,) if token >= decoder.vocab_size else ()


def _weights(vlm: VLM, encoder: VisionEncoder) -> dict[str, Tensor]:
    assert vlm.projector is not None, "it has an encoder"
    config = vlm.config.encoder
    assert config is not None
    towers: list[tuple[AnyEncoderConfig, Any]] = [(config, encoder)]
    if isinstance(config, FusedEncoder):
        towers = list(zip(config.towers, cast(FusedTowers, encoder).towers, strict=True))
    layers = [layer for layer in vlm.projector if isinstance(layer, nn.Linear)]
    reduction = dict(vlm.projector.named_children()).get("reduction")
    parts = {f"towers.{index}": fixed_tower(*one) for index, one in enumerate(towers)}
    parts |= {f"projector.layers.{index}": one.state_dict() for index, one in enumerate(layers)}
    if reduction is not None:
        parts["projector.reduction"] = reduction.state_dict()
    if vlm.gated is not None:
        parts["gated"] = vlm.gated.state_dict()
    parts["language_model"] = text_weights(vlm.decoder)
    return {f"{part}.{name}": one for part, held in parts.items() for name, one in held.items()}


def _descriptions(sees: AnyEncoderConfig) -> list[dict[str, Any]]:
    """Each tower as `modeling_midstream.VisionTower` takes it."""
    if isinstance(sees, PatchProjection):
        named = {name: getattr(sees, name) for name in ("hidden_size", "patch_size", "num_patches")}
        none = dict.fromkeys(("positions", "rotary", "pre_norm", "final_norm"), False)
        return [
            named | none | {"num_prefix": 0, "num_blocks": 0, "repaint": None, "norm_eps": 1e-6}
        ]
    towers = sees.towers if isinstance(sees, FusedEncoder) else (sees,)
    return [_description(tower, towers[0].transform) for tower in towers]


def _description(tower: EncoderConfig, given: ImageTransform) -> dict[str, Any]:
    mine = tower.transform
    # Std and mean of the first tower's pixels, mean and std of this one's, where these differ.
    colours = [list(row) for row in (given.std, given.mean, mine.mean, mine.std)]
    same = ("hidden_size", "num_heads", "patch_size", "num_patches", "num_prefix", "hidden_act")
    return {name: getattr(tower, name) for name in (*same, "norm_eps", "final_norm")} | {
        "intermediate_size": inner_width(tower),
        "num_blocks": num_blocks(tower),
        "pre_norm": tower.family == "clip",
        "positions": tower.family != "dinov3",
        "layer_scale": tower.family == "dinov2",
        "rotary": tower.family == "dinov3",
        "swiglu": tower.ffn == "swiglu",
        "repaint": None if (mine.mean, mine.std) == (given.mean, given.std) else colours,
    }


# ------------------------------------------------------------------- one prompt, asked of both


def _is_frozen(vlm: VLM) -> bool:
    """Whether an encoder gave the features that is no part of the model."""
    sees = vlm.config.encoder
    return isinstance(sees, EncoderConfig | FusedEncoder) and not vlm.config.owns_encoder


@torch.no_grad()
def prompt_logits(vlm: VLM, codec: TextCodec, features: Tensor | None) -> Tensor:
    """Midstream's logits [positions, vocabulary] of one question, behind a picture's features."""
    sees, begin, config = features is not None, codec.begin_ids, vlm.config.encoder
    if features is None and config is not None:
        features = torch.zeros((0, config.num_patches, config.hidden_size))
    places = vlm.config.image_tokens if sees else 0
    # No target: with prefix attention all of it is given.
    ids = torch.tensor(
        [begin * sees + [0] * places + question_ids(codec, _QUESTION, has_image=sees)]
    )
    batch = Batch(
        input_ids=ids,
        targets=torch.full_like(ids, IGNORE),
        position_ids=torch.arange(ids.shape[1])[None],
        segment_ids=torch.zeros_like(ids),
        image_slots=torch.tensor([[0, len(begin)]])[:sees],
        images=torch.zeros((int(sees), 0)),
        counts=TokenCount(),
    )
    logits: Tensor = vlm.decoder.output(vlm(batch, features))[0]
    return logits


@torch.no_grad()
def _logits(model: nn.Module, vlm: VLM, codec: TextCodec, *, sees: bool) -> Tensor:
    ids, given = question_ids(codec, _QUESTION, has_image=sees), {}
    if sees:
        assert vlm.config.encoder is not None
        token = int(model.config.image_token_id)  # type: ignore[union-attr, arg-type]
        ids = codec.begin_ids + [token] * vlm.config.image_tokens + ids
        given = {"pixel_values": _picture(vlm)}
    found: Tensor = model(input_ids=torch.tensor([ids]), **given).logits[0]
    return found


@torch.no_grad()
def _features(vlm: VLM, encoder: VisionEncoder, *, rounded: bool) -> Tensor:
    picture = _picture(vlm)
    if rounded and _is_frozen(vlm):
        return encode_fixed(encoder, picture, cast(Any, vlm.config.encoder))
    features: Tensor = encoder(picture)
    return features


def _picture(vlm: VLM) -> Tensor:
    """Pixels of one picture of waves, the same for everyone."""
    assert vlm.config.encoder is not None
    size = vlm.config.encoder.image_size
    row, column = np.mgrid[:size, :size] / size
    planes = [np.sin(9 * row * (one + 1) + 5 * column) for one in range(3)]
    return torch.from_numpy(np.stack(planes).astype(np.float32))[None]


# ---------------------------------------------------------- the card, from the ledger


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
    for stage, share in lineage(opened.stage, opened.completion):
        chain.append((stage, share))
        before = came_from(stage)
        # Before the first stage that sees.
        if not (before and isinstance(before[0], LoadModel | Continue)):
            chain += [(encoder, 1.0) for encoder in reversed(encoders_of(stage))]
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
