"""Answerers whose answers are functions of the question, and text tasks asked at once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny
from midstream.data.examples import TextCodec
from midstream.data.images import Encode
from midstream.eval.answers import KeptAnswers
from midstream.eval.predict import ModelAnswerer
from midstream.eval.tasks import Answerer, Ask, GoOn, Reply
from midstream.eval.text import TextResult, TextTask, loaded_tasks
from midstream.model.read_prompts import Part, Prompt
from midstream.model.vlm import VLM

MAX_NEW_TOKENS = 6


class Fake:
    """Says `say(prompt, picture)`, likes a continuation by `like(context, it)`, and remembers each
    request with the number of those that came together."""

    def __init__(
        self,
        say: Callable[[str, Path | None], str] = lambda _prompt, _image: "Yes",
        like: Callable[[str, str], float] = lambda _context, text: float(len(text)),
        *,
        greedy: Callable[[str, str], bool] = lambda _context, _text: False,
        weights: str = "fake",
    ) -> None:
        self.say, self.like, self.greedy, self.weights_digest = say, like, greedy, weights
        self.asked: list[tuple[Any, ...]] = []
        self.parts: list[int] = []

    @property
    def prompts(self) -> list[str]:
        return [request[0] for request in self.asked]

    def _heard(self, requests: Sequence[Any]) -> None:
        self.asked += requests
        self.parts.append(len(requests))

    def reply(self, asked: Sequence[Ask]) -> list[Reply]:
        """What it says has a log-probability of 0, whatever else one of -1."""
        self._heard(asked)
        replies = []
        for prompt, image, own, gold, free in asked:
            text = self.say(prompt, image)  # type: ignore[arg-type]
            values = [float(one == text) - 1 for one in own]
            likely = None if gold is None else float(gold == text) - 1
            replies.append(Reply(text if free else "", values, likely))
        return replies

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        self._heard(pairs)
        return [(float(self.like(*pair)), self.greedy(*pair)) for pair in pairs]

    def num_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        return [len(text.split()) for _, text in pairs]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        self._heard([(text,) for text in texts])
        return [-float(len(text)) for text in texts]

    def generate_until(self, asked: Sequence[GoOn]) -> list[str]:
        self._heard(asked)
        found = []
        for context, stops, limit in asked:
            text = self.say(context, None)[:limit]
            found.append(min([text, *(text.split(stop)[0] for stop in stops)], key=len))
        return found


def answering(model: VLM, codec: TextCodec, encode: Encode | None) -> ModelAnswerer:
    """A model that sees by `tiny.ENCODER`, or not at all, as evaluations ask it."""
    encoder = None if encode is None else tiny.ENCODER
    sizes = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 4}
    return ModelAnswerer(model, codec, encode=encode, encoder=encoder, **sizes)


def about(ids: list[int], image: int, begin: int | None = None) -> Prompt:
    """Tokens behind a picture, with the token that begins a text before it."""
    first = () if begin is None else (begin,)
    return Prompt(Part(first, ((len(first), image),)), Part(tuple(ids)))


def written(answerer: Answerer, prompts: Sequence[str], images: Sequence[Any]) -> list[str]:
    """Its free answers alone."""
    return [one.text for one in answerer.reply(list(map(Ask, prompts, images)))]


def chosen(
    answerer: Answerer,
    prompts: Sequence[str],
    images: Sequence[Any],
    choices: Sequence[Sequence[str]],
) -> list[list[float]]:
    """The log-probabilities of choices alone."""
    asked = zip(prompts, images, choices, strict=True)
    return [one.choices for one in answerer.reply([Ask(*ask, None, False) for ask in asked])]


def kept(answerer: Answerer, at_once: int = 8) -> KeptAnswers:
    """What asks it, and keeps nothing."""
    return KeptAnswers(answerer, None, at_once=at_once)


def ignore(_fraction: float, _text: str) -> None:
    """Progress that nobody looks at."""


def run_text_tasks(
    answerer: Answerer, tasks: Sequence[TextTask], limit: int | None = None
) -> dict[str, TextResult]:
    """The results of tasks by name; see `loaded_tasks`."""
    with loaded_tasks(tasks, limit) as ask:
        return ask(answerer)
