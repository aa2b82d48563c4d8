"""`midstream export`: a model out of a store as a Hugging Face folder that needs no Midstream.

A language model, and the text part of one that sees, become a folder for `AutoModelForCausalLM`; a
model that sees becomes stock Llava classes where these compute the same (`no_llava`), else it
brings a modelling file of its own (`trust_remote_code`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from midstream.config import AnyEncoderConfig, EncoderConfig, FusedEncoder, ImageTransform
from midstream.core.storage import new_folder, write_bytes, write_json
from midstream.data.examples import IMAGE_MARK, TextCodec, question_ids
from midstream.data.images import encode_fixed
from midstream.exchange.card import MARK, ExportReport, model_card
from midstream.exchange.export_stock import (
    OPENLM_CODE,
    check_tokenizer,
    generation_config,
    image_token,
    no_llava,
    read_back,
    save_model,
    text_config,
    text_weights,
    write_chat_template,
    write_code,
    write_llava,
    write_text,
    write_tokenizer,
)
from midstream.exchange.towers import fixed_tower, inner_width, num_blocks, towers_of
from midstream.model.pretrained import TransformersDecoder
from midstream.model.vision import VisionEncoder
from midstream.model.vlm import VLM
from midstream.work.open_model import OpenedModel, open_model
from midstream.work.protocol import Channel, Request

CODE = (
    *OPENLM_CODE,
    "modeling_midstream.py",
    "processing_midstream.py",
    "image_processing_midstream.py",
)
_IMAGE_PROCESSOR = "image_processing_midstream.MidstreamImageProcessor"


def write_own(
    vlm: VLM, codec: TextCodec, encoder: VisionEncoder, folder: Path
) -> tuple[nn.Module, tuple[str, ...]]:
    """Write the folder; the model as read back from it, and notes on what differs."""
    from midstream.exchange.modeling.configuration_midstream import MidstreamConfig
    from midstream.exchange.modeling.modeling_midstream import MidstreamForConditionalGeneration

    sees = vlm.config.encoder
    assert sees is not None
    token = image_token(codec)
    text = text_config(vlm.decoder, codec)
    frozen = isinstance(sees, EncoderConfig | FusedEncoder) and not vlm.config.owns_encoder
    config = MidstreamConfig(
        text_config=text,
        vision={"num_patches": sees.num_patches, "towers": _descriptions(sees)},
        projector_widths=list(
            vlm.config.projector.widths(sees.hidden_size, vlm.config.decoder.hidden_size)
        ),
        attention="prefix" if vlm.config.attention == "prefix" else "causal",
        feature_dtype=cast(Any, sees).feature_dtype if frozen else None,
        image_token_id=token,
        separator_token_id=codec.separator,
        auto_map={
            "AutoConfig": "configuration_midstream.MidstreamConfig",
            "AutoModelForImageTextToText": "modeling_midstream.MidstreamForConditionalGeneration",
            "AutoProcessor": "processing_midstream.MidstreamProcessor",
            "AutoImageProcessor": _IMAGE_PROCESSOR,
        },
    )
    write_code(folder, *CODE)
    write_tokenizer(codec, folder, sees=True)
    write_chat_template(codec, folder, sees=True)
    write_json(folder / "processor_config.json", _processor(sees))
    write_json(folder / "preprocessor_config.json", _image_processor(sees.transform))
    stops = generation_config(codec, chats=True)
    weights = _weights(vlm, encoder)
    kind = save_model(MidstreamForConditionalGeneration, config, weights, stops, folder)
    check_tokenizer(folder, codec, config, chats=True)
    notes: tuple[str, ...] = ()
    if token >= vlm.config.decoder.vocab_size:
        notes = (f"{IMAGE_MARK} has the id {token}, behind the vocabulary's rows; it needs none.",)
    return read_back(kind, folder), notes


def _weights(vlm: VLM, encoder: VisionEncoder) -> dict[str, Tensor]:
    assert vlm.projector is not None, "it has an encoder"
    assert vlm.config.encoder is not None
    found: dict[str, Tensor] = {}
    for index, (config, tower) in enumerate(towers_of(vlm.config.encoder, encoder)):
        for name, value in fixed_tower(config, tower).items():
            found[f"towers.{index}.{name}"] = value
    layers = [layer for layer in vlm.projector.modules() if isinstance(layer, nn.Linear)]
    for index, layer in enumerate(layers):
        for name, value in layer.state_dict().items():
            found[f"projector.layers.{index}.{name}"] = value
    for name, value in text_weights(vlm.decoder).items():
        found[f"language_model.{name}"] = value
    return found


def _descriptions(sees: AnyEncoderConfig) -> list[dict[str, Any]]:
    """Each tower as `modeling_midstream.VisionTower` takes it."""
    if isinstance(sees, FusedEncoder):
        first = sees.towers[0].transform
        return [_description(tower, first) for tower in sees.towers]
    if isinstance(sees, EncoderConfig):
        return [_description(sees, sees.transform)]
    return [
        {
            **{"hidden_size": sees.hidden_size, "patch_size": sees.patch_size},
            **{"num_patches": sees.num_patches, "num_prefix": 0, "num_blocks": 0},
            **{
                "positions": False,
                "rotary": False,
                "pre_norm": False,
                "final_norm": False,
                "repaint": None,
                "norm_eps": 1e-6,
            },
        }
    ]


def _description(tower: EncoderConfig, given: ImageTransform) -> dict[str, Any]:
    is_dino = tower.family == "dinov2"
    return {
        "hidden_size": tower.hidden_size,
        "intermediate_size": inner_width(tower),
        "num_heads": tower.num_heads,
        "num_blocks": num_blocks(tower),
        "patch_size": tower.patch_size,
        "num_patches": tower.num_patches,
        "num_prefix": tower.num_prefix,
        "pre_norm": tower.family == "clip",
        "positions": tower.family != "dinov3",
        "layer_scale": is_dino,
        "rotary": tower.family == "dinov3",
        "swiglu": tower.ffn == "swiglu",
        "hidden_act": tower.hidden_act,
        "norm_eps": tower.norm_eps,
        "final_norm": tower.final_norm,
        "repaint": _repaint(tower, given),
    }


def _repaint(tower: EncoderConfig, given: ImageTransform) -> list[list[float]] | None:
    """Std and mean of the first tower's pixels, mean and std of this one's, where these differ."""
    mine = tower.transform
    if (mine.mean, mine.std) == (given.mean, given.std):
        return None
    return [list(row) for row in (given.std, given.mean, mine.mean, mine.std)]


def _processor(sees: AnyEncoderConfig) -> dict[str, Any]:
    return {
        "processor_class": "MidstreamProcessor",
        "auto_map": {"AutoProcessor": "processing_midstream.MidstreamProcessor"},
        "num_image_tokens": sees.num_patches,
        "image_token": IMAGE_MARK,
    }


def _image_processor(transform: ImageTransform) -> dict[str, Any]:
    return {
        "image_processor_type": "MidstreamImageProcessor",
        "auto_map": {"AutoImageProcessor": _IMAGE_PROCESSOR},
        "image_size": transform.size,
        "resize": transform.resize,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


_QUESTION = "What colour is the thing in the middle?"
# Two ways to the same float32 logits differ by this share of the largest one at most.
_TOLERANCE = 1e-3


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
    seeing = opened.encoder
    refuse(opened.vlm, opened.codec, None if text_only else seeing, out)
    if text_only and seeing is None:
        raise ValueError(f"{opened.name} sees nothing and is exported as text; drop --text-only")
    with new_folder(out) as folder:
        report = write_folder(opened.vlm, opened.codec, None if text_only else seeing, folder)
        write_bytes(folder / "README.md", model_card(opened, report).encode())
        write_json(folder / MARK, report.as_json() | {"stage": opened.name})
    return report


def refuse(vlm: VLM, codec: TextCodec, encoder: VisionEncoder | None, out: Path) -> None:
    """Raises ValueError if the model cannot be exported to `out`."""
    if out.exists() and not (out / MARK).is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no exported folder; give another --out")
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
    chats = vlm.config.encoder is not None
    with _quiet():
        if encoder is None:
            return _text(vlm, codec, folder, chats=chats)
        reason = no_llava(vlm.config)
        if reason is None:
            return _llava(vlm, codec, encoder, folder)
        model, notes = write_own(vlm, codec, encoder, folder)
        found = _picture_logits(model, vlm, codec, folder)
        expected = prompt_logits(vlm, codec, _features(vlm, encoder, rounded=True))
    return _report("own", model, _same(found, expected), f"Own modelling file: {reason}.", notes)


def _text(vlm: VLM, codec: TextCodec, folder: Path, *, chats: bool) -> ExportReport:
    model = write_text(vlm.decoder, codec, folder, chats=chats)
    ids = question_ids(codec, _QUESTION, has_image=False)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0]
    difference = _same(found, prompt_logits(vlm, codec, None))
    if isinstance(vlm.decoder, TransformersDecoder):
        reason = "A decoder of transformers is a folder of its own class."
    else:
        reason = "An OpenLM decoder brings its own modelling file."
    notes = ("Without what the model sees with.",) if chats else ()
    return _report("text", model, difference, reason, notes)


def _llava(vlm: VLM, codec: TextCodec, encoder: VisionEncoder, folder: Path) -> ExportReport:
    model, notes = write_llava(vlm, codec, encoder, folder)
    found = _picture_logits(model, vlm, codec, folder)
    rows = vlm.config.decoder.vocab_size
    _same(found[:, :rows], prompt_logits(vlm, codec, _features(vlm, encoder, rounded=False)))
    # What is left is the rounding of features, which stock classes do not do.
    trained = prompt_logits(vlm, codec, _features(vlm, encoder, rounded=True))
    difference = float((found[:, :rows] - trained).abs().max())
    if _rounds(vlm):
        notes = (*notes, "Features are not rounded as in training; the difference is from that.")
    reason = "Stock Llava classes compute the same."
    return _report("llava", model, difference, reason, notes)


def _report(
    kind: Any, model: nn.Module, difference: float, reason: str, notes: tuple[str, ...]
) -> ExportReport:
    return ExportReport(
        kind=kind,
        architecture=type(model).__name__,
        own_code=type(model).__module__.startswith("midstream."),
        reason=reason,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        largest_difference=difference,
        notes=notes,
    )


def _rounds(vlm: VLM) -> bool:
    """Whether training saw an encoder's features rounded."""
    config = vlm.config.encoder
    if vlm.config.owns_encoder or not isinstance(config, EncoderConfig | FusedEncoder):
        return False
    return config.feature_dtype != "float32"


