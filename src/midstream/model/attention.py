"""Who sees whom in a row: one rule, and ways to compute with it.

Letters in names: R rows, T positions, S positions seen by attention, H heads, C channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Literal, NamedTuple, cast, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from midstream.config import Attention
from midstream.config.model import LEAST_CUT_ROW
from midstream.core.batch import PADDING


@dataclass(frozen=True)
class Runs:
    """Of each row, the lengths of its segments, in their order, and the padding behind them; and
    each segment's own mask, None where it is plain causal attention."""

    lengths: tuple[tuple[int, ...], ...]
    padding: tuple[int, ...]
    masks: tuple[tuple[Tensor | None, ...], ...]


# Dense: True where a position sees another. None: plain causal attention.
Mask = Bool[Tensor, "rows 1 seq seen"] | BlockMask | Runs | None
# dense: for every decoder, on every device. cut: as runs where that is faster. blocks: BlockMask.
MaskKind = Literal["dense", "cut", "blocks"]

NO_PICTURE = -1
# What asks where pictures stand.
PICTURE_RULES = ("pictures", "latest")
# FlexAttention's kernels want this many channels a head; heads with fewer are filled up with zeros.
_LEAST_CHANNELS = 16


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

    FlexAttention skips blocks that nobody sees, but has no backward on a CPU; there, and for
    decoders that know no other, the rule is a dense mask. Segments that are long enough are cut
    apart on a CPU, and each is plain causal attention or has a small mask of its own. None where
    that gives the same at every held position, whatever `kind` says; finding out reads a number or
    a few back to the host.
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


def _blocks(place: Place, attention: Attention) -> BlockMask:
    @no_type_check
    def rule(row, head, query, key):
        def at(column):
            # Not `place.map`: this is traced.
            prefix = None if place.prefix is None else place.prefix[row, column]
            picture = None if place.picture is None else place.picture[row, column]
            latest = None if place.latest is None else place.latest[row, column]
            return Place(column, place.segment[row, column], prefix, picture, latest)

        return sees(at(query), at(key), attention)

    num_rows, length = place.segment.shape
    return create_block_mask(rule, num_rows, None, length, length, device=place.segment.device)


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
    if not isinstance(mask, BlockMask):
        return scaled_dot_product_attention(
            query_RHTC, key_RHSC, value_RHSC, attn_mask=mask, is_causal=mask is None
        )
    channels = query_RHTC.shape[-1]
    missing = max(0, _LEAST_CHANNELS - channels)
    filled = [pad(part, (0, missing)) for part in (query_RHTC, key_RHSC, value_RHSC)]
    attention = _fused() if query_RHTC.is_cuda else flex_attention
    mixed = attention(*filled, block_mask=mask, scale=channels**-0.5)
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
