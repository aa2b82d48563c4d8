"""`midstream import`: somebody's checkpoint as a folder that stages load.

A decoder's folder holds model.safetensors (float32, names of `VLM`), optimizer.safetensors where
the checkpoint has Adam's moments, progress.json, tokenizer.json where one is known, and import.json
(`study/imported.py`); an encoder's holds model.safetensors (the whole tower under `transformers`'
names) and import.json; a whole model's holds what a decoder's does, with the projector, and its
towers as folders of their own. It is written whole or not at all, after everything has been read.

Of the embeddings old rows stay as they are. A new row, of the input and of the output matrix alike,
is the mean of the old ones: its logit is then the mean of the old logits, and as the exponential is
convex the new token is at most as likely as one of all tokens drawn at random, whatever the model
has read. A row of zeros could be the most likely of all, and a random one would need a seed. As an
input it lies where the others do. Adam's moments of a new row are zero.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from midstream.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
    TransformersDecoderConfig,
    VLMConfig,
)
from midstream.core.identity import digest
from midstream.core.storage import new_folder, write_bytes, write_json
from midstream.core.tokens import TokenCount
from midstream.data.examples import TextCodec
from midstream.data.prepare_source import canonical_tokenizer
from midstream.exchange import import_parts, import_whole, towers
from midstream.exchange.import_source import (
    NUMBERS,
    ImportRequest,
    LanguageModel,
    Source,
    find_tokenizer,
    locate,
    read_language_model,
    settle,
    summary,
)
from midstream.model.pretrained import with_vocabulary
from midstream.model.vision import build_encoder, load_encoder
from midstream.model.vlm import VLM, build_decoder
from midstream.model.weights import fill, save_weights, weights_digest
from midstream.study.imported import RECORD, ImportRecord, Position, tower_folders
from midstream.train.checkpoint import Progress
from midstream.work.protocol import Channel


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the embeddings before and after, the tokens that came in, and the tokenizer.

    `rows_after` is at least `rows_before` and covers every id. Without a tokenizer `codec` is None.
    `behind` are the tokenizer's own tokens that the model had no rows for.
    """

    rows_before: int
    rows_after: int
    added: tuple[tuple[str, int], ...] = ()
    codec: TextCodec | None = None
    behind: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What stands in import.json."""
        return {
            "rows_before": self.rows_before,
            "rows_after": self.rows_after,
            "added": [{"token": token, "id": number} for token, number in self.added],
        }


def plan_vocabulary(
    tokenizer: Tokenizer | None, rows: int, *, add_tokens: Sequence[str], multiple: int
) -> Vocabulary:
    """Add Midstream's special tokens and `add_tokens` to a model's tokenizer, which is changed.

    Rows that the model has to spare are used first; then rows become a multiple of `multiple`, and
    never fewer. Special tokens behind the model's last row (a pad token that was added to the
    tokenizer alone) get rows as new ones do. Raises ValueError if the tokenizer has other ids that
    the model has no rows for (it is another model's), if there is none to add tokens to, or if a
    token to add is empty.
    """
    if tokenizer is None:
        if add_tokens:
            raise ValueError(
                f"there is no tokenizer to add {', '.join(add_tokens)} to; give --tokenizer"
            )
        return Vocabulary(rows, _padded(rows, multiple))
    before = tokenizer.get_vocab(with_added_tokens=True)
    ids = 1 + max(before.values(), default=-1)
    special = {
        number for number, one in tokenizer.get_added_tokens_decoder().items() if one.special
    }
    behind = {token for token, number in before.items() if number >= rows}
    if any(before[token] not in special for token in behind):
        raise ValueError(
            f"the tokenizer has ids up to {ids - 1:,}, the model's embedding {rows:,} rows: it is "
            "another model's tokenizer; give the model's own with --tokenizer"
        )
    empty = [token for token in add_tokens if not token.strip()]
    if empty:
        raise ValueError(f"{empty[0]!r} is no token to add; give its text, such as <|agent_stop|>")
    codec = TextCodec(tokenizer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in add_tokens])
    after = tokenizer.get_vocab(with_added_tokens=True)
    added = sorted(
        (number, token) for token, number in after.items() if token not in before or token in behind
    )
    return Vocabulary(
        rows_before=rows,
        rows_after=_padded(max(rows, codec.size), multiple),
        added=tuple((token, number) for number, token in added),
        codec=codec,
        behind=tuple(sorted(behind)),
    )


def without_token(tokenizer: Tokenizer, number: int) -> Tokenizer:
    """A tokenizer that lacks one added token."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] != number]
    return Tokenizer.from_str(json.dumps(content))


def with_mean_rows(value: Shaped[Tensor, "rows *more"], rows: int) -> Tensor:
    """A tensor of `rows` rows: the old ones bit-equal, then their mean, in the tensor's dtype."""
    mean = value.mean(dim=0, dtype=torch.float64, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(rows - len(value), *value.shape[1:])])


