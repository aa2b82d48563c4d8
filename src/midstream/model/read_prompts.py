"""Prompts of tokens and pictures, read into a cache in batches; what prompts begin alike with is
read once.

An example's result does not depend on its neighbours: the shapes that it is computed in follow from
itself alone (`_LENGTHS`, full batches), and rows do not mix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from midstream.config import Attention
from midstream.core.batch import PADDING
from midstream.model.attention import NO_PICTURE, PICTURE_RULES, Place, pictures_of, sees
from midstream.model.decoder import Cache, compute_dtype
from midstream.model.pretrained import TransformersCache
from midstream.model.projector import Shown, shown
from midstream.model.vlm import VLM, slot_positions

AnyCache = Cache | TransformersCache
Item = TypeVar("Item")
# Lengths of prompts in a batch are rounded up to multiples of this.
_LENGTHS = 16
# Positions of images that the decoder reads together: four images of 729 patches fill a device, and
# small ones are read by the batch.
_IMAGE_POSITIONS = 4 * 729
# Positions of a batch of several prompts at most, those to come included: room for 64 prompts of a
# picture of 729, and for five behind sixteen shots with such pictures.
_BATCH_POSITIONS = 2**16


class Part(NamedTuple):
    """Tokens, and the pictures among them: before which token each stands and its number among the
    features, in ascending order of places."""

    ids: tuple[int, ...] = ()
    pictures: tuple[tuple[int, int], ...] = ()

    def then(self, other: "Part") -> "Part":
        """This and, behind it, the other."""
        moved = tuple((len(self.ids) + place, image) for place, image in other.pictures)
        return Part(self.ids + other.ids, self.pictures + moved)


class Prompt(NamedTuple):
    """What stands before an answer: a head, read once for all prompts that have it, and the rest.

    `prefix`: so many of its first tokens see each other under prefix attention, with the pictures
    before them; None is all. A head that sees the rest is read with each prompt.
    """

    head: Part
    rest: Part
    prefix: int | None = None


def as_prompts(prompts: Sequence[list[int] | Prompt], num_images: int) -> list[Prompt]:
    """Prompts as they are; lists of ids are text alone.

    Raises ValueError for an empty prompt, and for images that are not there or not in order.
    """
    asked = [
        one if isinstance(one, Prompt) else Prompt(Part(), Part(tuple(one))) for one in prompts
    ]
    for prompt in asked:
        if not prompt.rest.ids:
            raise ValueError("a prompt is empty; start it with the end-of-text token")
        for part in (prompt.head, prompt.rest):
            places = [place for place, _ in part.pictures]
            inside = all(0 <= place <= len(part.ids) for place in places)
            if places != sorted(places) or not inside:
                raise ValueError(f"pictures stand at {places} of {len(part.ids)} tokens")
            if bad := [image for _, image in part.pictures if not 0 <= image < num_images]:
                raise ValueError(f"a prompt shows image {bad[0]}, {num_images} images were given")
        if any(place == len(prompt.rest.ids) for place, _ in prompt.rest.pictures):
            raise ValueError("a prompt ends with a picture; end it with what stands before a reply")
    return asked


class Embedded(NamedTuple):
    """Rows at decoder width, which of their positions are held, and the number in its row of the
    picture that each is of, or NO_PICTURE."""

    embeddings: Float[Tensor, "rows seq hidden"]
    held: Bool[Tensor, "rows seq"]
    pictures: Int[Tensor, "rows seq"]
    # For gated blocks: the features of each row's pictures, where it has some.
    features: Float[Tensor, "rows count left width"] | None = None

    def behind(self, first: "Embedded") -> "Embedded":
        """The same rows behind others; their pictures are counted on."""
        embeddings = torch.cat((first.embeddings, self.embeddings), dim=1)
        held = torch.cat((first.held, self.held), dim=1)
        kept = [one for one in (first.features, self.features) if one is not None]
        features = torch.cat(kept, dim=1) if kept else None
        return Embedded(embeddings, held, counted_on(first.pictures, self.pictures), features)

    def seen(self, pictures: Tensor, latest: Tensor | None) -> Shown | None:
        """What gated blocks look at from these positions, which are of `pictures` or behind them;
        from those before all of them at `latest`, a picture of each row, if that is given."""
        kept = [one for one in (latest, self.features) if one is not None]
        if not kept:
            return None
        features = torch.cat(kept, dim=1)
        rows, count = features.shape[:2]
        first = NO_PICTURE if latest is None else 0
        own = torch.where(pictures == NO_PICTURE, first, pictures + (latest is not None))
        own = own.cummax(dim=1).values
        row = torch.arange(rows, device=own.device)[:, None]
        image_of = torch.where(own == NO_PICTURE, NO_PICTURE, own + count * row)
        return shown(features.flatten(0, 1), image_of)

    def last(self, latest: Tensor | None) -> Tensor | None:
        """The latest picture of each row, which may be one before these positions."""
        return latest if self.features is None else self.features[:, -1:]


def everyone_sees(latest: Float[Tensor, "rows 1 left width"] | None, width: int) -> Shown | None:
    """What gated blocks look at from `width` positions of each row behind its latest picture."""
    if latest is None:
        return None
    row = torch.arange(len(latest), device=latest.device)[:, None]
    return shown(latest[:, 0], row.expand(-1, width))


def counted_on(
    first: Int[Tensor, "rows held"], pictures: Int[Tensor, "rows seq"]
) -> Int[Tensor, "rows all"]:
    """Numbers of pictures behind others, from theirs on."""
    if not first.shape[1]:
        return pictures
    start = first.amax(dim=1, keepdim=True) + 1
    own = torch.where(pictures == NO_PICTURE, NO_PICTURE, pictures + start)
    return torch.cat((first, own), dim=1)


def embed_parts(
    vlm: VLM,
    parts: Sequence[Part],
    features: Float[Tensor, "images patches width"] | None,
    num_ids: int | None = None,
) -> Embedded:
    """Parts of equally many pictures at decoder width, with the features in their places, filled up
    on the left to `num_ids` tokens.

    Raises ValueError for a picture shown to a model without an encoder.
    """
    shown, projected = [image for part in parts for _, image in part.pictures], None
    if shown:
        assert features is not None, "as_prompts checks what is shown"
        projected = vlm.project(features[shown], vlm.decoder.output.weight[None])
    longest = max(len(part.ids) for part in parts) if num_ids is None else num_ids
    width = vlm.config.image_tokens
    rows, held, slots = list[list[int]](), list[list[bool]](), list[list[int]]()
    for row, part in enumerate(parts):
        missing, done = longest - len(part.ids), 0
        ids = [0] * missing
        for place, _ in part.pictures:
            ids += part.ids[done:place]
            slots.append([row, len(ids)])
            ids += [0] * width
            done = place
        rows.append([*ids, *part.ids[done:]])
        held.append([False] * missing + [True] * (len(rows[-1]) - missing))
    embeddings = vlm.decoder.embed(id_tensor(rows, vlm))
    pictures = torch.full(embeddings.shape[:2], NO_PICTURE, device=embeddings.device)
    if projected is not None:
        found, places = embeddings.to(projected.dtype), id_tensor(slots, vlm)
        at = slot_positions(places, width, embeddings.shape[1])
        embeddings = vlm.put_images(found, projected, at)
        pictures = pictures_of(places, width, (len(rows), embeddings.shape[1]))
        count = len(parts[0].pictures)
        pictures = torch.where(pictures == NO_PICTURE, NO_PICTURE, pictures % count)
    own = projected if vlm.gated is not None else None
    kept = None if own is None else own.view(len(rows), -1, *own.shape[1:])
    return Embedded(embeddings, id_tensor(held, vlm), pictures, kept)


@dataclass
class State:
    """Rows that have been read: which columns of the cache are held, and the last hidden state."""

    last: Float[Tensor, "rows hidden"]
    last_position: Int[Tensor, " rows"]
    held: Bool[Tensor, "rows seen"]
    cache: AnyCache
    # For gated blocks: the features of each row's latest picture.
    latest: Float[Tensor, "rows 1 left width"] | None = None


class _Shape(NamedTuple):
    """What prompts that are read together have in common: the tokens and pictures of their head,
    and whether it is read for itself; the rest's tokens, filled up, and pictures; how many tokens
    may follow."""

    head: tuple[int, int]
    alone: bool
    length: int
    pictures: int
    room: int

    def positions(self, image_tokens: int) -> int:
        """Of a prompt and what follows, where a picture takes so many."""
        tokens, pictures = self.head
        return tokens + self.length + self.room + (pictures + self.pictures) * image_tokens


def read_prompts(
    vlm: VLM,
    prompts: Sequence[Prompt],
    features: Float[Tensor, "images patches width"] | None,
    rooms: Sequence[int],
    batch_size: int,
    *,
    plain: bool,
) -> Iterator[tuple[list[int], State]]:
    """Prompts in batches: their numbers, and a state whose first rows they are, with room for
    `rooms[i]` tokens more. A head is read once, whatever the shapes of those that have it.

    Batches hold `batch_size` prompts, or fewer where these are long (_BATCH_POSITIONS). `plain`
    prompts have no prefix whatever the model's attention.
    """
    groups: dict[_Shape, list[int]] = {}
    # Of one segment each.
    attention: Attention = "segments" if plain else vlm.config.attention
    has_prefix = attention == "prefix"
    for index, ((head, rest, prefix), room) in enumerate(zip(prompts, rooms, strict=True)):
        size = len(head.ids), len(head.pictures)
        sees_rest = has_prefix and (prefix is None or prefix > len(head.ids))
        length = -(-len(rest.ids) // _LENGTHS) * _LENGTHS
        alone = size != (0, 0) and not sees_rest
        shape = _Shape(size, alone, length, len(rest.pictures), room)
        groups.setdefault(shape, []).append(index)
    reader = _Reader(vlm, prompts, features, batch_size, attention)
    for shape, members in sorted(groups.items()):
        if not shape.alone:
            for chosen in parts_of(members, reader.rows_of(shape)):
                yield chosen, reader.read(chosen, shape, None)
    for size in sorted({shape.head for shape in groups if shape.alone}):
        yield from reader.behind_heads({s: groups[s] for s in groups if s[:2] == (size, True)})


@dataclass(frozen=True)
class _Reader:
    vlm: VLM
    prompts: Sequence[Prompt]
    features: Tensor | None
    batch_size: int
    attention: Attention

    def rows_of(self, shape: _Shape) -> int:
        """How many prompts of a shape a batch has; of each batch as many."""
        return self.rows(shape.positions(self.vlm.config.image_tokens))

    def rows(self, positions: int) -> int:
        """The same of prompts of so many positions."""
        return max(1, min(self.batch_size, _BATCH_POSITIONS // positions))

    def behind_heads(self, groups: Mapping[_Shape, list[int]]) -> Iterator[tuple[list[int], State]]:
        """Prompts whose heads, all of one size, are read for themselves, before them."""
        head_of = {i: self.prompts[i]._replace(rest=Part()) for own in groups.values() for i in own}
        heads = sorted(set(head_of.values()), key=lambda one: (one.head.pictures, one.head.ids))
        tokens, pictures_of_head = next(iter(groups)).head
        width = tokens + pictures_of_head * self.vlm.config.image_tokens
        for part in parts_of(heads, self.rows(width)):
            cache, pictures, latest = self._read_heads(part)
            row_of = {head: row for row, head in enumerate(part)}
            for shape, members in sorted(groups.items()):
                asking = (i for i in members if head_of[i] in row_of)
                about = sorted(asking, key=lambda i: row_of[head_of[i]])
                size = self.rows_of(shape)
                for chosen in parts_of(about, size):
                    rows = [row_of[head_of[i]] for i in filled(chosen, size)]
                    more = shape.positions(self.vlm.config.image_tokens) - width
                    at = id_tensor(rows, self.vlm)
                    own = cache.select(at, cache.length + more)
                    seen = None if latest is None else latest[at]
                    yield chosen, self.read(chosen, shape, own, pictures[at], seen)

    def _read_heads(
        self, heads: list[Prompt]
    ) -> tuple[AnyCache, Int[Tensor, "rows held"], Tensor | None]:
        """Heads in a cache, a row each, in batches of one size: neighbours change nothing; where
        their pictures stand, and for gated blocks the features of the last."""
        caches, places, last = list[Any](), list[Tensor](), list[Tensor]()
        shown = max(1, len(heads[0].head.pictures) * self.vlm.config.image_tokens)
        at_once = max(1, min(self.batch_size, _IMAGE_POSITIONS // shown))
        for chosen in parts_of(heads, at_once):
            own = filled(chosen, at_once)
            parts = embed_parts(self.vlm, [one.head for one in own], self.features)
            (rows, width), device = parts.held.shape, parts.held.device
            position_ids = torch.arange(width, device=device).expand(rows, -1)
            seen = None
            if self.attention in ("prefix", *PICTURE_RULES):
                seen = self._seen(own, position_ids, parts.held, parts.pictures)[:, None]
            cache = new_cache(self.vlm, parts.embeddings, width)
            # Keys and values are wanted: the last block need not be finished, but for one position.
            at = torch.arange(rows, device=device) * width
            looks = parts.seen(parts.pictures, None)
            self.vlm.decode(parts.embeddings, position_ids, seen, cache, at, seen=looks)
            caches.append(cache)
            places.append(parts.pictures)
            if (latest := parts.last(None)) is not None:
                last.append(latest)
        found = torch.cat(last) if last else None
        return type(caches[0]).joined(caches), torch.cat(places), found

    def read(
        self,
        chosen: list[int],
        shape: _Shape,
        cache: AnyCache | None,
        known: Int[Tensor, "rows held"] | None = None,
        latest: Float[Tensor, "rows 1 left width"] | None = None,
    ) -> State:
        """Read prompts of one shape, behind heads that are in the cache, with pictures where
        `known` says, or, without one, with them. `latest`: as in `State`, of the heads.

        A row is [head, padding, rest]. The mask hides the padding and positions count around it,
        which makes its place free; behind the head it is the same columns for every row.
        """
        vlm, own = self.vlm, [self.prompts[i] for i in filled(chosen, self.rows_of(shape))]
        rests = [prompt.rest for prompt in own]
        parts = embed_parts(vlm, rests, self.features, shape.length)
        if cache is None and shape.head != (0, 0):
            heads = [prompt.head for prompt in own]
            parts = parts.behind(embed_parts(vlm, heads, self.features))
        if cache is None:
            cache = new_cache(vlm, parts.embeddings, parts.held.shape[1] + shape.room)
        num_rows, width = parts.held.shape
        held = torch.cat((parts.held.new_ones((num_rows, cache.length)), parts.held), dim=1)
        pictures = parts.pictures if known is None else counted_on(known, parts.pictures)
        position_ids = (held.cumsum(dim=1) - 1)[:, cache.length :].clamp(min=0)
        seen = self._seen(own, position_ids, held, pictures)
        at = torch.arange(1, num_rows + 1, device=held.device) * width - 1
        looks = parts.seen(parts.pictures, latest)
        last = vlm.decode(parts.embeddings, position_ids, seen[:, None], cache, at, seen=looks)
        # All that follows sees what the last position does.
        return State(last, position_ids[:, -1], seen[:, -1], cache, parts.last(latest))

    def _seen(
        self, prompts: Sequence[Prompt], position_ids: Tensor, held: Tensor, pictures: Tensor
    ) -> Bool[Tensor, "rows seq all"]:
        """Who of the new positions sees whom of these and those in the cache before them; padding
        sees itself, so that no softmax is empty."""
        new = held.shape[1] - position_ids.shape[1]
        prefix = None
        if self.attention == "prefix":
            ends = [_prefix_end(prompt, self.vlm.config.image_tokens) for prompt in prompts]
            inside = position_ids < id_tensor(ends, self.vlm)[:, None]
            # What is in the cache is seen by all.
            prefix = torch.cat((inside.new_zeros((len(held), new)), inside), dim=1)
        column = torch.arange(held.shape[1], device=held.device).expand_as(held)
        segment = torch.where(held, 0, PADDING)
        row = Place(column, segment, prefix, pictures, pictures.cummax(dim=1).values)
        query, key = row.map(lambda one: one[:, new:, None]), row.map(lambda one: one[:, None])
        return cast(Tensor, sees(query, key, self.attention))


def _prefix_end(prompt: Prompt, width: int) -> int:
    """How many positions of a prompt see each other."""
    whole, end = prompt.head.then(prompt.rest), prompt.prefix
    end = len(whole.ids) if end is None else end
    return end + width * sum(place < end for place, _ in whole.pictures)


def parts_of(members: list[Item], size: int) -> Iterator[list[Item]]:
    """So many at a time."""
    for first in range(0, len(members), size):
        yield members[first : first + size]


def filled(members: list[Item], size: int) -> list[Item]:
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
