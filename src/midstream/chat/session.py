"""One conversation with an opened model, and a few lines about that model.

Token ids of an answer become whole characters.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from midstream.config import Config, DecoderConfig, Positive
from midstream.core.storage import read_json
from midstream.data.examples import IMAGE_MARK, TextCodec, Turn, asked_example, question_ids
from midstream.data.images import decode_pixels
from midstream.eval.benchmark_records import places
from midstream.model.attention import NO_PICTURE, Place, sees
from midstream.model.read_prompts import (
    AnyCache,
    Part,
    embed_parts,
    everyone_sees,
    id_tensor,
    new_cache,
)
from midstream.model.vlm import VLM
from midstream.model.weights import generator
from midstream.study.label import label
from midstream.study.results import EvaluationResult, ImportedResult
from midstream.study.stages import LoadDecoder, LoadModel, Pretrain, lineage
from midstream.train.checkpoint import milestone
from midstream.work.open_model import OpenedModel, evaluations

# A byte in the vocabularies that spell unknown characters out (sentencepiece's byte fallback).
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_INCOMPLETE = "\ufffd"


class TextPieces:
    """The text of a growing list of ids, in pieces that are never taken back.

    The pieces together are `codec.decode(ids).strip()`, as an evaluation reads an answer.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """What one more token adds; empty where it ends in the middle of a character."""
        self.ids.append(token)
        if _BYTE.fullmatch(self.codec.tokenizer.id_to_token(token) or ""):
            # Such bytes are read together: a later one may turn all of them into other characters.
            return ""
        # White space waits as well, since at the end of an answer it is left out.
        return self._grow(self.codec.decode(self.ids).rstrip(_INCOMPLETE))

    def finish(self) -> str:
        """What was held back: the replacement character for bytes that never became a character."""
        return self._grow(self.codec.decode(self.ids))

    def _grow(self, text: str) -> str:
        known, self.text = len(self.text), text.strip()
        return self.text[known:]


class ChatSettings(Config):
    """How answers are made; temperature None or 0 takes the most likely token each time, else they
    are drawn from softmax(logits / temperature), cut to the fewest likeliest that make up `top_p`.
    """

    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0

    @model_validator(mode="after")
    def _draws(self) -> "ChatSettings":
        if not self.temperature and self.top_p != 1.0:
            raise ValueError(
                f"top_p {self.top_p} draws nothing by itself; give a temperature above 0 as well"
            )
        return self


def choose(logits: Float[Tensor, " vocab"], settings: ChatSettings, step: int) -> int:
    """The next token; a draw is a function of the seed and of `step`, the tokens drawn before."""
    if not settings.temperature:
        return int(logits.argmax())
    # In float64, so that the order of summation does not show, and on the CPU: a GPU's running sum
    # has no deterministic kernel.
    scaled, tokens = (logits.double().cpu() / settings.temperature).sort(
        descending=True, stable=True
    )
    mass = scaled.softmax(dim=-1).cumsum(dim=-1)
    # A token is kept while those before it make up less than top_p: the first one always is.
    last = int((mass[:-1] < settings.top_p).sum())
    source = generator(settings.seed, f"token/0/{step}")
    place = torch.rand((), generator=source, dtype=mass.dtype) * mass[last]
    # The first token whose mass reaches beyond the drawn place.
    return int(tokens[min(int((mass <= place).sum()), last)])