def _same(found: Tensor, expected: Tensor) -> float:
    difference = float((found[:, : expected.shape[1]] - expected).abs().max())
    limit = _TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise RuntimeError(
            f"the exported folder, read back, gives logits that differ by {difference:.2e} from "
            f"the model's, more than {limit:.2e}: this version of transformers computes otherwise"
        )
    return difference


# ------------------------------------------------------------------- one prompt, asked of both


@torch.no_grad()
def prompt_logits(vlm: VLM, codec: TextCodec, features: Tensor | None) -> Tensor:
    """Midstream's logits [positions, vocabulary] of one question, behind a picture's features."""
    ids = torch.tensor([question_ids(codec, _QUESTION, has_image=features is not None)])
    embeddings = vlm.decoder.embed(ids)
    if features is not None:
        projected = vlm.project(features, embeddings)
        assert projected is not None
        begin = vlm.decoder.embed(torch.tensor([codec.begin_ids], dtype=torch.int64))
        embeddings = torch.cat((begin, projected, embeddings), dim=1)
    length = embeddings.shape[1]
    prefix = vlm.config.attention == "prefix"
    mask = torch.ones((1, 1, length, length), dtype=torch.bool) if prefix else None
    hidden = vlm.decoder(embeddings, torch.arange(length)[None], mask)
    logits: Tensor = vlm.decoder.output(hidden)[0]
    return logits


