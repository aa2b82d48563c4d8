"""Who sees whom in a row: one rule, and ways to compute with it.

Letters in names: R rows, T positions, S positions seen by attention, H heads, C channels of a head.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Literal, NamedTuple, cast, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from midstream.config import Attention
from midstream.config.model import LEAST_CUT_ROW, MASK_BLOCK
from midstream.core.batch import PADDING


@dataclass(frozen=True)
class Runs:
    """Of each row, the lengths of its segments, in their order, and the padding behind them; and
    each segment's own mask, None where it is plain causal attention."""

    lengths: tuple[tuple[int, ...], ...]
    padding: tuple[int, ...]
    masks: tuple[tuple[Tensor | None, ...], ...]


# Dense: True where a position sees another. None: plain causal attention. A BlockMask is made by
# `make_mask` alone: its `mask_mod` is `_shows` of what stands in a row.
Mask = Bool[Tensor, "rows 1 seq seen"] | BlockMask | Runs | None
# dense: for every device. cut: as runs where that is faster, on a CPU. blocks: BlockMask.
MaskKind = Literal["dense", "cut", "blocks"]

NO_PICTURE = -1
# What asks where pictures stand.
PICTURE_RULES = ("pictures", "latest")
# FlexAttention's kernels want this many channels a head; heads with fewer are filled up with zeros.
_LEAST_CHANNELS = 16
_BLOCK_TENSORS = tuple(
    f"{kind}{side}_{what}"
    for kind in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
)


class Place(NamedTuple):
    """What the rule asks of positions: their columns, segments, whether they are of a prefix, the
    numbers of their pictures (NO_PICTURE in a text), and of the latest that begins up to there.

    Pictures are numbered upwards in each row; None where the attention does not ask.
    """

    column: Tensor
    segment: Tensor
    prefix: Tensor | None = None
    picture: Tensor | None = None
    latest: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Place":
        """Every tensor changed alike."""
        others = (None if one is None else change(one) for one in self[2:])
        return Place(change(self.column), change(self.segment), *others)


# Unchecked: FlexAttention calls it with scalars that stand for whole axes.
@no_type_check
def sees(query: Place, key: Place, attention: Attention) -> Tensor:
    """The rule: where `query` sees `key`, whose tensors broadcast.

    Causal: a position sees itself and all that is held before it in the row. Segments: so too, in
    its own segment only. Prefix: as segments, and positions of its prefix see each other. Pictures:
    as segments, and positions of one picture see each other. Latest: as segments, but the positions
    of a picture are hidden from all that stands behind the beginning of a later one, that picture
    included; so a text sees the latest picture before it, and none where there is none.

    Padding sees itself, so that no softmax is empty, and is seen by nobody else.
    """
    seen = query.column >= key.column
    if attention == "prefix":
        seen = seen | (query.prefix & key.prefix)
    if attention == "pictures":
        seen = seen | ((query.picture == key.picture) & (key.picture != NO_PICTURE))
    if attention == "latest":
        seen = seen & ((key.picture == NO_PICTURE) | (key.picture == query.latest))
    if attention != "causal":
        seen = seen & (query.segment == key.segment)
    held = (query.segment != PADDING) & (key.segment != PADDING)
    return (seen & held) | (query.column == key.column)


def pictures_of(
    image_slots: Int[Tensor, "slots 2"], num_positions: int, shape: tuple[int, int]
) -> Int[Tensor, "rows seq"]:
    """The number of the picture that each position of rows is part of, counted over all rows, or
    NO_PICTURE; a picture takes `num_positions` from its slot (row, first column) on."""
    rows, length = shape
    found = image_slots.new_full((rows * length,), NO_PICTURE)
    starts = image_slots[:, 0] * length + image_slots[:, 1]
    columns = starts[:, None] + torch.arange(num_positions, device=starts.device)
    numbers = torch.arange(len(starts), device=starts.device)[:, None].expand_as(columns)
    return found.index_copy(0, columns.flatten(), numbers.flatten()).view(rows, length)


