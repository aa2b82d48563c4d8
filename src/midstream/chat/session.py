"""One conversation with an opened model: pictures, questions, streamed answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from midstream.chat.text_pieces import TextPieces
from midstream.config import DecoderConfig
from midstream.data.examples import question_ids
from midstream.data.images import decode_pixels
from midstream.model.conversation import Conversation
from midstream.model.sampling import Sampling
from midstream.open_model import OpenedModel
from midstream.study.stage import LoadDecoder, LoadModel

# The `seq_len` of OpenLM's published text models (open_lm/model_configs).
OPENLM_POSITIONS = 2048


@dataclass(frozen=True)
class ChatSettings:
    """How answers are made; temperature None or 0 takes the most likely token each time."""

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if not self.temperature and self.top_p != 1.0:
            raise ValueError(
                f"top_p {self.top_p} says how tokens are drawn, but without a temperature none "
                "are drawn; give a temperature above 0 as well"
            )

    @property
    def sampling(self) -> Sampling | None:
        """None for the most likely token each time."""
        if not self.temperature:
            return None
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


class ChatSession:
    """A conversation about one picture or none, laid out as in fine-tuning (`data/examples.py`).

    `turns` are questions and answers so far, `picture` what they are about. Draws depend on the
    seed and on how many tokens of this conversation were drawn before.
    """

    def __init__(self, opened: OpenedModel, settings: ChatSettings) -> None:
        self.opened, self.settings = opened, settings
        self.max_positions = trained_positions(opened)
        self.picture: Path | None = None
        self._features: Tensor | None = None
        self._stopping = False
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the picture stays."""
        self.turns: list[tuple[str, str]] = []
        # Why the last answer is not whole, None where it is.
        self.cut: str | None = None
        self._conversation = Conversation(
            self.opened.vlm,
            self._features,
            max_positions=self.max_positions,
            begin=self.opened.codec.begin_of_text,
            sampling=self.settings.sampling,
        )

    def show(self, picture: Path | None) -> None:
        """Start a new conversation about a picture file, or about none.

        Raises ValueError for a model without an encoder and for a file that is no picture, OSError
        for one that cannot be read; the conversation then goes on as before.
        """
        features = None if picture is None else self._look(picture)
        self.picture, self._features = picture, features
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
        # In training the separator stands behind an image and behind each reply.
        begun = bool(self.turns) or self._features is not None
        ids = question_ids(self.opened.codec, question, has_image=begun)
        held = self.max_positions - self._conversation.room
        if held + len(ids) >= self.max_positions:
            fits = len(ids) + self._num_patches < self.max_positions
            raise ValueError(
                f"the question needs {len(ids)} tokens and the conversation holds {held} "
                f"positions; the model was trained on {self.max_positions} at most: "
                f"{'start a new conversation' if fits else 'ask a shorter question'}"
            )
        self._stopping = False
        return self._answer(question, ids)

    def stop(self) -> None:
        """End the answer that is being made behind its next token; what there is of it stays."""
        self._stopping = True

    def _answer(self, question: str, ids: list[int]) -> Iterator[str]:
        self.cut = None
        codec, longest = self.opened.codec, self.settings.max_new_tokens
        tokens = self._conversation.reply(ids, max_new_tokens=longest, stop_ids=codec.stop_ids)
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

    @property
    def _num_patches(self) -> int:
        if self._features is None:
            return 0
        return self._features.shape[1] + len(self.opened.codec.begin_ids)

    def _look(self, picture: Path) -> Tensor:
        config = self.opened.vlm.config.encoder
        if config is None:
            raise ValueError(
                f"{self.opened.name} is a language model without an encoder, it cannot see "
                f"{picture}; chat with an image-text or fine-tuned stage"
            )
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
