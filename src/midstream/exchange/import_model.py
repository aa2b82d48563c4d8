"""`midstream import`: somebody's checkpoint as a folder that stages load (docs/import.md).

It is written whole or not at all, after everything has been read.
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

from midstream.config import AnyDecoderConfig, DecoderConfig, TransformersDecoderConfig, VLMConfig
from midstream.core.identity import digest
from midstream.core.storage import new_folder, write_bytes, write_json
from midstream.core.tokens import TokenCount
from midstream.data.examples import TextCodec
from midstream.data.prepare_source import canonical_tokenizer
from midstream.exchange import import_parts, towers
from midstream.exchange.hub import LanguageModel, model_type
from midstream.exchange.import_source import (
    NUMBERS,
    ImportRequest,
    Source,
    find_tokenizer,
    locate,
    read_language_model,
    settle,
    stated_of_tokenizer,
    summary,
)
from midstream.model.pretrained import with_vocabulary
from midstream.model.vision import build_encoder, load_encoder
from midstream.model.vlm import VLM, build_decoder
from midstream.model.weights import fill, save_weights, some, weights_digest
from midstream.study.imported import RECORD, ImportRecord, Position, tower_folders
from midstream.train.checkpoint import Progress
from midstream.work.protocol import Channel, in_a_line, is_ours

# ----------------------------------------------------------------------------- the vocabulary


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
        added = [{"token": token, "id": number} for token, number in self.added]
        return {"rows_before": self.rows_before, "rows_after": self.rows_after, "added": added}


def plan_vocabulary(
    tokenizer: Tokenizer | None, rows: int, *, add_tokens: Sequence[str], multiple: int
) -> Vocabulary:
    """Add Midstream's special tokens and `add_tokens` to a model's tokenizer, which is changed.

    Rows that the model has to spare are used first; then rows become a multiple of `multiple`, and
    never fewer. Added tokens behind the model's last row (a pad token that was added to the
    tokenizer alone) get rows as new ones do. Raises ValueError if the tokenizer has other ids that
    the model has no rows for (it is another model's) or begins texts with an id that is none of its
    own, if there is none to add tokens to, or if a token to add is empty.
    """
    if tokenizer is None:
        if add_tokens:
            raise ValueError(
                f"there is no tokenizer to add {', '.join(add_tokens)} to; give --tokenizer"
            )
        return Vocabulary(rows, multiple * -(-rows // multiple))
    before = tokenizer.get_vocab(with_added_tokens=True)
    held = tokenizer.get_added_tokens_decoder()
    behind = {token for token, number in before.items() if number >= rows}
    if any(before[token] not in held for token in behind):
        raise ValueError(
            f"the tokenizer has ids up to {max(before.values()):,}, the model's embedding {rows:,} "
            "rows: it is another model's tokenizer; give the model's own with --tokenizer"
        )
    for token in add_tokens:
        if not token.strip():
            raise ValueError(f"{token!r} is no token to add; give its text, such as <|agent_stop|>")
    codec = TextCodec(tokenizer)
    begin = codec.begin_of_text
    if begin is not None and tokenizer.id_to_token(begin) is None:
        raise ValueError(
            f"its post_processor puts id {begin:,} before each text, which is none of its tokens; "
            "put the id that the token has there, or give another with --tokenizer"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in add_tokens])
    after = tokenizer.get_vocab(with_added_tokens=True)
    added = [pair for pair in after.items() if pair[0] not in before or pair[0] in behind]
    return Vocabulary(
        rows_before=rows,
        rows_after=multiple * -(-max(rows, codec.size) // multiple),
        added=tuple(sorted(added, key=lambda pair: pair[1])),
        codec=codec,
        behind=tuple(sorted(behind)),
    )


def with_mean_rows(value: Shaped[Tensor, "rows *more"], rows: int) -> Tensor:
    """A tensor of `rows` rows: the old ones bit-equal, then their mean, in the tensor's dtype.

    The logit of a new row is the mean of the old logits, and as the exponential is convex the new
    token is at most as likely as one of all tokens drawn at random, whatever the model has read.
    """
    mean = value.mean(dim=0, dtype=torch.float64, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(rows - len(value), *value.shape[1:])])


def resize(
    tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None, rows: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Weights and Adam's moments (`exp_avg.<name>`) with more rows where `rows` says how many; old
    rows are bit-equal, new ones of moments zero.

    Of the names of a tied weight, those that `tensors` lacks are passed over.
    """
    grown = dict(tensors)
    carried = None if moments is None else dict(moments)
    for name in rows.keys() & tensors.keys():
        grown[name] = with_mean_rows(tensors[name], rows[name])
        for key in (f"exp_avg.{name}", f"exp_avg_sq.{name}"):
            if carried is not None:
                old = carried[key]
                new = old.new_zeros((rows[name] - len(old), *old.shape[1:]))
                carried[key] = torch.cat([old, new])
    return grown, carried


# ------------------------------------------------------------------------------- the import


def serve(request: ImportRequest, channel: Channel) -> None:
    """Import as the request says and print what was written."""
    from transformers.utils import logging

    # What it would say of a checkpoint's names, or draw as bars, is said below.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        record, notes = import_model(request)
    except (ValueError, OSError):
        raise
    except Exception as error:
        if is_ours(error):
            raise
        # A library's own code, on behalf of this checkpoint.
        raise ValueError(f"{request.source} cannot be imported: {in_a_line(error)}") from error
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
    part = request.part or ""
    if part.startswith("encoder") or model_type(source.path) in towers.FAMILIES:
        return _import_encoder(request, source, out)
    sight = import_parts.read_sight(source.path) if part == "model" else None
    return _import_decoder(request, source, read_language_model(request, source.path), sight, out)


def _import_decoder(
    request: ImportRequest,
    source: Source,
    model: LanguageModel,
    sight: import_parts.Sight | None,
    out: Path,
) -> tuple[ImportRecord, list[str]]:
    path, known = source.path, source.known
    public = Position() if known is None else known.position
    position, conflicts = settle(request.position, model.position, public)
    tokenizer = find_tokenizer(request, path, model.tokenizer_folder)
    if tokenizer is not None and model.picture_token is not None:
        tokenizer = _without_token(tokenizer, model.picture_token)
    vocabulary = plan_vocabulary(
        tokenizer,
        model.config.vocab_size,
        add_tokens=request.add_tokens,
        multiple=request.pad_vocab_to,
    )
    config = _with_rows(model.config, vocabulary.rows_after)
    vlm = VLM(VLMConfig(decoder=config) if sight is None else sight.model(config))
    moments = _fill(vlm, model, {} if sight is None else sight.tensors, path)
    weights = weights_digest(vlm)
    learnt = None if moments is None else _digest(moments)
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
        content=digest([weights, learnt, [getattr(position, name) for name in NUMBERS]]),
    )
    # Its counts are numbers; where nobody told them, import.json says so.
    seen = position.tokens_seen or 0
    progress = Progress(
        step=model.step,
        tokens_seen=seen,
        total_tokens=position.total_tokens or seen,
        rate=position.rate,
        counts=TokenCount(text=seen, target=seen),
    )
    with new_folder(out) as folder:
        save_weights(vlm, folder / "model.safetensors")
        if moments is not None:
            save_file(_own_memory(moments), folder / "optimizer.safetensors")
        if vocabulary.codec is not None:
            write_bytes(folder / "tokenizer.json", canonical_tokenizer(vocabulary.codec))
        write_json(folder / "progress.json", asdict(progress))
        write_json(folder / RECORD, record.model_dump(mode="json"))
        if sight is not None:
            for name, tower in zip(tower_folders(vlm.config), sight.towers, strict=True):
                _write_encoder(folder / name, source, tower._replace(dropped=()))
    named = () if known is None else (f"known family: {known.family}",)
    told = dict.fromkeys(model.notes)
    if sight is not None:
        told |= dict.fromkeys(note for tower in sight.towers for note in tower.notes)
        told.pop(import_parts.LEFT_OUT, None)
    own = None if request.tokenizer else stated_of_tokenizer(path).get("add_bos_token")
    remarks = _remarks(model.config, vocabulary, position, own)
    return record, [*named, *source.notes, *told, *conflicts, *remarks]