def make_mask(
    segment_ids: Int[Tensor, "rows seq"],
    prefix: Bool[Tensor, "rows seq"] | None,
    attention: Attention,
    *,
    kind: MaskKind,
    pictures: Int[Tensor, "rows seq"] | None = None,
) -> Mask:
    """The mask of whole rows, for `attend` or a decoder; `prefix` is read for "prefix" alone, and
    `pictures` (`pictures_of`) for "pictures" and "latest".

    FlexAttention skips blocks that nobody sees, but has no backward on a CPU; there the rule is a
    dense mask, or segments that are long enough are cut apart, and each is plain causal attention
    or has a small mask of its own. None where that gives the same at every held position, whatever
    `kind` says.

    Of tensors on a CPU no other device hears; `move_mask` brings the result there. Of others a
    number or a few are read back to the host, and for "blocks" all of them.
    """
    assert (prefix is None) == (attention != "prefix"), "prefix positions belong to that attention"
    assert (pictures is None) == (attention not in PICTURE_RULES), "as prefix positions do"
    if pictures is not None and _like_segments(segment_ids, pictures, attention):
        pictures, attention = None, "segments"
    if pictures is None and bool(_is_plain(segment_ids, prefix, attention)):
        return None
    latest = pictures.cummax(dim=1).values if pictures is not None else None
    column = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    row = Place(column, segment_ids, prefix, pictures, latest)
    if kind == "blocks":
        return _blocks(row, attention)
    can_cut = attention not in ("causal", "prefix")
    if kind == "cut" and can_cut and segment_ids.shape[1] >= LEAST_CUT_ROW:
        runs = _runs(row, attention)
        if runs is not None:
            return runs
    return _dense(row, attention)


def _runs(place: Place, attention: Attention) -> Runs | None:
    """None where padding stands elsewhere than behind a row, or a segment in two places."""
    lengths, padding, masks = [], [], []
    for number, row in enumerate(place.segment):
        ids, counts = torch.unique_consecutive(row, return_counts=True)
        held, sizes = ids.tolist(), counts.tolist()
        pad_size = sizes.pop() if held[-1] == PADDING else 0
        if PADDING in held[: len(sizes)] or len(set(held)) < len(held):
            return None
        lengths.append(tuple(sizes))
        padding.append(pad_size)
        masks.append(
            tuple(
                _own_mask(place, number, slice(end - size, end), attention)
                for size, end in zip(sizes, accumulate(sizes), strict=True)
            )
        )
    return Runs(tuple(lengths), tuple(padding), tuple(masks))


def _own_mask(place: Place, row: int, columns: slice, attention: Attention) -> Tensor | None:
    if place.picture is None:
        return None
    own = place.map(lambda one: one[row : row + 1, columns])
    assert own.picture is not None, "taken from those of the rows"
    same = _like_segments(own.segment, own.picture, attention)
    return None if same else _dense(own, attention)


def _like_segments(segment_ids: Tensor, pictures: Tensor, attention: Attention) -> bool:
    """Whether a rule of pictures comes to that of segments."""
    new = torch.ones_like(pictures, dtype=torch.bool)
    new[:, 1:] = pictures.diff(dim=1) != 0
    new &= pictures != NO_PICTURE
    if attention == "pictures":
        # Each picture has one position.
        return int(new.sum()) == int((pictures != NO_PICTURE).sum())
    # No segment has two pictures.
    rows, length = segment_ids.shape
    row = torch.arange(rows, device=segment_ids.device)[:, None]
    segments = (segment_ids + length * row)[new]
    return len(torch.unique(segments)) == len(segments)


def _is_plain(segment_ids: Tensor, prefix: Tensor | None, attention: Attention) -> Tensor:
    if attention == "causal":
        # Padding is only behind what is held, where nothing held looks.
        return ((segment_ids != PADDING).int().diff(dim=1) <= 0).all()
    # Each row is one segment, with padding only behind it.
    plain = (segment_ids <= 0).all() & (segment_ids.diff(dim=1) <= 0).all()
    return plain if prefix is None else plain & (prefix.sum(dim=1) <= 1).all()


def _dense(place: Place, attention: Attention) -> Bool[Tensor, "rows 1 seq seq"]:
    query, key = place.map(lambda one: one[:, :, None]), place.map(lambda one: one[:, None])
    return cast(Tensor, sees(query, key, attention)[:, None])


