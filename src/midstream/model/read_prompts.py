"""Prompts of tokens and pictures, read into a cache in batches; what prompts begin alike with is
read once.

An example's result does not depend on its neighbours: the shapes that it is computed in follow from
itself alone (`_LENGTHS`, full batches), and rows do not mix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from midstream.model.decoder import Cache, compute_dtype
from midstream.model.pretrained import TransformersCache
from midstream.model.vlm import VLM, scatter_image_features

AnyCache = Cache | TransformersCache
Item = TypeVar("Item")
# Lengths of prompts in a batch are rounded up to multiples of this.
_LENGTHS = 16
# Positions of images that the decoder reads together: four images of 729 patches fill a device, and
# small ones are read by the batch.
_IMAGE_POSITIONS = 4 * 729


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


def as_prompts(
    prompts: Sequence[list[int] | Prompt],
    features: Float[Tensor, "images patches width"] | None,
    image_of: Sequence[int] | None,
    begin: int | None,
) -> list[Prompt]:
    """Prompts as they are; lists of ids behind an image each, image `image_of[i]` (`i`, where that
    is None) with the token `begin` before it, or behind none where there are no features.

    Raises ValueError for an empty prompt, and for images that are not there or not in order.
    """
    num_images = 0 if features is None else len(features)
    plain = [ids for ids in prompts if not isinstance(ids, Prompt)]
    if len(plain) < len(prompts):
        asked = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
        if plain or image_of is not None or begin is not None:
            raise ValueError("whole prompts name their own images and beginnings; give them alone")
    else:
        images = _image_of(len(plain), num_images, image_of)
        first = () if begin is None else (begin,)
        heads = [Part(first, ((len(first), image),)) for image in images] or [Part()] * len(plain)
        asked = [Prompt(head, Part(tuple(ids))) for head, ids in zip(heads, plain, strict=True)]
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


def _image_of(num_prompts: int, num_images: int, image_of: Sequence[int] | None) -> Sequence[int]:
    if image_of is None:
        if num_images and num_images != num_prompts:
            raise ValueError(f"{num_images} images were given for {num_prompts} prompts")
        return range(num_images)
    if len(image_of) != num_prompts or not all(0 <= image < num_images for image in image_of):
        raise ValueError(
            f"image_of must give one of {num_images} images to each of {num_prompts} prompts, "
            f"it is {list(image_of)}"
        )
    return image_of


def embed_parts(
    vlm: VLM,
    parts: Sequence[Part],
    features: Float[Tensor, "images patches width"] | None,
    num_ids: int | None = None,
) -> tuple[Float[Tensor, "rows seq hidden"], Bool[Tensor, "rows seq"]]:
    """Parts of equally many pictures at decoder width, with the features in their places, filled up
    on the left to `num_ids` tokens; and which positions are held.

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
    if projected is not None:
        found = embeddings.to(projected.dtype)
        embeddings = scatter_image_features(found, projected, id_tensor(slots, vlm))
    return embeddings, id_tensor(held, vlm)


# ------------------------------------------------------------------------------------- reading


@dataclass
class State:
    """Rows that have been read: which columns of the cache are held, and the last hidden state."""

    last: Float[Tensor, "rows hidden"]
    last_position: Int[Tensor, " rows"]
    held: Bool[Tensor, "rows seen"]
    cache: AnyCache


