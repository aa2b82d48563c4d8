"""Batched decoding with a cache, and log-likelihoods of continuations.

An example's result does not depend on its neighbours: see `read_prompts.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from midstream.model.read_prompts import (
    Prompt,
    State,
    as_prompts,
    everyone_sees,
    filled,
    id_tensor,
    parts_of,
    read_prompts,
)
from midstream.model.vlm import VLM

# Lengths of sequences and continuations in a batch are rounded up to multiples of these.
_LENGTHS, _CONTINUATIONS = 16, 4
# Positions of continuations whose logits are made together, at most; and for each row of a batch.
_POSITIONS_AT_ONCE, _POSITIONS_OF_ROW = 256, 4


def generate(
    vlm: VLM,
    prompts: Sequence[list[int] | Prompt],
    features: Float[Tensor, "images patches width"] | None,
    **how: Any,
) -> list[list[int]]:
    """The new tokens after each prompt, of `generate_and_score` without continuations."""
    found = generate_and_score(vlm, prompts, features, [()] * len(prompts), **how)
    return [tokens for tokens, _ in found]


def choice_logprobs(
    vlm: VLM,
    prompts: Sequence[list[int] | Prompt],
    features: Float[Tensor, "images patches width"] | None,
    choices: Sequence[Sequence[list[int]]],
    **how: Any,
) -> list[list[tuple[float, bool]]]:
    """What `generate_and_score` says of continuations, without new tokens."""
    return [scores for _, scores in generate_and_score(vlm, prompts, features, choices, **how)]


@torch.no_grad()
def generate_and_score(
    vlm: VLM,
    prompts: Sequence[list[int] | Prompt],
    features: Float[Tensor, "images patches width"] | None,
    choices: Sequence[Sequence[list[int]]],
    *,
    max_new_tokens: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    batch_size: int,
    plain: bool = False,
) -> list[tuple[list[int], list[tuple[float, bool]]]]:
    """For each prompt the likeliest tokens after it, up to `max_new_tokens` or a stop id (left
    out); and of each of its continuations the summed log-probability of the tokens, and whether
    each of them is the most likely one at its place.

    `features` are the encoder's, None without images. A prompt says where its pictures stand, or is
    a list of ids without any. What several prompts have for a head, an image alone too, is read
    once for all of them; under prefix attention, where it sees the prompt, for each. It is read
    once for text and continuations, of which neither changes the other; logits are made where a
    token of theirs stands.
    `plain` prompts are text to go on with, which has no prefix whatever the model's attention.
    Raises ValueError for an empty prompt or continuation, or images that do not fit the prompts.
    """
    if any(not ids for own in choices for ids in own):
        raise ValueError("a continuation is empty; there is nothing to be likely")
    asked = as_prompts(prompts, 0 if features is None else len(features))
    results: list[tuple[list[int], list[tuple[float, bool]]]] = [([], []) for _ in prompts]
    rooms = [max(max_new_tokens, _width(own)) for own in choices]
    for chosen, state in read_prompts(vlm, asked, features, rooms, batch_size, plain=plain):
        scores = _score(vlm, state, [choices[i] for i in chosen], len(state.held))
        texts = _go_on(vlm, state, len(chosen), max_new_tokens, stop_ids)
        for index, tokens, own in zip(chosen, texts, scores, strict=True):
            results[index] = (tokens, own)
    return results


def _go_on(
    vlm: VLM, state: State, num_prompts: int, max_new_tokens: int, stop_ids: frozenset[int]
) -> list[list[int]]:
    """The new tokens of the first rows, the prompts'; the others fill up the batch."""
    num_rows = len(state.held)
    position_ids, held, last = state.last_position[:, None], state.held, state.last
    results: list[list[int]] = [[] for _ in range(num_prompts)]
    open_rows = set(range(num_prompts))
    for step in range(max_new_tokens):
        tokens = vlm.decoder.output(last).argmax(dim=-1).tolist()
        open_rows -= {row for row in open_rows if tokens[row] in stop_ids}
        for row in open_rows:
            results[row].append(tokens[row])
        if not open_rows or step + 1 == max_new_tokens:
            break
        position_ids = position_ids + 1
        held = torch.cat((held, held.new_ones(num_rows, 1)), dim=1)
        embeddings = vlm.decoder.embed(id_tensor([[token] for token in tokens], vlm))
        seen = everyone_sees(state.latest, 1)
        last = vlm.decode(embeddings, position_ids, held[:, None, None], state.cache, seen=seen)[
            :, -1
        ]
    return results