class Conversation:
    """The cache of one conversation, about images or none; each turn goes on where it ended.

    `features` are the encoder's, `begin` is a token that stands before all where there are images.
    `max_positions` bounds images, turns and replies together.
    Who sees whom is as in training: under prefix attention the images and the first turn all do.
    """

    def __init__(
        self,
        vlm: VLM,
        features: Float[Tensor, "images patches width"] | None,
        *,
        max_positions: int,
        settings: ChatSettings,
        begin: int | None = None,
    ) -> None:
        self.vlm, self.settings, self.max_positions = vlm, settings, max_positions
        self._features, num_images = features, 0 if features is None else len(features)
        self._begin = Part(() if begin is None or not num_images else (begin,))
        # Before which tokens of the first turn the images stand.
        self._places = (0,) * num_images
        self._shown = num_images * vlm.config.image_tokens + len(self._begin.ids)
        self._cache: AnyCache | None = None
        # Of each position up to the first reply the number of its image.
        self._pictures = torch.zeros((1, 0), dtype=torch.long)
        # For gated blocks: the features of the latest image.
        self._latest: Tensor | None = None
        self._num_drawn = 0
        # Turns and replies so far; the cache holds the image and the first of them.
        self.ids: list[int] = []

    @property
    def room(self) -> int:
        """Positions that are left."""
        return self.max_positions - self._shown - len(self.ids)

    def reply(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        places: tuple[int, ...] | None = None,
    ) -> Iterator[int]:
        """Add a turn; then its reply, token by token, up to a stop id (left out), `max_new_tokens`
        or the end of the room. `places`: before which tokens of the first turn the images stand,
        one each; all stand before it without.

        The stop id is not kept either: a later turn begins with what ends a reply in training.
        Leaving the iterator early keeps the reply so far. A turn has a token at least, and leaves
        room for another.
        """
        self.ids += ids
        self._places = self._places if places is None or self._cache is not None else places
        return self._tokens(max_new_tokens, stop_ids)

    def _tokens(self, max_new_tokens: int, stop_ids: frozenset[int]) -> Iterator[int]:
        for _ in range(min(max_new_tokens, self.room)):
            token = self._next()
            if token in stop_ids:
                return
            self.ids.append(token)
            yield token

    @torch.no_grad()
    def _next(self) -> int:
        decoder = self.vlm.decoder
        start = 0 if self._cache is None else self._cache.length
        if self._cache is None:
            shown = tuple((place, number) for number, place in enumerate(self._places))
            whole = self._begin.then(Part(tuple(self.ids), shown))
            parts = embed_parts(self.vlm, [whole], self._features)
            embeddings, self._pictures = parts.embeddings, parts.pictures
            looks, self._latest = parts.seen(parts.pictures, None), parts.last(None)
            self._cache = new_cache(self.vlm, embeddings, self.max_positions)
        else:
            new = self.ids[start - self._shown :]
            embeddings = decoder.embed(id_tensor([new], self.vlm))
            looks = everyone_sees(self._latest, len(new))
        column = torch.arange(start + embeddings.shape[1], device=embeddings.device)[None]
        missing = column.shape[1] - self._pictures.shape[1]
        pictures = pad(self._pictures, (0, missing), value=NO_PICTURE)
        prefix = column < self._pictures.shape[1]
        row = Place(column, column * 0, prefix, pictures, pictures.cummax(dim=1).values)
        query, key = row.map(lambda one: one[:, start:, None]), row.map(lambda one: one[:, None])
        seen = sees(query, key, self.vlm.config.attention)
        position_ids = column[:, start:]
        hidden = self.vlm.decode(embeddings, position_ids, seen[:, None], self._cache, seen=looks)
        token = choose(decoder.output(hidden[:, -1])[0], self.settings, self._num_drawn)
        self._num_drawn += 1
        return token


# The `seq_len` of OpenLM's published text models (open_lm/model_configs).
OPENLM_POSITIONS = 2048