def _fill(
    vlm: VLM, model: LanguageModel, sight: dict[str, Tensor], path: Path
) -> dict[str, Tensor] | None:
    """Put weights into the model, with rows for new tokens; the moments under its names."""
    with torch.device("meta"):
        old, new = (build_decoder(one).state_dict() for one in (model.config, vlm.config.decoder))
    # The parameters that have a row a token, and how many rows they get.
    grown = {name: len(new[name]) for name in old if new[name].shape != old[name].shape}
    tensors, moments = resize(model.tensors, model.moments, grown)
    fill(vlm, {f"decoder.{name}": value for name, value in tensors.items()} | sight, path=path)
    _check_finite(vlm.state_dict(), path)
    if moments is None:
        return None
    return {name.replace(".", ".decoder.", 1): moment for name, moment in moments.items()}


def _without_token(tokenizer: Tokenizer, number: int) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] != number]
    return Tokenizer.from_str(json.dumps(content))


def _with_rows(config: AnyDecoderConfig, rows: int) -> AnyDecoderConfig:
    if rows == config.vocab_size:
        return config
    if isinstance(config, DecoderConfig):
        return config.model_copy(update={"vocab_size": rows})
    return with_vocabulary(config, rows)


def _remarks(
    config: AnyDecoderConfig,
    vocabulary: Vocabulary,
    position: Position,
    adds_begin: bool | None,
) -> Iterator[str]:
    codec = vocabulary.codec
    if codec is not None and adds_begin not in (None, codec.begin_of_text is not None):
        yield (
            f"tokenizer_config.json says add_bos_token {json.dumps(adds_begin)}, the rule in "
            "tokenizer.json otherwise; the rule is followed: where the model was trained by the "
            "former, say so in the recipe (begin_of_text)"
        )
    if vocabulary.behind:
        yield (
            f"the tokenizer has {some(vocabulary.behind)} behind the model's last row; new rows "
            "were made"
        )
    if codec is None:
        yield (
            "no tokenizer: no token was added and the data cannot be compared; give the model's "
            "own with --tokenizer"
        )
    elif codec.begin_of_text is None:
        yield "BOS: none, the tokenizer puts no token before a text"
    else:
        yield (
            f"BOS: {codec.tokenizer.id_to_token(codec.begin_of_text)} = {codec.begin_of_text:,} "
            "begins each text in training, image-text rows (before the picture) and evaluation, as "
            'the tokenizer\'s rule says; a recipe may choose another or "none" (begin_of_text)'
        )
    if codec is not None and isinstance(config, TransformersDecoderConfig):
        stated = config.settings.get("eos_token_id")
        ends = stated if isinstance(stated, list) else [stated]
        if stated is not None and codec.end_of_text not in ends:
            yield (
                f"its config.json ends texts with {stated}, Midstream with {codec.end_of_text} of "
                "the tokenizer"
            )
    if position.rate is None:
        yield "the learning rate is unknown: give it with --rate, or warm up again"


