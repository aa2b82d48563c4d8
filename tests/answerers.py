"""Answerers whose answers are functions of the question, and text tasks asked at once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from midstream.eval.answers import KeptAnswers
from midstream.eval.tasks import Answerer, Images, Limits, Lists, Reply, Texts
from midstream.eval.text import TextResult, TextTask, loaded_tasks


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

    def _heard(self, *columns: Sequence[Any]) -> list[tuple[Any, ...]]:
        requests = list(zip(*columns, strict=True))
        self.asked += requests
        self.parts.append(len(requests))
        return requests

    def reply(
        self,
        prompts: Texts,
        images: Images,
        choices: Lists,
        golds: Sequence[str | None],
        writes: Sequence[bool],
    ) -> list[Reply]:
        """What it says has a log-probability of 0, whatever else one of -1."""
        replies = []
        for prompt, image, own, gold, free in self._heard(prompts, images, choices, golds, writes):
            text = self.say(prompt, image)
            values = [float(one == text) - 1 for one in own]
            likely = None if gold is None else float(gold == text) - 1
            replies.append(Reply(text if free else "", values, likely))
        return replies

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        self._heard([context for context, _ in pairs], [text for _, text in pairs])
        return [(float(self.like(*pair)), self.greedy(*pair)) for pair in pairs]

    def num_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        return [len(text.split()) for _, text in pairs]

    def loglikelihood_rolling(self, texts: Texts) -> list[float]:
        return [-float(len(text)) for (text,) in self._heard(texts)]

    def generate_until(self, contexts: Texts, stops: Lists, max_new_tokens: Limits) -> list[str]:
        found = []
        for context, own, limit in self._heard(contexts, stops, max_new_tokens):
            text = self.say(context, None)[:limit]
            found.append(min([text, *(text.split(stop)[0] for stop in own)], key=len))
        return found


def written(answerer: Answerer, prompts: Texts, images: Images) -> list[str]:
    """Its free answers alone."""
    bare = len(prompts)
    found = answerer.reply(prompts, images, [()] * bare, [None] * bare, [True] * bare)
    return [reply.text for reply in found]


def chosen(answerer: Answerer, prompts: Texts, images: Images, choices: Lists) -> list[list[float]]:
    """The log-probabilities of choices alone."""
    bare = len(prompts)
    found = answerer.reply(prompts, images, choices, [None] * bare, [False] * bare)
    return [reply.choices for reply in found]


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