@torch.no_grad()
def _picture_logits(model: nn.Module, vlm: VLM, codec: TextCodec, folder: Path) -> Tensor:
    assert vlm.config.encoder is not None
    token = int(model.config.image_token_id)  # type: ignore[union-attr, arg-type]
    ids = codec.begin_ids + [token] * vlm.config.encoder.num_patches
    ids += question_ids(codec, _QUESTION, has_image=True)
    found: Tensor = model(input_ids=torch.tensor([ids]), pixel_values=_picture(vlm)).logits[0]
    return found


@torch.no_grad()
def _features(vlm: VLM, encoder: VisionEncoder, *, rounded: bool) -> Tensor:
    config, picture = vlm.config.encoder, _picture(vlm)
    if rounded and isinstance(config, EncoderConfig | FusedEncoder) and not vlm.config.owns_encoder:
        return encode_fixed(encoder, picture, config)
    features: Tensor = encoder(picture)
    return features


def _picture(vlm: VLM) -> Tensor:
    """Pixels of one picture of waves, the same for everyone."""
    assert vlm.config.encoder is not None
    size = vlm.config.encoder.image_size
    row, column = np.mgrid[:size, :size] / size
    planes = [np.sin(9 * row * (one + 1) + 5 * column) for one in range(3)]
    return torch.from_numpy(np.stack(planes).astype(np.float32))[None]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars of transformers from the terminal."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