def _import_encoder(
    request: ImportRequest, source: Source, out: Path
) -> tuple[ImportRecord, list[str]]:
    given = request.position.model_dump(include=set(NUMBERS)) | {
        "tokenizer": request.tokenizer,
        "add_token": request.add_tokens or None,
        "num_heads": request.num_heads,
    }
    senseless = [
        f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None
    ]
    if senseless:
        raise ValueError(f"{source.path} is a vision tower; leave {', '.join(senseless)} out")
    if request.part is None:
        tower = towers.read_encoder(source.path)
    else:
        tower = import_parts.read_encoder_part(source.path, request.part)
    return _write_encoder(out, source, tower), [*source.notes, *tower.notes]


def _write_encoder(out: Path, source: Source, tower: towers.FoundTower) -> ImportRecord:
    _check_finite(tower.tensors, source.path)
    weights = _digest(tower.tensors)
    record = ImportRecord(
        kind="encoder",
        source=source.name,
        revision=source.revision,
        family=tower.config.family,
        config=tower.config,
        dropped=tower.dropped,
        weights_digest=weights,
        content=digest([weights]),
    )
    with new_folder(out) as folder:
        saved = folder / "model.safetensors"
        save_file(_own_memory(tower.tensors), saved)
        # What cannot be used later is refused now.
        load_encoder(build_encoder(tower.config), saved)
        write_json(folder / RECORD, record.model_dump(mode="json"))
    return record


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors: name, dtype, shape and bytes, in the order of names."""
    state = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        state.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        state.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as safetensors asks for."""
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} holds numbers that are not finite; nothing to import")