class ChatSession:
    """A conversation about pictures or none, laid out as in fine-tuning (`data/examples.py`).

    `turns` are questions and answers so far, `pictures` what they are about: they stand where the
    first question has an image mark, those without one before it. Draws depend on the
    seed and on how many tokens of this conversation were drawn before.
    """

    def __init__(self, opened: OpenedModel, settings: ChatSettings) -> None:
        self.opened, self.settings = opened, settings
        self.max_positions = trained_positions(opened)
        self.pictures: tuple[Path, ...] = ()
        self._features: Tensor | None = None
        self._stopping = False
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the pictures stay."""
        self.turns: list[tuple[str, str]] = []
        # Why the last answer is not whole, None where it is.
        self.cut: str | None = None
        self._conversation = Conversation(
            self.opened.vlm,
            self._features,
            max_positions=self.max_positions,
            begin=self.opened.codec.begin_of_text,
            settings=self.settings,
        )

    def show(self, *pictures: Path) -> None:
        """Start a new conversation about picture files, or about none.

        Raises ValueError for a model without an encoder and for a file that is no picture, OSError
        for one that cannot be read; the conversation then goes on as before.
        """
        features = torch.cat([self._look(one) for one in pictures]) if pictures else None
        self.pictures, self._features = pictures, features
        self.reset()

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces of whole characters, up to what ends a reply; then see `cut`.

        Raises ValueError, with nothing changed, for an empty question and for one that leaves no
        room for an answer within the positions that the model was trained on.
        """
        question = question.strip()
        if not question:
            raise ValueError("the question is empty; type some words")
        # A lone surrogate stands for a byte that was no UTF-8; tokenizers take none.
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise ValueError("the question holds bytes that are not UTF-8; type it again")
        ids, at = self._laid_out(question)
        held = self.max_positions - self._conversation.room
        if held + len(ids) >= self.max_positions:
            pictures = 0 if self._features is None else len(self._features)
            shown = pictures * self.opened.vlm.config.image_tokens
            shown += len(self.opened.codec.begin_ids) * bool(pictures)
            fits = len(ids) + shown < self.max_positions
            raise ValueError(
                f"the question needs {len(ids)} tokens, the conversation holds {held} positions of "
                f"{self.max_positions} at most: "
                f"{'start a new conversation' if fits else 'ask a shorter question'}"
            )
        self._stopping = False
        return self._answer(question, ids, at)

    def _laid_out(self, question: str) -> tuple[list[int], tuple[int, ...] | None]:
        """A question's tokens, and before which of them pictures stand, None where none do.

        Raises ValueError for marks without a picture.
        """
        codec = self.opened.codec
        if self.turns or self._features is None:
            if self.opened.encoder is not None and IMAGE_MARK in question:
                raise ValueError(
                    f"the question has an {IMAGE_MARK} mark, which only the first may have: "
                    "show pictures, which starts a new conversation, or leave the mark out"
                )
            # In training the separator stands behind each reply.
            return question_ids(codec, question, has_image=bool(self.turns)), None
        text, shown = places(question, len(self.pictures))
        _, asked = asked_example(codec, Turn(text, "", pictures=shown))
        begin = len(codec.begin_ids)
        at = tuple(place - begin for place in asked.pictures)
        return asked.input_ids[begin:].tolist(), at

    def stop(self) -> None:
        """End the answer that is being made behind its next token; what there is of it stays."""
        self._stopping = True

    def _answer(self, question: str, ids: list[int], at: tuple[int, ...] | None) -> Iterator[str]:
        self.cut = None
        codec, longest = self.opened.codec, self.settings.max_new_tokens
        tokens = self._conversation.reply(
            ids, max_new_tokens=longest, stop_ids=codec.stop_ids, places=at
        )
        room = self._conversation.room
        pieces = TextPieces(codec)
        # A turn from its first moment, so that an answer which is left in its middle is one too.
        turns, number = self.turns, len(self.turns)
        turns.append((question, ""))
        for token in tokens:
            piece = pieces.push(token)
            turns[number] = (question, pieces.text)
            if piece:
                yield piece
            if self._stopping:
                self.cut = "the answer was stopped"
                break
        else:
            self.cut = self._why_cut(len(pieces.ids), room)
        piece = pieces.finish()
        turns[number] = (question, pieces.text)
        if piece:
            yield piece

    def _why_cut(self, num_tokens: int, room: int) -> str | None:
        if num_tokens == room:
            return (
                f"the answer was cut: the conversation fills all {self.max_positions} positions "
                "that the model was trained on; start a new one"
            )
        if num_tokens == self.settings.max_new_tokens:
            return f"the answer was cut at {num_tokens} tokens (max_new_tokens)"
        return None

    def _look(self, picture: Path) -> Tensor:
        config = self.opened.vlm.config.encoder
        if config is None:
            raise ValueError(
                f"{self.opened.name} is without an encoder, it cannot see {picture}; chat with an "
                "image-text or fine-tuned stage"
            )
        # A path has one slash where an address has two.
        if address := re.match(r"(https?|s3|gs|hf|data):/?", str(picture)):
            raise ValueError(f"{picture} is an address ({address[1]}); download the picture first")
        pixels = decode_pixels(picture.read_bytes(), str(picture), config.transform)
        return self.opened.encode(torch.from_numpy(pixels)[None])