def _width(choices: Sequence[list[int]]) -> int:
    """How many tokens of a prompt's continuations are fed: all but the last, a target only."""
    longest = max((len(ids) for ids in choices), default=1) - 1
    return -(-longest // _CONTINUATIONS) * _CONTINUATIONS


def _score(
    vlm: VLM, state: State, choices: Sequence[Sequence[list[int]]], batch_size: int
) -> list[list[tuple[float, bool]]]:
    """What is said of the first rows' continuations; the state is left as it is."""
    results: list[list[tuple[float, bool]]] = [[(0.0, True)] * len(own) for own in choices]
    asked = [(row, at) for row, own in enumerate(choices) for at in range(len(own))]
    if not asked:
        return results
    likely, best = _scored(vlm, state.last, batch_size)
    at_once = min(_POSITIONS_AT_ONCE, _POSITIONS_OF_ROW * batch_size)
    longer: dict[int, list[tuple[int, int]]] = {}
    for row, at in asked:
        token, *rest = choices[row][at]
        results[row][at] = (likely(row, token), best[row] == token)
        if rest:
            longer.setdefault(_width(choices[row]), []).append((row, at))
    for width, members in sorted(longer.items()):
        for part in parts_of(list(range(len(members))), batch_size):
            own = [members[number] for number in filled(part, batch_size)]
            ids = [choices[row][at] for row, at in own]
            hidden = _read_on(vlm, state, [row for row, _ in own], ids, width)
            places = [(place, n) for place in range(len(part)) for n in range(len(ids[place]) - 1)]
            flat = hidden[[place for place, _ in places], [n for _, n in places]]
            likely, best = _scored(vlm, flat, at_once)
            for number, (place, n) in enumerate(places):
                (row, at), token = own[place], ids[place][n + 1]
                total, greedy = results[row][at]
                total += likely(number, token)
                results[row][at] = (total, greedy and best[number] == token)
    return results


def _scored(
    vlm: VLM, hidden: Float[Tensor, "positions hidden"], at_once: int
) -> tuple[Callable[[int, int], float], list[int]]:
    """What each position predicts: the log-probability of a token at it, and its likeliest token.

    Logits are made for `at_once` positions at a time, always as many: a position's are the same
    whatever stands beside it.
    """
    logits: list[Tensor] = []
    norms: list[float] = []
    best: list[int] = []
    for first in range(0, len(hidden), at_once):
        part = hidden[first : first + at_once]
        filled = torch.cat((part, part.new_zeros(at_once - len(part), part.shape[1])))
        found = vlm.decoder.output(filled).float()
        logits.append(found)
        norms += found.logsumexp(dim=-1).tolist()
        best += found.argmax(dim=-1).tolist()

    def likely(position: int, token: int) -> float:
        return float(logits[position // at_once][position % at_once, token]) - norms[position]

    return likely, best


def _read_on(
    vlm: VLM, state: State, rows: list[int], continuations: Sequence[list[int]], width: int
) -> Float[Tensor, "rows seq hidden"]:
    """Hidden states of continuations, each behind the read row that it belongs to."""
    chosen = id_tensor(rows, vlm)
    cache, held = state.cache.select(chosen), state.held[chosen]
    fed = [ids[:-1] + [0] * (width - len(ids) + 1) for ids in continuations]
    embeddings = vlm.decoder.embed(id_tensor(fed, vlm))
    steps = torch.arange(1, width + 1, device=embeddings.device)
    position_ids = state.last_position[chosen][:, None] + steps
    # Padding is behind the tokens, where they do not look.
    order = held.new_ones(width, width).tril().expand(len(rows), -1, -1)
    seen = torch.cat((held[:, None].expand(-1, width, -1), order), dim=2)
    latest = None if state.latest is None else state.latest[chosen]
    shown = everyone_sees(latest, width)
    return vlm.decode(embeddings, position_ids, seen[:, None], cache, seen=shown)


@torch.no_grad()
def sequence_logprobs(
    vlm: VLM, sequences: list[list[int]], starts: list[int], *, batch_size: int
) -> list[tuple[float, bool]]:
    """For each sequence the log-probability of its tokens from `start` on, and whether each of
    them is the most likely one at its place.

    Sequences are plain text, which has no prefix whatever the model's attention.
    Raises ValueError for a start before 1 (the first token has no probability) or behind the end.
    """
    for start, ids in zip(starts, sequences, strict=True):
        if not 1 <= start <= len(ids):
            raise ValueError(f"a continuation starts at {start} of {len(ids)} tokens; 1 is first")
    results: list[tuple[float, bool]] = [(0.0, True)] * len(sequences)
    # The last token is a target only.
    lengths = [max(1, len(ids) - 1) for ids in sequences]
    groups: dict[int, list[int]] = {}
    for index, size in enumerate(lengths):
        groups.setdefault(-(-size // _LENGTHS) * _LENGTHS, []).append(index)
    for length, members in sorted(groups.items()):
        for chosen in parts_of(members, batch_size):
            own = filled(chosen, batch_size)
            rows = [sequences[i][: lengths[i]] + [0] * (length - lengths[i]) for i in own]
            input_ids = id_tensor(rows, vlm)
            position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
            # Padding is behind the tokens, where causal attention does not look.
            hidden = vlm.decode(vlm.decoder.embed(input_ids), position_ids, None)
            for row, index in enumerate(chosen):
                ids, start = sequences[index], starts[index]
                # By example rather than by batch: one more shape that neighbours must not change.
                logits = vlm.decoder.output(hidden[row, start - 1 : len(ids) - 1]).float()
                targets = id_tensor(ids[start:], vlm)
                chances = logits.log_softmax(dim=-1).gather(1, targets[:, None])
                is_greedy = bool((logits.argmax(dim=-1) == targets).all())
                results[index] = float(chances.double().sum()), is_greedy
    return results