# Unchecked: as `sees`. `held` is a Place without its column.
@no_type_check
def _shows(held, attention: Attention, row, head, query, key) -> Tensor:
    def at(column):
        return Place(column, *[None if one is None else one[row, column] for one in held])

    return sees(at(query), at(key), attention)


def _blocks(place: Place, attention: Attention) -> BlockMask:
    some, every = _seen_blocks(place.map(lambda one: one.cpu()), attention)
    length = place.segment.shape[1]
    made = BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=MASK_BLOCK,
        # Not a closure: masks are sent between processes.
        mask_mod=partial(_shows, tuple(place[1:]), attention),
        seq_lengths=(length, length),
    )
    return cast(BlockMask, move_mask(made, place.segment.device))


def _listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Of [rows, query blocks, key blocks] how many are True, and their numbers before the others'.

    As many numbers as there are blocks, whatever is seen: a shape is compiled once.
    """
    order = np.argsort(~blocks, axis=-1, kind="stable")
    count = torch.from_numpy(blocks.sum(axis=-1, dtype=np.int32))
    return count[:, None], torch.from_numpy(order.astype(np.int32))[:, None]


class _Spans(NamedTuple):
    """Of each block of positions, [rows, blocks]: the lowest and the highest of their numbers, the
    lowest above the highest where none is counted; and whether all positions are."""

    low: np.ndarray
    high: np.ndarray
    whole: np.ndarray

    @classmethod
    def of(cls, numbers: np.ndarray, counted: np.ndarray) -> "_Spans":
        """Of numbers from 0 up, [rows, seq]; positions behind the row fill its last block."""
        rows, length = numbers.shape
        fill = ((0, 0), (0, -length % MASK_BLOCK))
        shape = (rows, -1, MASK_BLOCK)
        numbers, counted = (np.pad(one, fill).reshape(shape) for one in (numbers, counted))
        low = np.where(counted, numbers, np.iinfo(np.int64).max).min(axis=-1)
        high = np.where(counted, numbers, -1).max(axis=-1)
        return cls(low, high, np.logical_and.reduce(counted, axis=-1))

    def meet(self, keys: "_Spans") -> np.ndarray:
        """Where a block of ours and one of `keys` may have a number in common."""
        low = np.maximum(self.low[:, :, None], keys.low[:, None])
        return np.asarray(low <= np.minimum(self.high[:, :, None], keys.high[:, None]))

    def agree(self, keys: "_Spans") -> np.ndarray:
        """Where all positions of both blocks have one and the same number."""
        ours, theirs = (one.whole & (one.low == one.high) for one in (self, keys))
        same = self.low[:, :, None] == keys.low[:, None]
        return np.asarray(same & ours[:, :, None] & theirs[:, None])


def _seen_blocks(place: Place, attention: Attention) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys each block of queries may see something of, and which all of it sees
    all of: [rows, query blocks, key blocks]. The second is within the first.

    What is seen is never left out. Where segments and pictures are numbered upwards in a row, few
    blocks of the first are empty; whatever the numbers, all of the second are full.
    """
    segment = place.segment.numpy()
    held = segment != PADDING
    own = _Spans.of(np.zeros_like(segment) if attention == "causal" else segment, held)
    together, one = own.meet(own), own.agree(own)
    some, every = together, one
    if place.latest is not None and place.picture is not None and attention == "latest":
        picture, latest = place.picture.numpy(), place.latest.numpy()
        pictured = picture != NO_PICTURE
        shown = _Spans.of(picture, held & pictured)
        newest = _Spans.of(latest, held & (latest != NO_PICTURE))
        plain = _Spans.of(segment, held & ~pictured)
        some = own.meet(plain) | (together & newest.meet(shown))
        every = one & (plain.whole[:, None] | newest.agree(shown))
    number = np.arange(own.low.shape[1])
    before = number[:, None] > number
    some, every = (some & before) | (number[:, None] == number), every & before
    both: _Spans | None = None
    if attention == "prefix" and place.prefix is not None:
        both = _Spans.of(segment, held & place.prefix.numpy())
    elif attention == "pictures" and place.picture is not None:
        picture = place.picture.numpy()
        both = _Spans.of(picture, held & (picture != NO_PICTURE))
    if both is not None:
        some, every = some | (together & both.meet(both)), every | (one & both.agree(both))
    return some, every


