"""Who sees whom in a row: one rule, and ways to compute with it.

Letters in names: R rows, T positions, S positions seen by attention, H heads, C channels of a head.
"""

from dataclasses import dataclass
from functools import cache
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
    """Of each row, the lengths of its segments, in their order, and the padding behind them."""

    lengths: tuple[tuple[int, ...], ...]
    padding: tuple[int, ...]


# Dense: True where a position sees another. None: plain causal attention.
Mask = Bool[Tensor, "rows 1 seq seen"] | BlockMask | Runs | None
# dense: for every decoder, on every device. cut: as runs where that is faster. blocks: BlockMask.
MaskKind = Literal["dense", "cut", "blocks"]

# FlexAttention's kernels want this many channels a head; heads with fewer are filled up with zeros.
_LEAST_CHANNELS = 16


class _Place(NamedTuple):
    column: Tensor
    segment: Tensor
    prefix: Tensor | None


# Unchecked: FlexAttention calls it with scalars that stand for whole axes.
@no_type_check
def _sees(query: _Place, key: _Place, attention: Attention) -> Tensor:
    """Causal: a position sees itself and all that is held before it in the row; segments: so too,
    in its own segment only; prefix: as segments, and positions of its prefix see each other.

    Padding sees itself, so that no softmax is empty, and is seen by nobody else.
    """
    seen = query.column >= key.column
    if attention == "prefix":
        seen = seen | (query.prefix & key.prefix)
    if attention != "causal":
        seen = seen & (query.segment == key.segment)
    held = (query.segment != PADDING) & (key.segment != PADDING)
    return (seen & held) | (query.column == key.column)


def make_mask(
    segment_ids: Int[Tensor, "rows seq"],
    prefix: Bool[Tensor, "rows seq"] | None,
    attention: Attention,
    *,
    kind: MaskKind,
) -> Mask:
    """The mask of whole rows, for `attend` or a decoder; `prefix` is read for "prefix" alone.

    FlexAttention skips blocks that nobody sees, but has no backward on a CPU; there, and for
    decoders that know no other, the rule is a dense mask. Segments that are long enough are cut
    apart on a CPU, and each is plain causal attention. None where that gives the same at every held
    position, whatever `kind` says; finding out reads one number back to the host.
    """
    assert (prefix is None) == (attention != "prefix"), "prefix positions belong to that attention"
    if bool(_is_plain(segment_ids, prefix, attention)):
        return None
    if kind == "blocks":
        return _blocks(segment_ids, prefix, attention)
    cut = kind == "cut" and attention == "segments" and segment_ids.shape[1] >= LEAST_CUT_ROW
    runs = _runs(segment_ids) if cut else None
    return _dense(segment_ids, prefix, attention) if runs is None else runs


def _runs(segment_ids: Tensor) -> Runs | None:
    """None where padding stands elsewhere than behind a row, or a segment in two places."""
    lengths, padding = [], []
    for row in segment_ids:
        ids, counts = torch.unique_consecutive(row, return_counts=True)
        held, sizes = ids.tolist(), counts.tolist()
        pad_size = sizes.pop() if held[-1] == PADDING else 0
        if PADDING in held[: len(sizes)] or len(set(held)) < len(held):
            return None
        lengths.append(tuple(sizes))
        padding.append(pad_size)
    return Runs(tuple(lengths), tuple(padding))


def _is_plain(segment_ids: Tensor, prefix: Tensor | None, attention: Attention) -> Tensor:
    if attention == "causal":
        # Padding is only behind what is held, where nothing held looks.
        return ((segment_ids != PADDING).int().diff(dim=1) <= 0).all()
    # Each row is one segment, with padding only behind it.
    plain = (segment_ids <= 0).all() & (segment_ids.diff(dim=1) <= 0).all()
    return plain if prefix is None else plain & (prefix.sum(dim=1) <= 1).all()


def _dense(
    segment_ids: Tensor, prefix: Tensor | None, attention: Attention
) -> Bool[Tensor, "rows 1 seq seq"]:
    column = torch.arange(segment_ids.shape[1], device=segment_ids.device)[None]

    def place(axis: int) -> _Place:
        mine = None if prefix is None else prefix.unsqueeze(axis)
        return _Place(column.unsqueeze(axis), segment_ids.unsqueeze(axis), mine)

    return cast(Tensor, _sees(place(2), place(1), attention)[:, None])


def _blocks(segment_ids: Tensor, prefix: Tensor | None, attention: Attention) -> BlockMask:
    @no_type_check
    def rule(row, head, query, key):
        def place(column):
            mine = None if prefix is None else prefix[row, column]
            return _Place(column, segment_ids[row, column], mine)

        return _sees(place(query), place(key), attention)

    num_rows, length = segment_ids.shape
    return create_block_mask(rule, num_rows, None, length, length, device=segment_ids.device)


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
            scaled_dot_product_attention(query, key, value, is_causal=True)
            for query, key, value, _ in zip(*parts, lengths, strict=False)
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
