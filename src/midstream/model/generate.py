"""Batched greedy decoding with a cache, and log-likelihoods of continuations.

An example's result does not depend on its neighbours: every batch is filled up to `batch_size`
rows, and holds only examples whose length rounds up to the same multiple of `length_multiple`.
The shapes that an example is computed in follow from itself alone, and rows do not mix.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from midstream.model.decoder import Cache
from midstream.model.vlm import VLM


@torch.no_grad()
def greedy(
    vlm: VLM,
    prompts: list[list[int]],
    features: Float[Tensor, "prompts patches width"] | None,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    batch_size: int,
    length_multiple: int = 16,
) -> list[list[int]]:
    """The most likely tokens after each prompt, up to `max_new_tokens` or a stop id (left out).

    `features` are the encoder's, one image a prompt, placed before it; None without images.
    Raises ValueError for an empty prompt or another number of images than of prompts.
    """
    if features is not None and len(features) != len(prompts):
        raise ValueError(f"{len(features)} images were given for {len(prompts)} prompts")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; start it with the end-of-text token")
    results: list[list[int]] = [[] for _ in prompts]
    for length, chosen in _batches([len(p) for p in prompts], batch_size, length_multiple):
        # Rows that fill up the batch repeat its last example; their result is not looked at.
        filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
        rows = [[0] * (length - len(prompts[i])) + prompts[i] for i in filled]
        held = [[False] * (length - len(prompts[i])) + [True] * len(prompts[i]) for i in filled]
        new = _greedy_batch(
            vlm,
            _tensor(rows, vlm),
            _tensor(held, vlm),
            None if features is None else features[filled],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
        )
        for index, tokens in zip(chosen, new[: len(chosen)], strict=True):
            results[index] = tokens
    return results


def _greedy_batch(
    vlm: VLM,
    input_ids: Int[Tensor, "rows seq"],
    held: Bool[Tensor, "rows seq"],
    features: Float[Tensor, "rows patches width"] | None,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> list[list[int]]:
    # A row is [image, padding, prompt]. The mask hides the padding and positions count around it,
    # which makes its place free; behind the image it is the same columns for every row.
    decoder = vlm.decoder
    embeddings = decoder.embed(input_ids)
    if features is not None:
        projected = vlm.project(features, embeddings)
        assert projected is not None
        embeddings = torch.cat((projected, embeddings), dim=1)
        held = torch.cat((held.new_ones(projected.shape[:2]), held), dim=1)
    num_rows, width = held.shape
    position_ids = (held.cumsum(dim=1) - 1).clamp(min=0)
    itself = torch.eye(width, dtype=torch.bool, device=held.device)
    mask = (itself.new_ones(width, width).tril() & held[:, None, :]) | itself
    cache = Cache(
        decoder.config,
        rows=num_rows,
        columns=width + max_new_tokens,
        dtype=embeddings.dtype,
        device=embeddings.device,
    )
    hidden = decoder(embeddings, position_ids, mask[:, None], cache)
    position_ids = position_ids[:, -1:]
    results: list[list[int]] = [[] for _ in range(num_rows)]
    open_rows = set(range(num_rows))
    for step in range(max_new_tokens):
        best = decoder.output(hidden[:, -1]).argmax(dim=-1)
        tokens = best.tolist()
        open_rows -= {row for row in open_rows if tokens[row] in stop_ids}
        for row in open_rows:
            results[row].append(tokens[row])
        if not open_rows or step + 1 == max_new_tokens:
            break
        position_ids = position_ids + 1
        held = torch.cat((held, held.new_ones(num_rows, 1)), dim=1)
        hidden = decoder(decoder.embed(best[:, None]), position_ids, held[:, None, None], cache)
    return results


@torch.no_grad()
def sequence_logprobs(
    vlm: VLM,
    sequences: list[list[int]],
    starts: list[int],
    *,
    batch_size: int,
    length_multiple: int = 16,
) -> list[tuple[float, bool]]:
    """For each sequence the log-probability of its tokens from `start` on, and whether each of
    them is the most likely one at its place.

    Raises ValueError for a start before 1 (the first token has no probability) or behind the end.
    """
    for start, ids in zip(starts, sequences, strict=True):
        if not 1 <= start <= len(ids):
            raise ValueError(f"a continuation starts at {start} of {len(ids)} tokens; 1 is first")
    results: list[tuple[float, bool]] = [(0.0, True)] * len(sequences)
    # The last token is a target only.
    lengths = [max(1, len(ids) - 1) for ids in sequences]
    for length, chosen in _batches(lengths, batch_size, length_multiple):
        filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
        rows = [sequences[i][: lengths[i]] + [0] * (length - lengths[i]) for i in filled]
        input_ids = _tensor(rows, vlm)
        position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        # Padding is behind the tokens, where causal attention does not look.
        hidden = vlm.decoder(vlm.decoder.embed(input_ids), position_ids, None)
        for row, index in enumerate(chosen):
            ids, start = sequences[index], starts[index]
            targets = torch.tensor(ids[start:], dtype=torch.int64, device=input_ids.device)
            # By example rather than by batch: one more shape that neighbours must not change.
            logits = vlm.decoder.output(hidden[row, start - 1 : len(ids) - 1]).float()
            chances = logits.log_softmax(dim=-1).gather(1, targets[:, None])
            is_greedy = bool((logits.argmax(dim=-1) == targets).all())
            results[index] = (float(chances.double().sum()), is_greedy)
    return results


def _batches(
    lengths: Sequence[int], batch_size: int, length_multiple: int
) -> Iterator[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(-(-length // length_multiple) * length_multiple, []).append(index)
    for length, members in sorted(groups.items()):
        for first in range(0, len(members), batch_size):
            yield length, members[first : first + batch_size]


def _tensor(rows: list[list[int]] | list[list[bool]], vlm: VLM) -> Tensor:
    return torch.tensor(rows, device=vlm.decoder.output.weight.device)