def with_zero_rows(value: Shaped[Tensor, "rows *more"], rows: int) -> Tensor:
    """A tensor of `rows` rows: the old ones bit-equal, then zeros."""
    return torch.cat([value, value.new_zeros((rows - len(value), *value.shape[1:]))])


def resize(
    tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None, rows: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Weights and Adam's moments (`exp_avg.<name>`) with more rows where `rows` says how many.

    Of the names of a tied weight, those that `tensors` lacks are passed over.
    """
    grown = dict(tensors)
    carried = None if moments is None else dict(moments)
    for name, number in rows.items():
        if name not in tensors:
            continue
        grown[name] = with_mean_rows(tensors[name], number)
        for key in ("exp_avg", "exp_avg_sq"):
            if carried is not None:
                carried[f"{key}.{name}"] = with_zero_rows(carried[f"{key}.{name}"], number)
    return grown, carried


def _padded(rows: int, multiple: int) -> int:
    return multiple * -(-rows // multiple)


def serve(request: ImportRequest, channel: Channel) -> None:
    """Import as the request says and print what was written."""
    from transformers.utils import logging

    # What it would say of a checkpoint's names, or draw as bars, is said below.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record, notes = import_model(request)
    print("\n".join(summary(request.out, record, notes)))


def import_model(request: ImportRequest) -> tuple[ImportRecord, list[str]]:
    """Write the folder `request.out`; returns its record, and sentences that the user should read.

    Raises FileNotFoundError or ValueError, and writes nothing, if the source is missing, half
    downloaded, of an unknown family, does not fit its own configuration or tokenizer, or if `out`
    is something else than an imported folder, which alone is replaced.
    """
    out = request.out.expanduser()
    if out.exists() and not (out / RECORD).is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no imported folder; give another --out")
    source = locate(request)
    tower = source.path.is_dir() and towers.is_encoder(source.path)
    if tower or (request.part or "").startswith("encoder"):
        return _import_encoder(request, source, out)
    sight = import_whole.read_sight(source.path) if request.part == "model" else None
    model = read_language_model(request, source.path)
    return _import_decoder(request, source, model, sight, out)


# ------------------------------------------------------------------------------------ the decoder


def _import_decoder(
    request: ImportRequest,
    source: Source,
    model: LanguageModel,
    sight: import_whole.Sight | None,
    out: Path,
) -> tuple[ImportRecord, list[str]]:
    path, known = source.path, source.known
    public = Position() if known is None else known.position
    position, conflicts = settle(request.position, model.position, public)
    tokenizer = find_tokenizer(request, path)
    if tokenizer is None and model.tokenizer_folder is not None:
        tokenizer = find_tokenizer(request, model.tokenizer_folder)
    if tokenizer is not None and model.picture_token is not None:
        tokenizer = without_token(tokenizer, model.picture_token)
    vocabulary = plan_vocabulary(
        tokenizer,
        model.config.vocab_size,
        add_tokens=request.add_tokens,
        multiple=request.pad_vocab_to,
    )
    config = with_rows(model.config, vocabulary.rows_after)
    vlm = VLM(VLMConfig(decoder=config) if sight is None else sight.model(config))
    with torch.device("meta"):
        old, new = (build_decoder(one).state_dict() for one in (model.config, config))
    # The parameters that have a row a token, and how many rows they get.
    grown = {name: len(new[name]) for name in old if new[name].shape != old[name].shape}
    tensors, moments = resize(model.tensors, model.moments, grown)
    tensors = {f"decoder.{name}": value for name, value in tensors.items()}
    fill(vlm, tensors | ({} if sight is None else sight.tensors), path=path)
    _check_finite(vlm.state_dict(), path)
    del tensors
    moments = (
        None
        if moments is None
        else {name.replace(".", ".decoder.", 1): moment for name, moment in moments.items()}
    )

    weights = weights_digest(vlm)
    learnt = None if moments is None else tensors_digest(moments)
    numbers = [getattr(position, name) for name in NUMBERS]
    record = ImportRecord(
        kind="decoder" if sight is None else "model",
        source=source.name,
        revision=source.revision,
        family=model.family,
        config=config,
        model=None if sight is None else vlm.config,
        vocabulary=vocabulary.as_json(),
        position=position,
        dropped=model.dropped if sight is None else (),
        has_moments=moments is not None,
        weights_digest=weights,
        content=digest([weights, learnt, numbers]),
    )
    with new_folder(out) as folder:
        save_weights(vlm, folder / "model.safetensors")
        if moments is not None:
            save_file(_own_memory(moments), folder / "optimizer.safetensors")
        if vocabulary.codec is not None:
            write_bytes(folder / "tokenizer.json", canonical_tokenizer(vocabulary.codec))
        write_json(folder / "progress.json", asdict(_progress(model.step, position)))
        write_json(folder / RECORD, record.model_dump(mode="json"))
        if sight is not None:
            for name, (tower, held) in zip(tower_folders(vlm.config), sight.towers, strict=True):
                _write_encoder(folder / name, source, tower, held, ())
    named = () if known is None else (f"known family: {known.family}",)
    remarks = _remarks(model.config, vocabulary, position)
    told = (note for note in model.notes if sight is None or note != import_parts.LEFT_OUT)
    return record, [*named, *source.notes, *told, *conflicts, *remarks]


def with_rows(config: AnyDecoderConfig, rows: int) -> AnyDecoderConfig:
    """The same decoder with `rows` token ids."""
    if rows == config.vocab_size:
        return config
    if isinstance(config, DecoderConfig):
        return config.model_copy(update={"vocab_size": rows})
    return with_vocabulary(config, rows)


def _progress(step: int, position: Position) -> Progress:
    # Its counts are numbers; where nobody told them, import.json says so.
    seen = position.tokens_seen or 0
    return Progress(
        step=step,
        tokens_seen=seen,
        total_tokens=position.total_tokens or seen,
        rate=position.rate,
        counts=TokenCount(text=seen, target=seen),
    )


def _about_begin(codec: TextCodec) -> str:
    begin = codec.begin_of_text
    if begin is None:
        return "BOS: none, the tokenizer puts no token before a text"
    return (
        f"BOS: {codec.tokenizer.id_to_token(begin)} = {begin:,} begins each text in training, "
        "image-text rows (before the picture) and evaluation, as the tokenizer's rule says; a "
        'recipe may choose another or "none" (begin_of_text)'
    )


def _remarks(config: AnyDecoderConfig, vocabulary: Vocabulary, position: Position) -> Iterator[str]:
    if vocabulary.behind:
        yield (
            f"the tokenizer has {', '.join(vocabulary.behind)} behind the model's last row; new "
            "rows were made"
        )
    if vocabulary.codec is None:
        yield (
            "no tokenizer: no token was added and the data cannot be compared; give the model's "
            "own with --tokenizer"
        )
    else:
        yield _about_begin(vocabulary.codec)
    if vocabulary.codec is not None and isinstance(config, TransformersDecoderConfig):
        stated = config.settings.get("eos_token_id")
        ends = stated if isinstance(stated, list) else [stated]
        if stated is not None and vocabulary.codec.end_of_text not in ends:
            yield (
                f"its config.json ends texts with {stated}, Midstream with "
                f"{vocabulary.codec.end_of_text} of the tokenizer"
            )
    if position.rate is None:
        yield "the learning rate is unknown: give it with --rate, or warm up again"


# ------------------------------------------------------------------------------------ the encoder


def _import_encoder(
    request: ImportRequest, source: Source, out: Path
) -> tuple[ImportRecord, list[str]]:
    path = source.path
    given = {**request.position.model_dump(include=set(NUMBERS)), "tokenizer": request.tokenizer}
    given |= {"add_token": request.add_tokens or None, "num_heads": request.num_heads}
    senseless = [
        f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None
    ]
    if senseless:
        raise ValueError(f"{path} is a vision tower; leave {', '.join(senseless)} out")
    if request.part is None:
        config, tensors, dropped, notes = towers.read_encoder(path)
    else:
        config, tensors, dropped, notes = import_parts.read_encoder_part(path, request.part)
    return _write_encoder(out, source, config, tensors, dropped), [*source.notes, *notes]


def _write_encoder(
    out: Path,
    source: Source,
    config: EncoderConfig,
    tensors: dict[str, Tensor],
    dropped: tuple[str, ...],
) -> ImportRecord:
    _check_finite(tensors, source.path)
    weights = tensors_digest(tensors)
    record = ImportRecord(
        kind="encoder",
        source=source.name,
        revision=source.revision,
        family=config.family,
        config=config,
        dropped=dropped,
        weights_digest=weights,
        content=digest([weights]),
    )
    with new_folder(out) as folder:
        saved = folder / "model.safetensors"
        save_file(_own_memory(tensors), saved)
        # What cannot be used later is refused now.
        load_encoder(build_encoder(config), saved)
        write_json(folder / RECORD, record.model_dump(mode="json"))
    return record


# ---------------------------------------------------------------------------------------- together


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors: name, dtype, shape and bytes, in the order of names."""
    state = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        state.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        state.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as safetensors asks for."""
    copied = {name: value.detach().clone() for name, value in tensors.items()}
    return {name: value.contiguous() for name, value in copied.items()}


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} holds numbers that are not finite; nothing to import")