def trained_positions(opened: OpenedModel) -> int:
    """The longest sequence that the model has seen in training, image included."""
    stage = opened.stage
    if not isinstance(stage, LoadDecoder | LoadModel):
        return stage.training.rows.row_length
    if isinstance(stage.decoder, DecoderConfig):
        return OPENLM_POSITIONS
    return int(stage.decoder.settings["max_position_embeddings"])


_TITLES = {
    "load_decoder": "imported",
    "load_model": "imported",
    "pretrain": "text",
    "continue": "images and text",
    "finetune": "conversations",
}


def describe(opened: OpenedModel) -> list[str]:
    """A line about the model, one for each stage of its training and one for each evaluation."""
    modules = [opened.vlm, *([] if opened.encoder is None else [opened.encoder])]
    # An encoder may be a part of the model as well.
    sizes = {id(value): value.numel() for module in modules for value in module.parameters()}
    sees = "sees pictures" if opened.encoder is not None else "text only"
    lines = [f"{opened.name}: {sum(sizes.values()):,} parameters, {sees}"]
    lines += [f"trained on {line}" for line in _training(opened)]
    return lines + [f"scores: {line}" for line in _scores(opened)]


def caution(opened: OpenedModel) -> str | None:
    """What to expect of a model that has not learnt conversations; None for one that has."""
    counts = read_json(opened.weights / "progress.json")["counts"]
    if counts["instruct"]:
        return None
    return (
        "this model was not fine-tuned on conversations: it goes on with text and captions, and "
        "may not answer"
    )


def _training(opened: OpenedModel) -> Iterator[str]:
    for link, part in reversed([*lineage(opened.stage, opened.completion)]):
        folder = opened.ledger.folder(link)
        of = f"{part * 100:g} % of" if part != 1.0 else "in"
        kept = milestone(folder, part) if isinstance(link, Pretrain) else folder / "weights"
        if isinstance(link, LoadDecoder | LoadModel):
            done = opened.ledger.is_done(link)
            held = opened.ledger.result(link, ImportedResult) if done else None
            seen = None if held is None else held.tokens_seen_before
            told = "tokens unknown" if seen is None else f"{seen:,} tokens"
            yield f"{_TITLES[link.kind]}: {told}, in {link.name}"
            continue
        yield f"{_TITLES[link.kind]}: {_tokens(kept / 'progress.json')}, {of} {link.name}"


def _tokens(progress: Path) -> str:
    if not progress.is_file():
        return "unknown, the stage is not in this store"
    found = read_json(progress)
    kinds = ", ".join(
        f"{kind} {count:,}"
        for kind, count in found["counts"].items()
        if count and kind not in ("pad", "target")
    )
    return f"{found['tokens_seen']:,} tokens ({kinds or 'of unknown kinds'})"


def _scores(opened: OpenedModel) -> Iterator[str]:
    for stage in evaluations(opened):
        tasks = opened.ledger.result(stage, EvaluationResult).tasks
        scores = ", ".join(
            f"{task} {found.score:.1%} (chance {found.chance:.1%})"
            if found.chance is not None
            else f"{task} {found.metric} {found.score:.4g}"
            for task, found in sorted(tasks.items())
        )
        yield f"{scores} ({label(stage)})"