def map_mask(mask: Mask, change: Callable[[Tensor], Tensor]) -> Mask:
    """The mask with each of its tensors changed alike: moved, or put into page-locked memory."""
    if isinstance(mask, Tensor):
        return change(mask)
    if isinstance(mask, Runs):
        masks = (tuple(None if one is None else change(one) for one in row) for row in mask.masks)
        return replace(mask, masks=tuple(masks))
    if mask is None:
        return None
    held, attention = cast("partial[Tensor]", mask.mask_mod).args
    changed = copy(mask)
    for name in _BLOCK_TENSORS:
        setattr(changed, name, change(getattr(mask, name)))
    held = tuple(None if one is None else change(one) for one in held)
    changed.mask_mod = partial(_shows, held, attention)
    return changed


def move_mask(mask: Mask, device: torch.device) -> Mask:
    """The mask on another device; of page-locked memory it is copied while the host goes on."""
    return map_mask(mask, lambda one: one.to(device, non_blocking=True))


def attend(
    query_RHTC: Float[Tensor, "rows heads seq channels"],
    key_RHSC: Float[Tensor, "rows heads seen channels"],
    value_RHSC: Float[Tensor, "rows heads seen channels"],
    mask: Mask,
) -> Float[Tensor, "rows heads seq channels"]:
    """Softmax attention over what `mask` shows; None is plain causal attention.

    A BlockMask has no backward on a CPU (torch refuses it).
    """
    if isinstance(mask, Runs):
        return _attend_runs(query_RHTC, key_RHSC, value_RHSC, mask)
    if isinstance(mask, BlockMask):
        return attend_blocks(query_RHTC, key_RHSC, value_RHSC, mask)
    return scaled_dot_product_attention(
        query_RHTC, key_RHSC, value_RHSC, attn_mask=mask, is_causal=mask is None
    )


def attend_blocks(
    query_RHTC: Float[Tensor, "rows heads seq channels"],
    key_RHSC: Float[Tensor, "rows held_heads seq channels"],
    value_RHSC: Float[Tensor, "rows held_heads seq channels"],
    mask: BlockMask,
    scale: float | None = None,
) -> Float[Tensor, "rows heads seq channels"]:
    """As `attend`. Several heads in a row may share a head of keys and values; scores are times
    `scale`, channels^-0.5 for None."""
    channels = query_RHTC.shape[-1]
    missing = max(0, _LEAST_CHANNELS - channels)
    filled = [pad(part, (0, missing)) for part in (query_RHTC, key_RHSC, value_RHSC)]
    attention = _fused() if query_RHTC.is_cuda else flex_attention
    mixed = attention(
        *filled,
        block_mask=mask,
        scale=channels**-0.5 if scale is None else scale,
        enable_gqa=query_RHTC.shape[1] != key_RHSC.shape[1],
    )
    return cast(Tensor, mixed)[..., :channels]


def _attend_runs(query_RHTC: Tensor, key_RHSC: Tensor, value_RHSC: Tensor, runs: Runs) -> Tensor:
    rows = []
    for row, (lengths, pad_size) in enumerate(zip(runs.lengths, runs.padding, strict=True)):
        sizes = [*lengths, pad_size] if pad_size else list(lengths)
        parts = [
            torch.split(part[row : row + 1], sizes, dim=2)
            for part in (query_RHTC, key_RHSC, value_RHSC)
        ]
        mixed = [
            scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
            for query, key, value, mask in zip(*parts, runs.masks[row], strict=False)
        ]
        if pad_size:
            mixed.append(parts[2][-1])  # each sees itself alone
        rows.append(torch.cat(mixed, dim=2))
    return torch.cat(rows)


@cache
def _fused():  # type: ignore[no-untyped-def]
    # Here rather than at import, which would take a second for everyone. One kernel a shape; past
    # torch's limit on those, fullgraph raises where torch would go on without a fused kernel.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
