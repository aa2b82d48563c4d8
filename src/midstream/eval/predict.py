"""Answers of a model: batched greedy generation and log-likelihoods from text and pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from midstream.config import AnyEncoderConfig, TransformersDecoderConfig
from midstream.config.model import FILL_BATCH
from midstream.data.examples import (
    Example,
    TextCodec,
    Turn,
    asked_example,
    document_prompt,
    question_ids,
)
from midstream.data.images import Encode, decode_pixels
from midstream.eval.benchmark_records import Shown, all_pictures, places
from midstream.eval.tasks import Ask, GoOn, Reply, reply_tokens, telling
from midstream.model.generate import (
    choice_logprobs,
    generate,
    generate_and_score,
    sequence_logprobs,
)
from midstream.model.read_prompts import Part, Prompt
from midstream.model.vlm import VLM
from midstream.model.weights import weights_digest

# Features of pictures that are kept for questions to come: all of a small benchmark's, and not the
# 136 GB that VQA v2's would be with 729 patches of 1,152 numbers.
_KEPT_BYTES = 2 * 2**30
# Pictures that are looked at together, for each prompt of a batch: what asks for one each comes in
# so many batches (`answers.BATCHES_AT_ONCE`), what stands behind sixteen shots in fewer.
_PICTURES_OF_ROW = 8
# lm-evaluation-harness's default for a model that states no longest text.
_MAX_POSITIONS = 2048


class ModelAnswerer:
    """A model behind the `eval.tasks.Answerer` protocol; questions are asked as in fine-tuning.

    `encode` gives features as the model's projector takes them, each picture's whatever stands
    beside it (`OpenedModel.encode`); pixels are those of `encoder`. None for a model that sees
    nothing.
    """

    def __init__(
        self,
        model: VLM,
        codec: TextCodec,
        *,
        encode: Encode | None,
        encoder: AnyEncoderConfig | None,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self.model, self.codec = model.eval(), codec
        self.encode, self.encoder = encode, encoder
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.weights_digest = weights_digest(model)
        # The newest last; see `_KEPT_BYTES`.
        self._features: dict[Path, np.ndarray] = {}

    def reply(self, asked: Sequence[Ask]) -> list[Reply]:
        """See `eval.tasks.Answerer`: greedy up to a separator, end-of-text or agent-stop, special
        tokens left out; all that is asked of a prompt is read off one reading of it.

        A picture is encoded once, and what several prompts begin with (a picture, shots) is read
        once. Raises ValueError for a picture given to a model without an encoder.
        """
        replies = [Reply("", [], None)] * len(asked)
        for limit in (self.max_new_tokens, 0):
            wanted = [i for i, one in enumerate(asked) if one.writes == (limit > 0)]
            for own, paths in self._parted_by_pictures(wanted, asked):
                number = {path: index for index, path in enumerate(paths)}
                found = generate_and_score(
                    self.model,
                    [self._prompt(asked[i], number) for i in own],
                    self._look(paths) if paths else None,
                    [self._continuations(asked[i]) for i in own],
                    max_new_tokens=limit,
                    stop_ids=self.codec.stop_ids,
                    batch_size=self.batch_size,
                )
                for i, (ids, scores) in zip(own, found, strict=True):
                    values = [value for value, _ in scores]
                    gold = None if asked[i].gold is None else values.pop()
                    replies[i] = Reply(self.codec.decode(ids).strip(), values, gold)
        return replies

    def _parted_by_pictures(
        self, wanted: Sequence[int], asked: Sequence[Ask]
    ) -> Iterator[tuple[list[int], list[Path]]]:
        """The wanted questions, so many at a time that the features of their pictures can be held,
        and these pictures."""
        own, paths = list[int](), set[Path]()
        for i in wanted:
            more = {*all_pictures(asked[i].image)} - paths
            if own and len(paths) + len(more) > _PICTURES_OF_ROW * self.batch_size:
                yield own, sorted(paths)
                own, paths, more = [], set(), {*all_pictures(asked[i].image)}
            own.append(i)
            paths |= more
        if own:
            yield own, sorted(paths)

    def _prompt(self, ask: Ask, number: dict[Path, int]) -> Prompt:
        """A question laid out as in training, its pictures by their numbers."""
        text, image = ask.prompt, ask.image
        if not isinstance(image, Shown):
            ids = tuple(question_ids(self.codec, text, has_image=image is not None))
            first = () if image is None else tuple(self.codec.begin_ids)
            shown = () if image is None else ((len(first), number[image]),)
            return Prompt(Part(first, shown), Part(ids))
        earlier = [_turn(shot.question, shot.pictures, shot.reply) for shot in image.shots]
        told = [number[path] for shot in image.shots for path in shot.pictures]
        if image.document:
            whole = document_prompt(self.codec, _turn(text, image.pictures), earlier)
            own = [*told, *(number[path] for path in image.pictures)]
            # As in training: the prefix ends with the first picture's separator.
            return Prompt(Part(), _part(whole, own), len(self.codec.begin_ids) + 1)
        head, asked = asked_example(self.codec, _turn(text, image.pictures), earlier)
        # As in training: the prefix ends with what stands before the first reply.
        prefix = int(head.supervised.argmax()) if image.shots else None
        own = [number[path] for path in image.pictures]
        before, rest = _part(head, told), _part(asked, own)
        if not image.shared:
            # A head that no other prompt has would fill a batch with copies of itself.
            before, rest = Part(), before.then(rest)
        return Prompt(before, rest, prefix)

    def _continuations(self, ask: Ask) -> list[list[int]]:
        # As in training: behind a separator, a text of their own.
        texts = [*ask.choices, *([] if ask.gold is None else [ask.gold])]
        whole = reply_tokens(self.codec.encode, "", [f" {text}" for text in texts])
        return telling(whole[: len(ask.choices)]) + whole[len(ask.choices) :]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): summed log-probability, and whether it is greedy.

        Contexts that several continuations share are read once. As in lm-evaluation-harness, both
        are tokenised together and cut where the context's own tokens end, a context begins with
        the token that the tokenizer's rule puts there, and an empty one is that token, or else
        end-of-text.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        by_head: dict[tuple[int, ...], list[int]] = {}
        tails: list[list[int]] = []
        for index, (context, continuation) in enumerate(pairs):
            head, tail = self._parted(context, continuation)
            tails.append(tail)
            if tail:
                by_head.setdefault(tuple(head), []).append(index)
        asked = choice_logprobs(
            self.model,
            [list(head) for head in by_head],
            None,
            [[tails[index] for index in members] for members in by_head.values()],
            batch_size=self.batch_size,
            plain=True,
        )
        for members, own in zip(by_head.values(), asked, strict=True):
            for index, value in zip(members, own, strict=True):
                found[index] = value
        return found

    def num_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """As `loglikelihood` cuts them."""
        return [len(self._parted(*pair)[1]) for pair in pairs]

    def _parted(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # Trailing spaces of the context belong to the continuation's first token.
        trimmed = context.rstrip()
        tail = context[len(trimmed) :] + continuation
        if not trimmed:
            return [self._prefix], self.codec.encode(tail)
        whole, cut = self._text_ids(trimmed + tail), len(self._text_ids(trimmed))
        return whole[:cut], whole[cut:]

    @property
    def _prefix(self) -> int:
        """What the first token of a text is read behind."""
        begin = self.codec.begin_of_text
        return self.codec.end_of_text if begin is None else begin

    def _text_ids(self, text: str) -> list[int]:
        return self.codec.begin_ids + self.codec.encode(text)

    def generate_until(self, asked: Sequence[GoOn]) -> list[str]:
        """Greedy continuations of plain texts, up to end-of-text or the first of a text's stops."""
        results = [""] * len(asked)
        for limit in sorted({most for _, _, most in asked}):
            chosen = [i for i, (_, _, most) in enumerate(asked) if most == limit]
            found = generate(
                self.model,
                [self._text_ids(asked[i][0]) or [self._prefix] for i in chosen],
                None,
                max_new_tokens=limit,
                stop_ids=frozenset({self.codec.end_of_text}),
                batch_size=self.batch_size,
                plain=True,
            )
            for i, ids in zip(chosen, found, strict=True):
                text = self.codec.decode(ids)
                places = [text.find(stop) for stop in asked[i][1] if stop and stop in text]
                results[i] = text[: min(places)] if places else text
        return results

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The summed log-probability of each text behind what it begins with, as
        lm-evaluation-harness cuts and adds up texts that are longer than the model reads."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        config, longest = self.model.config.decoder, _MAX_POSITIONS
        if isinstance(config, TransformersDecoderConfig):
            longest = int(config.settings.get("max_position_embeddings", longest))
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            ids = self._text_ids(text)
            parts = get_rolling_token_windows(ids, self._prefix, longest, context_len=1)
            windows += [make_disjoint_window(part) for part in parts]
            owners += [number] * (len(windows) - len(owners))
        found = sequence_logprobs(
            self.model,
            [[*context, *tail] for context, tail in windows],
            [len(context) for context, _ in windows],
            batch_size=self.batch_size,
        )
        totals = [0.0] * len(texts)
        for number, (total, _) in zip(owners, found, strict=True):
            totals[number] += total
        return totals

    def _look(self, paths: Sequence[Path]) -> torch.Tensor:
        if self.encode is None or self.encoder is None:
            raise ValueError(f"this model has no encoder and cannot see {paths[0]}")
        new = [path for path in paths if path not in self._features]
        for low in range(0, len(new), FILL_BATCH):
            part = new[low : low + FILL_BATCH]
            pixels = [
                decode_pixels(path.read_bytes(), str(path), self.encoder.transform) for path in part
            ]
            features = self.encode(torch.from_numpy(np.stack(pixels))).float().cpu().numpy()
            self._features.update(zip(part, features, strict=True))
        found = [self._features.pop(path) for path in paths]
        self._features.update(zip(paths, found, strict=True))
        held = sum(value.nbytes for value in self._features.values())
        for path in list(self._features)[: -len(paths)]:
            if held <= _KEPT_BYTES:
                break
            held -= self._features.pop(path).nbytes
        return torch.from_numpy(np.stack(found))


def _turn(question: str, pictures: tuple[Path, ...], reply: str = "") -> Turn:
    text, shown = places(question, len(pictures))
    return Turn(text, reply, pictures=shown)


def _part(example: Example, images: list[int]) -> Part:
    ids = tuple(example.input_ids.tolist())
    return Part(ids, tuple(zip(example.pictures, images, strict=True)))
