"""Batched decoding with a cache, and log-likelihoods of continuations.

An example's result does not depend on its neighbours: the shapes that it is computed in follow from
itself alone (`_LENGTHS`, full batches), and rows do not mix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from midstream.model.decoder import Cache, Sampling, choose, compute_dtype
from midstream.model.pretrained import TransformersCache
from midstream.model.vlm import VLM

AnyCache = Cache | TransformersCache
# Lengths of prompts and continuations in a batch are rounded up to multiples of these.
_LENGTHS, _CONTINUATIONS = 16, 4
# The length of a prompt, filled up, and how many tokens may follow it.
_Shape = tuple[int, int]
# Positions of images that the decoder reads together: four images of 729 patches fill a device, and
# small ones are read by the batch.
_IMAGE_POSITIONS = 4 * 729
# Positions of continuations whose logits are made together, at most; and for each row of a batch.
_POSITIONS_AT_ONCE, _POSITIONS_OF_ROW = 256, 4

# -------------------------------------------------------------------------------- many prompts


@torch.no_grad()
def generate(
    vlm: VLM,
    prompts: Sequence[list[int]],
    features: Float[Tensor, "images patches width"] | None,
    *,
    image_of: Sequence[int] | None = None,
    begin: int | None = None,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    batch_size: int,
    sampling: Sampling | None = None,
    plain: bool = False,
) -> list[list[int]]:
    """The tokens after each prompt, up to `max_new_tokens` or a stop id (left out): the likeliest
    each time, or drawn as `sampling` says.

    `features` are the encoder's, None without images; image `image_of[i]` (`i`, where that is None)
    stands before prompt i. Among prompts whose lengths round up alike, an image is read once for
    all that ask about it; under prefix attention, where it sees the prompt, for each of them.
    `begin` is a token that stands before each image.
    `plain` prompts are text to go on with, which has no prefix whatever the model's attention.
    Raises ValueError for an empty prompt, or images that do not fit the prompts.
    """
    found = generate_and_score(
        vlm,
        prompts,
        features,
        [()] * len(prompts),
        image_of=image_of,
        begin=begin,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        batch_size=batch_size,
        sampling=sampling,
        plain=plain,
    )
    return [tokens for tokens, _ in found]


@torch.no_grad()
def generate_and_score(
    vlm: VLM,
    prompts: Sequence[list[int]],
    features: Float[Tensor, "images patches width"] | None,
    choices: Sequence[Sequence[list[int]]],
    *,
    image_of: Sequence[int] | None = None,
    begin: int | None = None,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    batch_size: int,
    sampling: Sampling | None = None,
    plain: bool = False,
) -> list[tuple[list[int], list[tuple[float, bool]]]]:
    """For each prompt what `generate` gives, and of its continuations what `choice_logprobs` does,
    from one reading of the prompt; neither changes the other. Raises what these raise."""
    if any(not ids for own in choices for ids in own):
        raise ValueError("a continuation is empty; there is nothing to be likely")
    images = _image_of(prompts, features, image_of)
    results: list[tuple[list[int], list[tuple[float, bool]]]] = [([], []) for _ in prompts]
    sizes = [
        (len(prompt), max(max_new_tokens, _width(own)))
        for prompt, own in zip(prompts, choices, strict=True)
    ]
    groups = _alike(sizes, (_LENGTHS, 1))
    for shape, chosen, image, cache in _looked(vlm, groups, features, images, begin, batch_size):
        rows = [prompts[i] for i in _filled(chosen, batch_size)]
        state = _read(vlm, rows, shape, image, cache, plain=plain)
        scores = _score(vlm, state, [choices[i] for i in chosen], batch_size)
        texts = _go_on(vlm, state, chosen, max_new_tokens, stop_ids, sampling)
        for index, tokens, own in zip(chosen, texts, scores, strict=True):
            results[index] = (tokens, own)
    return results


def _image_of(
    prompts: Sequence[list[int]], features: Tensor | None, image_of: Sequence[int] | None
) -> Sequence[int]:
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; start it with the end-of-text token")
    num_images = 0 if features is None else len(features)
    if image_of is None:
        if features is not None and num_images != len(prompts):
            raise ValueError(f"{num_images} images were given for {len(prompts)} prompts")
        return range(num_images)
    if len(image_of) != len(prompts) or not all(0 <= image < num_images for image in image_of):
        raise ValueError(
            f"image_of must give one of {num_images} images to each of {len(prompts)} prompts, "
            f"it is {list(image_of)}"
        )
    return image_of


def _looked(
    vlm: VLM,
    groups: Mapping[_Shape, list[int]],
    features: Tensor | None,
    images: Sequence[int],
    begin: int | None,
    batch_size: int,
) -> Iterator[tuple[_Shape, list[int], Tensor | None, AnyCache | None]]:
    """Batches of prompts of one shape, and their images: to be read with the prompts, or in a
    cache. An image is read once, whatever the shapes of those that ask."""
    if features is None or vlm.config.attention == "prefix":
        for shape, members in sorted(groups.items()):
            for chosen in _parts(members, batch_size):
                shown = [images[i] for i in _filled(chosen, batch_size)] if len(images) else []
                image = None if features is None else project_images(vlm, features[shown], begin)
                yield shape, chosen, image, None
        return
    asked = sorted({images[i] for members in groups.values() for i in members})
    for part in _parts(asked, batch_size):
        cache = _read_images(vlm, features, part, begin, batch_size)
        row_of = {image: row for row, image in enumerate(part)}
        for shape, members in sorted(groups.items()):
            about = sorted((i for i in members if images[i] in row_of), key=lambda i: images[i])
            for chosen in _parts(about, batch_size):
                rows = [row_of[images[i]] for i in _filled(chosen, batch_size)]
                columns = cache.length + sum(shape)
                yield shape, chosen, None, cache.select(id_tensor(rows, vlm), columns)


def _read_images(
    vlm: VLM, features: Tensor, images: list[int], begin: int | None, batch_size: int
) -> AnyCache:
    """Images in a cache, a row each, in batches of one size so that neighbours change nothing."""
    caches: list[Any] = []
    at_once = max(1, min(batch_size, _IMAGE_POSITIONS // features.shape[1]))
    for part in _parts(images, at_once):
        embeddings = project_images(vlm, features[_filled(part, at_once)], begin)
        rows, width = embeddings.shape[:2]
        position_ids = torch.arange(width, device=embeddings.device)
        cache = new_cache(vlm, embeddings, width)
        # Keys and values are wanted: the last block need not be finished, but for one position.
        at = torch.arange(rows, device=embeddings.device) * width
        vlm.decoder(embeddings, position_ids.expand(rows, -1), None, cache, at)
        caches.append(cache)
    return type(caches[0]).joined(caches)  # type: ignore[no-any-return]


def project_images(
    vlm: VLM, features: Float[Tensor, "images patches width"], begin: int | None
) -> Float[Tensor, "images seen hidden"]:
    """Features at decoder width, behind the token `begin` where there is one: `seen` is `patches`
    or one more. Raises ValueError for a model without an encoder."""
    projected = vlm.project(features, vlm.decoder.output.weight[None])
    assert projected is not None, "features were given"
    if begin is None:
        return projected
    first = vlm.decoder.embed(id_tensor([[begin]] * len(features), vlm))
    return torch.cat((first.to(projected.dtype), projected), dim=1)


@dataclass
class _State:
    """Rows that have been read: which columns of the cache are held, and the last hidden state."""

    last: Float[Tensor, "rows hidden"]
    last_position: Int[Tensor, " rows"]
    held: Bool[Tensor, "rows seen"]
    cache: AnyCache


def _read(
    vlm: VLM,
    prompts: Sequence[list[int]],
    shape: _Shape,
    image: Float[Tensor, "rows patches hidden"] | None,
    cache: AnyCache | None,
    *,
    plain: bool,
) -> _State:
    """Read prompts, behind an image that is in the cache or given, or behind none.

    A row is [image, padding, prompt]. The mask hides the padding and positions count around it,
    which makes its place free; behind the image it is the same columns for every row.
    """
    length, room = shape
    input_ids = id_tensor([[0] * (length - len(row)) + row for row in prompts], vlm)
    held = id_tensor([[False] * (length - len(row)) + [True] * len(row) for row in prompts], vlm)
    embeddings = vlm.decoder.embed(input_ids)
    if image is not None:
        embeddings = torch.cat((image, embeddings), dim=1)
        held = torch.cat((held.new_ones(image.shape[:2]), held), dim=1)
    if cache is None:
        cache = new_cache(vlm, embeddings, embeddings.shape[1] + room)
    num_rows, width = held.shape
    before = held.new_ones((num_rows, cache.length))
    position_ids = (before.shape[1] + held.cumsum(dim=1) - 1).clamp(min=0)
    itself = torch.eye(width, dtype=torch.bool, device=held.device)
    order = itself.new_ones(width, width)
    if plain or vlm.config.attention != "prefix":
        order = order.tril()
    # What is in the cache already is seen by all.
    seen = torch.cat((before[:, None].expand(-1, width, -1), (order & held[:, None]) | itself), 2)
    at = torch.arange(1, num_rows + 1, device=embeddings.device) * width - 1
    last = vlm.decoder(embeddings, position_ids, seen[:, None], cache, at)
    return _State(last, position_ids[:, -1], torch.cat((before, held), dim=1), cache)


def _go_on(
    vlm: VLM,
    state: _State,
    prompts: list[int],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampling: Sampling | None,
) -> list[list[int]]:
    """The new tokens of the first rows, which are these prompts; the others fill up the batch."""
    num_rows = len(state.held)
    position_ids, held, last = state.last_position[:, None], state.held, state.last
    results: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for step in range(max_new_tokens):
        tokens = choose(vlm.decoder.output(last), sampling, _filled(prompts, num_rows), step)
        open_rows -= {row for row in open_rows if tokens[row] in stop_ids}
        for row in open_rows:
            results[row].append(tokens[row])
        if not open_rows or step + 1 == max_new_tokens:
            break
        position_ids = position_ids + 1
        held = torch.cat((held, held.new_ones(num_rows, 1)), dim=1)
        embeddings = vlm.decoder.embed(id_tensor([[token] for token in tokens], vlm))
        last = vlm.decoder(embeddings, position_ids, held[:, None, None], state.cache)[:, -1]
    return results


# ----------------------------------------------------------------------------- log-likelihoods


@torch.no_grad()
def choice_logprobs(
    vlm: VLM,
    prompts: Sequence[list[int]],
    features: Float[Tensor, "images patches width"] | None,
    choices: Sequence[Sequence[list[int]]],
    *,
    image_of: Sequence[int] | None = None,
    begin: int | None = None,
    batch_size: int,
    plain: bool = False,
) -> list[list[tuple[float, bool]]]:
    """For each prompt and each of its continuations the summed log-probability of the
    continuation's tokens, and whether each of them is the most likely one at its place.

    A prompt, and an image that several ask about, is read once for all continuations, and logits
    are made where a token of theirs stands. Other arguments as in `generate`. Raises ValueError
    for an empty prompt, images that do not fit the prompts, or an empty continuation.
    """
    found = generate_and_score(
        vlm,
        prompts,
        features,
        choices,
        image_of=image_of,
        begin=begin,
        max_new_tokens=0,
        stop_ids=frozenset(),
        batch_size=batch_size,
        plain=plain,
    )
    return [scores for _, scores in found]


def _width(choices: Sequence[list[int]]) -> int:
    """How many tokens of a prompt's continuations are fed: all but the last, a target only."""
    longest = max((len(ids) for ids in choices), default=1) - 1
    return -(-longest // _CONTINUATIONS) * _CONTINUATIONS


def _score(
    vlm: VLM, state: _State, choices: Sequence[Sequence[list[int]]], batch_size: int
) -> list[list[tuple[float, bool]]]:
    """`choice_logprobs` of the first rows' continuations; the state is left as it is."""
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
        for part in _parts(list(range(len(members))), batch_size):
            own = [members[number] for number in _filled(part, batch_size)]
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
    vlm: VLM, state: _State, rows: list[int], continuations: Sequence[list[int]], width: int
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
    hidden: Tensor = vlm.decoder(embeddings, position_ids, seen[:, None], cache)
    return hidden


@torch.no_grad()
def sequence_logprobs(
    vlm: VLM,
    sequences: list[list[int]],
    starts: list[int],
    *,
    batch_size: int,
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
    groups = _alike([(length, 0) for length in lengths], (_LENGTHS, 1))
    for (length, _), members in sorted(groups.items()):
        for chosen in _parts(members, batch_size):
            filled = _filled(chosen, batch_size)
            rows = [sequences[i][: lengths[i]] + [0] * (length - lengths[i]) for i in filled]
            input_ids = id_tensor(rows, vlm)
            position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
            # Padding is behind the tokens, where causal attention does not look.
            hidden = vlm.decoder(vlm.decoder.embed(input_ids), position_ids, None)
            for row, index in enumerate(chosen):
                ids, start = sequences[index], starts[index]
                # By example rather than by batch: one more shape that neighbours must not change.
                logits = vlm.decoder.output(hidden[row, start - 1 : len(ids) - 1]).float()
                targets = id_tensor(ids[start:], vlm)
                chances = logits.log_softmax(dim=-1).gather(1, targets[:, None])
                is_greedy = bool((logits.argmax(dim=-1) == targets).all())
                results[index] = float(chances.double().sum()), is_greedy
    return results


# ------------------------------------------------------------------------------------- batches


def _alike(sizes: Sequence[_Shape], multiples: tuple[int, int]) -> dict[_Shape, list[int]]:
    """Examples by their size, rounded up."""
    groups: dict[_Shape, list[int]] = {}
    for index, (length, room) in enumerate(sizes):
        one, two = multiples
        groups.setdefault((-(-length // one) * one, -(-room // two) * two), []).append(index)
    return groups


def _parts(members: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(members), size):
        yield members[first : first + size]


def _filled(members: list[int], size: int) -> list[int]:
    """Up to `size` by repeating the last one, whose further results are not looked at."""
    return members + [members[-1]] * (size - len(members))


def id_tensor(rows: Sequence[int] | Sequence[list[int]] | Sequence[list[bool]], vlm: VLM) -> Tensor:
    """Ids or masks as a tensor where the model is."""
    return torch.tensor(rows, device=vlm.decoder.output.weight.device)


def new_cache(vlm: VLM, like: Float[Tensor, "rows seq hidden"], columns: int) -> AnyCache:
    """An empty cache of keys and values for these rows."""
    return vlm.decoder.new_cache(
        rows=len(like), columns=columns, dtype=compute_dtype(like), device=like.device
    )