class _Shape(NamedTuple):
    """What prompts that are read together have in common: the tokens and pictures of their head,
    and whether it is read for itself; the rest's tokens, filled up, and pictures; how many tokens
    may follow."""

    head: tuple[int, int]
    alone: bool
    length: int
    pictures: int
    room: int


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

    `plain` prompts have no prefix whatever the model's attention.
    """
    groups: dict[_Shape, list[int]] = {}
    has_prefix = not plain and vlm.config.attention == "prefix"
    for index, ((head, rest, prefix), room) in enumerate(zip(prompts, rooms, strict=True)):
        size = len(head.ids), len(head.pictures)
        sees_rest = has_prefix and (prefix is None or prefix > len(head.ids))
        length = -(-len(rest.ids) // _LENGTHS) * _LENGTHS
        alone = size != (0, 0) and not sees_rest
        shape = _Shape(size, alone, length, len(rest.pictures), room)
        groups.setdefault(shape, []).append(index)
    reader = _Reader(vlm, prompts, features, batch_size, has_prefix)
    for shape, members in sorted(groups.items()):
        if not shape.alone:
            for chosen in parts_of(members, batch_size):
                yield chosen, reader.read(chosen, shape, None)
    for size in sorted({shape.head for shape in groups if shape.alone}):
        yield from reader.behind_heads({s: groups[s] for s in groups if s[:2] == (size, True)})


@dataclass(frozen=True)
class _Reader:
    vlm: VLM
    prompts: Sequence[Prompt]
    features: Tensor | None
    batch_size: int
    has_prefix: bool

    def behind_heads(self, groups: Mapping[_Shape, list[int]]) -> Iterator[tuple[list[int], State]]:
        """Prompts whose heads, all of one size, are read for themselves, before them."""
        head_of = {i: self.prompts[i]._replace(rest=Part()) for own in groups.values() for i in own}
        heads = sorted(set(head_of.values()), key=lambda one: (one.head.pictures, one.head.ids))
        for part in parts_of(heads, self.batch_size):
            cache = self._read_heads(part)
            row_of = {head: row for row, head in enumerate(part)}
            for shape, members in sorted(groups.items()):
                asking = (i for i in members if head_of[i] in row_of)
                about = sorted(asking, key=lambda i: row_of[head_of[i]])
                for chosen in parts_of(about, self.batch_size):
                    rows = [row_of[head_of[i]] for i in filled(chosen, self.batch_size)]
                    more = shape.length + shape.pictures * self.vlm.config.image_tokens + shape.room
                    own = cache.select(id_tensor(rows, self.vlm), cache.length + more)
                    yield chosen, self.read(chosen, shape, own)

    def _read_heads(self, heads: list[Prompt]) -> AnyCache:
        """Heads in a cache, a row each, in batches of one size: neighbours change nothing."""
        caches: list[Any] = []
        shown = max(1, len(heads[0].head.pictures) * self.vlm.config.image_tokens)
        at_once = max(1, min(self.batch_size, _IMAGE_POSITIONS // shown))
        for chosen in parts_of(heads, at_once):
            own = filled(chosen, at_once)
            embeddings, held = embed_parts(self.vlm, [one.head for one in own], self.features)
            rows, width = held.shape
            position_ids = torch.arange(width, device=held.device).expand(rows, -1)
            seen = None if not self.has_prefix else self._seen(own, position_ids, held)[:, None]
            cache = new_cache(self.vlm, embeddings, width)
            # Keys and values are wanted: the last block need not be finished, but for one position.
            at = torch.arange(rows, device=held.device) * width
            self.vlm.decoder(embeddings, position_ids, seen, cache, at)
            caches.append(cache)
        return type(caches[0]).joined(caches)  # type: ignore[no-any-return]

    def read(self, chosen: list[int], shape: _Shape, cache: AnyCache | None) -> State:
        """Read prompts of one shape, behind heads that are in the cache or, without one, with them.

        A row is [head, padding, rest]. The mask hides the padding and positions count around it,
        which makes its place free; behind the head it is the same columns for every row.
        """
        vlm, own = self.vlm, [self.prompts[i] for i in filled(chosen, self.batch_size)]
        rests = [prompt.rest for prompt in own]
        embeddings, held = embed_parts(vlm, rests, self.features, shape.length)
        if cache is None and shape.head != (0, 0):
            first, known = embed_parts(vlm, [prompt.head for prompt in own], self.features)
            embeddings = torch.cat((first, embeddings), dim=1)
            held = torch.cat((known, held), dim=1)
        if cache is None:
            cache = new_cache(vlm, embeddings, embeddings.shape[1] + shape.room)
        num_rows, width = held.shape
        before = held.new_ones((num_rows, cache.length))
        position_ids = (before.shape[1] + held.cumsum(dim=1) - 1).clamp(min=0)
        # What is in the cache already is seen by all.
        own_seen = self._seen(own, position_ids, held)
        seen = torch.cat((before[:, None].expand(-1, width, -1), own_seen), dim=2)
        at = torch.arange(1, num_rows + 1, device=held.device) * width - 1
        last = vlm.decoder(embeddings, position_ids, seen[:, None], cache, at)
        return State(last, position_ids[:, -1], torch.cat((before, held), dim=1), cache)

    def _seen(
        self, prompts: Sequence[Prompt], position_ids: Tensor, held: Tensor
    ) -> Bool[Tensor, "rows seq seq"]:
        """Who sees whom among the new positions: what is before them, the prefix itself whole, and
        padding itself, so that no softmax is empty."""
        width = held.shape[1]
        itself = torch.eye(width, dtype=torch.bool, device=held.device)
        order = itself.new_ones(width, width).tril()[None]
        if self.has_prefix:
            ends = [_prefix_end(prompt, self.vlm.config.image_tokens) for prompt in prompts]
            inside = position_ids < id_tensor(ends, self.vlm)[:, None]
            order = order | (inside[:, :, None] & inside[:, None])
        return (order & held[:, None]) | itself


def _prefix_end(prompt: Prompt, width: int) -> int:
    """How many positions of a prompt see each other."""
    whole, end = prompt.head.then(prompt.rest), prompt.prefix
    end = len(whole.ids) if end is None else end
    return end + width * sum(place < end for place, _ in whole.pictures)


# ------------------------------------------------------------------------------------- batches


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
