import itertools
import math
import pickle
import shutil
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from midstream.config import Attention
from midstream.config.model import MASK_BLOCK
from midstream.core.batch import PADDING
from midstream.cost.taken import block_mask_bytes
from midstream.model import attention
from midstream.model.attention import (
    NO_PICTURE,
    Mask,
    MaskKind,
    Runs,
    attend,
    make_mask,
    map_mask,
    move_mask,
)

KINDS: tuple[Attention, ...] = get_args(Attention)
OF_PICTURES: tuple[Attention, ...] = ("pictures", "latest")
every_kind = pytest.mark.parametrize("kind", KINDS)
without_flex_warning = pytest.mark.filterwarnings("ignore:flex_attention called without")
with_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention has kernels and a backward on a GPU only"
)


def random_rows(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Segment ids and prefixes: segments of random lengths, some with a prefix (an image and a
    question), one position of prefix for the others; padding behind some rows and amid the first,
    so that no kind of attention is plain."""
    source = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=source))

    segment_ids = torch.full((rows, length), PADDING)
    prefix = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        end, segment = 0, 0
        limit = length if row % 2 else number(length // 2, length)
        while end < limit:
            size = min(number(1, 2 + length // 2), limit - end)
            segment_ids[row, end : end + size] = segment
            prefix[row, end : end + (number(1, size + 1) if number(0, 3) else 1)] = True
            end, segment = end + size, segment + 1
    segment_ids[0, length // 3], prefix[0, length // 3] = PADDING, False
    return segment_ids, prefix


def shown(segment_ids: Tensor) -> Tensor:
    """Pictures of two or three positions in segments that have room, side by side or apart."""
    source, number = torch.Generator().manual_seed(0), 0
    found = torch.full_like(segment_ids, NO_PICTURE)
    for row, ids in enumerate(segment_ids.tolist()):
        at = 0
        while at < len(ids):
            size = int(torch.randint(2, 4, (), generator=source))
            fits = ids[at] != PADDING and ids[at : at + size] == [ids[at]] * size
            if fits and at + size <= len(ids) and torch.rand((), generator=source) < 0.4:
                found[row, at : at + size], number = number, number + 1
                at += size - 1
            at += 1
    return found


def mask_of(
    kind: Attention,
    segment_ids: Tensor,
    prefix: Tensor,
    *,
    dense: bool,
    pictures: Tensor | None = None,
) -> Mask:
    made: MaskKind = "dense" if dense else "blocks"
    if kind in OF_PICTURES and pictures is None:
        pictures = shown(segment_ids.cpu()).to(segment_ids.device)
    first = prefix if kind == "prefix" else None
    own = pictures if kind in OF_PICTURES else None
    return make_mask(segment_ids, first, kind, kind=made, pictures=own)


def sees(
    kind: str, segments: list[int], prefix: list[bool], pictures: list[int], query: int, key: int
) -> bool:
    if query == key:
        return True
    if PADDING in (segments[query], segments[key]):
        return False
    if kind == "causal":
        return key < query
    if segments[query] != segments[key]:
        return False
    if kind == "pictures" and pictures[query] == pictures[key] != NO_PICTURE:
        return True
    if kind == "latest" and pictures[key] != NO_PICTURE:
        between = [one for one in pictures[key : query + 1] if one != NO_PICTURE]
        return key < query and set(between) == {pictures[key]}
    return key < query or (kind == "prefix" and prefix[query] and prefix[key])


def plain_attention(
    kind: str, segment_ids: Tensor, prefix: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Row by row, head by head, position by position."""
    rows, heads, length, channels = query.shape
    found = []
    for row in range(rows):
        segments, first = segment_ids[row].tolist(), prefix[row].tolist()
        pictures = shown(segment_ids)[row].tolist()
        for head in range(heads):
            for t in range(length):
                seen = [s for s in range(length) if sees(kind, segments, first, pictures, t, s)]
                scores = key[row, head, seen] @ query[row, head, t] / math.sqrt(channels)
                weights = scores.exp() / scores.exp().sum()
                found.append(weights @ value[row, head, seen])
    return torch.stack(found).view(rows, heads, length, channels)


def random_heads(rows: int, length: int, channels: int, seed: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    shape = (rows, 2, length, channels)
    return [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(4)]


def with_gradients(result: Tensor, parts: list[Tensor], upstream: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(result, parts, upstream)
    return [result.detach(), *gradients]


@every_kind
@pytest.mark.parametrize("seed", range(2))
def test_dense_attention_and_its_gradients_equal_a_plain_reference(
    kind: Attention, seed: int
) -> None:
    segment_ids, prefix = random_rows(3, 21, seed)
    *parts, upstream = random_heads(3, 21, 6, seed)
    parts = [part.requires_grad_() for part in parts]
    mask = mask_of(kind, segment_ids, prefix, dense=True)
    assert isinstance(mask, Tensor)
    found = with_gradients(attend(*parts, mask), parts, upstream)
    plain = plain_attention(kind, segment_ids, prefix, *parts)
    for one, other in zip(found, with_gradients(plain, parts, upstream), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def rows_of(*lengths: list[int], padding: list[int]) -> Tensor:
    """Segment ids of rows made of segments of these lengths, padding behind them."""
    return torch.stack(
        [
            torch.cat(
                [torch.full((size,), number) for number, size in enumerate(row)]
                + [torch.full((behind,), PADDING)]
            )
            for row, behind in zip(lengths, padding, strict=True)
        ]
    )


@pytest.mark.parametrize("kind", ["segments", *OF_PICTURES])
def test_segments_cut_apart_give_the_values_and_gradients_of_the_dense_mask(
    kind: Attention,
) -> None:
    segment_ids, pictures = rows_of([200, 1, 59, 7], [256], [3, 264], padding=[3, 14, 3]), None
    if kind in OF_PICTURES:
        pictures = shown(segment_ids)
        pictures[1], pictures[1, 2:6] = NO_PICTURE, pictures.max() + 1
    *parts, upstream = random_heads(3, 270, 6, 0)
    parts = [part.requires_grad_() for part in parts]
    cut = make_mask(segment_ids, None, kind, kind="cut", pictures=pictures)
    assert isinstance(cut, Runs)
    assert (cut.lengths, cut.padding) == (((200, 1, 59, 7), (256,), (3, 264)), (3, 14, 3))
    # Masks of their own where pictures need them.
    assert (cut.masks[0][0] is None) == (kind == "segments")
    assert (cut.masks[1][0] is None) == (kind != "pictures")
    found = with_gradients(attend(*parts, cut), parts, upstream)
    dense = make_mask(segment_ids, None, kind, kind="dense", pictures=pictures)
    plain = with_gradients(attend(*parts, dense), parts, upstream)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "segment_ids",
    [
        rows_of([100, 100], padding=[0]),  # short
        torch.tensor([[0] * 100 + [PADDING] * 10 + [1] * 200]),
        torch.tensor([[PADDING] * 10 + [0] * 200 + [1] * 100]),
        torch.tensor([[0] * 100 + [1] * 100 + [0] * 100]),
    ],
    ids=["short", "hole", "before", "again"],
)
def test_rows_that_are_short_or_no_plain_runs_keep_a_dense_mask(segment_ids: Tensor) -> None:
    assert isinstance(make_mask(segment_ids, None, "segments", kind="cut"), Tensor)


@pytest.mark.parametrize("kind", ["causal", "prefix"])
def test_only_segments_are_cut_apart(kind: Attention) -> None:
    segment_ids = torch.cat((torch.full((1, 9), PADDING), rows_of([200, 100], padding=[0])), dim=1)
    prefix = (segment_ids == 0) if kind == "prefix" else None
    assert isinstance(make_mask(segment_ids, prefix, kind, kind="cut"), Tensor)


@every_kind
@without_flex_warning
# More positions than one block of FlexAttention, and heads narrower than its kernels take.
@pytest.mark.parametrize(("length", "channels"), [(21, 6), (150, 24)])
def test_flex_attention_equals_the_dense_one(kind: Attention, length: int, channels: int) -> None:
    segment_ids, prefix = random_rows(3, length, length)
    query, key, value, _ = (part.float() for part in random_heads(3, length, channels, length))
    blocks = mask_of(kind, segment_ids, prefix, dense=False)
    dense = mask_of(kind, segment_ids, prefix, dense=True)
    assert isinstance(blocks, BlockMask)
    torch.testing.assert_close(
        attend(query, key, value, blocks), attend(query, key, value, dense), atol=2e-6, rtol=2e-6
    )


def far_pictures(segment_ids: Tensor) -> Tensor:
    """Pictures of up to 300 positions, that end where their segments do or before."""
    source, number = torch.Generator().manual_seed(0), 0
    found = torch.full_like(segment_ids, NO_PICTURE)
    for row, ids in enumerate(segment_ids.tolist()):
        at = 0
        while at < len(ids):
            size = int(torch.randint(2, 300, (), generator=source))
            while ids[at : at + size] != [ids[at]] * size:
                size -= 1
            if ids[at] != PADDING and torch.rand((), generator=source) < 0.7:
                found[row, at : at + size], number = number, number + 1
            at += size
    return found


def listed(count: Tensor, blocks: Tensor) -> Tensor:
    """True at the blocks of [rows, 1, queries, keys] whose numbers come first."""
    first = torch.arange(blocks.shape[-1]) < count[..., None]
    return torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, blocks.long(), first)


@every_kind
@pytest.mark.parametrize("length", [21, 128, 700])
def test_blocks_hold_all_that_is_seen_and_full_ones_are_seen_whole(
    kind: Attention, length: int
) -> None:
    for seed in range(3):
        segment_ids, prefix = random_rows(3, length, seed)
        if seed == 1:
            segment_ids[1], prefix[1], segment_ids[2, 3:] = 0, True, PADDING
        if seed == 2:  # in no order
            segment_ids = torch.where(segment_ids == 1, 9, segment_ids)
        pictures = (far_pictures if seed else shown)(segment_ids)
        dense, mask = (
            mask_of(kind, segment_ids, prefix, dense=dense, pictures=pictures)
            for dense in (True, False)
        )
        assert isinstance(dense, Tensor)
        assert isinstance(mask, BlockMask)
        number, fill = -(-length // MASK_BLOCK), -length % MASK_BLOCK
        parts = torch.nn.functional.pad(dense[:, 0], (0, fill, 0, fill))
        parts = parts.view(3, 1, number, MASK_BLOCK, number, MASK_BLOCK).transpose(3, 4).flatten(4)
        seen, whole = parts.any(dim=-1), parts.all(dim=-1)
        some = listed(mask.kv_num_blocks, mask.kv_indices)
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert not (some & full).any()
        assert not (seen & ~(some | full)).any()
        assert not (full & ~whole).any()
        # The same blocks of queries by those of keys, for the backward pass.
        for blocks, turned in (
            (some, listed(mask.q_num_blocks, mask.q_indices)),
            (full, listed(mask.full_q_num_blocks, mask.full_q_indices)),
        ):
            assert torch.equal(blocks.transpose(2, 3), turned)
        # No more is computed than needs be, but for a picture beside a text in one block.
        if seed < 2 and kind != "latest":
            assert torch.equal(full, whole)
        if seed < 2:
            assert torch.equal(some | full, seen)


@every_kind
def test_a_mask_goes_to_another_process_and_device_with_all_that_its_rule_reads(
    kind: Attention,
) -> None:
    segment_ids, prefix = random_rows(3, 300, 0)
    mask = mask_of(kind, segment_ids, prefix, dense=False)
    assert isinstance(mask, BlockMask)
    sent = pickle.loads(pickle.dumps(mask))
    columns = [torch.arange(300)[:, None], torch.arange(300)[None]]
    dense = mask_of(kind, segment_ids, prefix, dense=True)
    assert isinstance(dense, Tensor)
    for row in range(3):
        assert torch.equal(sent.mask_mod(row, 0, *columns), dense[row, 0])
    moved = move_mask(mask, torch.device("meta"))
    assert isinstance(moved, BlockMask)
    assert moved.shape == mask.shape
    assert moved.kv_indices.device.type == moved.full_q_num_blocks.device.type == "meta"
    assert moved.mask_mod(0, 0, *(one.to("meta") for one in columns)).device.type == "meta"
    # What a plan reckons with is what it takes.
    assert sum(one.nbytes for one in map_tensors(mask)) == 3 * block_mask_bytes(kind, 300)


def map_tensors(mask: Mask) -> list[Tensor]:
    """Those that `map_mask` changes."""
    found: list[Tensor] = []

    def note(one: Tensor) -> Tensor:
        found.append(one)
        return one

    map_mask(mask, note)
    return found


def test_masks_of_every_kind_are_changed_alike() -> None:
    segment_ids = rows_of([200, 1, 59, 7], [256], [3, 264], padding=[3, 14, 3])
    pictures = shown(segment_ids)
    dense = make_mask(segment_ids, None, "segments", kind="dense")
    runs = make_mask(segment_ids, None, "latest", kind="cut", pictures=pictures)
    assert isinstance(runs, Runs)
    assert map_mask(None, torch.clone) is None
    assert [one is dense for one in map_tensors(dense)] == [True]
    masks = [one for row in runs.masks for one in row if one is not None]
    assert [id(one) for one in map_tensors(runs)] == [id(one) for one in masks]
    assert move_mask(runs, torch.device("cpu")) == runs


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """Torch keeps a limited number of kernels a process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler of C++")
# The rule of "latest" has that of segments in it.
@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(one, marks=pytest.mark.faults) for one in ("segments", "prefix")), "latest"],
)
@torch.no_grad()
def test_compiled_attention_equals_the_dense_one_and_takes_new_masks_as_they_come(
    kind: Attention, no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "flex_attention", attention._fused())
    for seed in range(4):
        segment_ids, prefix = random_rows(3, 150, seed)
        query, key, value, _ = (part.float() for part in random_heads(3, 150, 8, seed))
        blocks = mask_of(kind, segment_ids, prefix, dense=False)
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            found = attend(query, key, value, blocks)
        dense = mask_of(kind, segment_ids, prefix, dense=True)
        torch.testing.assert_close(found, attend(query, key, value, dense), atol=2e-6, rtol=2e-6)


@pytest.mark.gpu
@with_gpu
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "channels"), [(100, 8), (256, 64), (300, 72), (1030, 128)])
def test_flex_attention_on_a_gpu_and_its_gradients_equal_the_dense_one(
    kind: Attention, dtype: torch.dtype, length: int, channels: int, no_kernels: None
) -> None:
    device = torch.device("cuda")
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for seed in range(2):
        segment_ids, prefix = random_rows(3, length, seed)
        *parts, upstream = (
            part.to(dtype).to(device) for part in random_heads(3, length, channels, seed)
        )
        results = []
        for dense, exact in ((False, False), (True, True)):
            mine = [(part.double() if exact else part).requires_grad_() for part in parts]
            above = upstream.double() if exact else upstream
            mask = move_mask(mask_of(kind, segment_ids, prefix, dense=dense), device)
            results.append(with_gradients(attend(*mine, mask), mine, above))
        for fast, plain in zip(*results, strict=True):
            assert (fast.double() - plain).abs().max() < tolerance * plain.abs().max()


@pytest.mark.gpu
@with_gpu
def test_a_new_mask_of_the_same_shape_compiles_nothing_anew(no_kernels: None) -> None:
    *parts, upstream = (part.float().cuda() for part in random_heads(3, 256, 64, 0))
    parts = [part.requires_grad_() for part in parts]
    for seed in range(12):
        mask = mask_of("prefix", *random_rows(3, 256, seed), dense=False)
        mask = move_mask(mask, torch.device("cuda"))
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            with_gradients(attend(*parts, mask), parts, upstream)


PLAIN_ROWS = [
    # segments of the second row, prefix of the second row; plain under causal, segments, prefix
    ([0, 0, 0, 0], [1, 0, 0, 0], (True, True, True)),
    ([0, 0, 0, 0], [1, 1, 0, 0], (True, True, False)),
    ([0, 0, 0, -1], [1, 0, 0, 0], (True, True, True)),
    ([0, 0, 0, -1], [1, 1, 1, 0], (True, True, False)),
    ([-1, -1, -1, -1], [0, 0, 0, 0], (True, True, True)),
    ([0, 0, 1, 1], [1, 0, 1, 0], (True, False, False)),
    ([0, 1, 2, -1], [1, 1, 1, 0], (True, False, False)),
    ([-1, 0, 0, 0], [0, 1, 0, 0], (False, False, False)),
    ([0, -1, 0, 0], [1, 0, 0, 0], (False, False, False)),
]


@pytest.mark.parametrize(("segments", "prefix", "plain"), PLAIN_ROWS)
def test_no_mask_is_made_where_plain_causal_attention_is_the_same(
    segments: list[int], prefix: list[int], plain: tuple[bool, ...]
) -> None:
    segment_ids = torch.tensor([[0] * 4, segments])
    prefixes = torch.tensor([[1, 0, 0, 0], prefix]).bool()
    kinds: tuple[Attention, ...] = ("causal", "segments", "prefix")
    for dense in (True, False):
        made = [mask_of(kind, segment_ids, prefixes, dense=dense) is None for kind in kinds]
        assert made == list(plain)


@pytest.mark.parametrize(
    ("pictures", "plain"),
    [
        # pictures of one row that is one segment; plain under pictures, latest
        ([-1, -1, -1, -1], (True, True)),
        ([-1, 0, -1, -1], (True, True)),
        ([-1, 0, 0, -1], (False, True)),
        ([0, 1, -1, -1], (True, False)),
        ([0, 0, -1, 1], (False, False)),
    ],
)
def test_rules_of_pictures_are_those_of_segments_where_they_come_to_the_same(
    pictures: list[int], plain: tuple[bool, bool]
) -> None:
    nothing = torch.zeros(1, 4)
    for kind, same in zip(OF_PICTURES, plain, strict=True):
        made = mask_of(
            kind, nothing.long(), nothing.bool(), dense=True, pictures=torch.tensor([pictures])
        )
        assert (made is None) == same


@every_kind
def test_no_mask_and_the_rule_agree_at_every_held_position(kind: Attention) -> None:
    # Every row of three positions whose segments go up, with every prefix.
    for segments in itertools.product((PADDING, 0, 1), repeat=3):
        held = [segment for segment in segments if segment != PADDING]
        if held != sorted(held):
            continue
        for flags in itertools.product((False, True), repeat=3):
            first = [flag and mine != PADDING for flag, mine in zip(flags, segments, strict=True)]
            ids = torch.tensor([segments])
            made, pictures = mask_of(kind, ids, torch.tensor([first]), dense=True), shown(ids)
            allowed = [
                [sees(kind, list(segments), first, pictures[0].tolist(), t, s) for s in range(3)]
                for t in range(3)
            ]
            if made is not None:
                assert isinstance(made, Tensor)
                assert made[0, 0].tolist() == allowed
                continue
            for t in range(3):
                assert segments[t] == PADDING or allowed[t] == [s <= t for s in range(3)]


# -------------------------------------------------------------------------------- in a decoder
