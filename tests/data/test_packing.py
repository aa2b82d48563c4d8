"""Rows: every planned token once, what each position is trained on, and how full rows are."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import GAP, make_source, make_sources, mixture

from midstream.batch import IGNORE, PADDING, Row
from midstream.config import Epochs, Mixture, Rows
from midstream.data import packing
from midstream.data.packing import RowPlan, build_row, plan_rows, shares_report
from midstream.data.sources import Source

Layout = Literal["joined", "filled", "padded"]
ALL = ("web", "notes", "pics", "talks")


def rows_of(plan: RowPlan, sources: Mapping[str, Source], patches: int) -> list[Row]:
    return [build_row(plan, sources, k, patches) for k in range(len(plan))]


def where(sources: Mapping[str, Source], token: int) -> tuple[str, int, int]:
    """Source, example and place in the example of a token; `made` gives each an id of its own."""
    for name, source in sources.items():
        low = int(source.tokens[0])
        if low <= token < low + GAP:
            example = int(np.searchsorted(source.offsets, token - low, side="right")) - 1
            return name, example, token - low - int(source.offsets[example])
    raise AssertionError(f"token {token} is of no source")


def next_target(sources: Mapping[str, Source], token: int) -> int:
    """What a document itself says is behind a token: the next one if it is a target."""
    name, example, place = where(sources, token)
    source = sources[name]
    at = int(source.offsets[example]) + place + 1
    if at >= source.offsets[example + 1]:
        return IGNORE
    supervised = source.supervised is None or source.supervised[at]
    return int(source.tokens[at]) if supervised else IGNORE


def planned_tokens(plan: RowPlan, sources: Mapping[str, Source], patches: int) -> list[list[int]]:
    """The tokens of every planned piece, in the plan's order, read from the sources."""
    found = []
    for number, piece in zip(plan.order.source, plan.order.piece, strict=True):
        supply, source = plan.supplies[number], sources[plan.order.names[number]]
        example, start = int(supply.examples[piece]), int(supply.starts[piece])
        low = int(source.offsets[example]) + start
        size = int(supply.lengths[piece]) - patches * int(source.has_images[example])
        found.append(source.tokens[low : low + size].tolist())
    return found


def held_tokens(row: Row, patches: int) -> list[int]:
    holds = row.segment_ids != PADDING
    for start in row.image_starts:
        holds[start : start + patches] = False
    return row.input_ids[holds].tolist()


def check_row(row: Row, plan: RowPlan, sources: Mapping[str, Source], patches: int) -> None:
    """Everything that holds for one filled or padded row."""
    length = plan.rows.row_length
    used = int((row.segment_ids != PADDING).sum())
    assert (row.segment_ids[:used] != PADDING).all()
    counts = {"text": 0, "caption": 0, "instruct": 0, "image": 0}
    starts, images = [], []
    edges = np.flatnonzero(np.diff(row.segment_ids[:used], prepend=-1))
    assert row.segment_ids[edges].tolist() == list(range(len(edges)))
    for start, end in zip(edges, [*edges[1:], used], strict=True):
        assert row.position_ids[start:end].tolist() == list(range(end - start))
        has_image = row.input_ids[start] == 0
        text = int(start) + patches * int(has_image)
        ids = row.input_ids[text:end].tolist()
        name, example, place = where(sources, ids[0])
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert [next_target(sources, t) for t in ids] == row.targets[text:end].tolist()
        assert has_image == (bool(sources[name].has_images[example]) and patches > 0)
        if has_image:
            # An image is whole and at the head of its segment, its example begins behind it.
            assert place == 0
            assert not row.input_ids[start:text].any()
            assert (row.targets[start:text] == IGNORE).all()
            starts.append(int(start))
            images.append([plan.order.names.index(name), example])
        counts[sources[name].kind] += len(ids)
        counts["image"] += text - int(start)
    assert row.image_starts.tolist() == starts
    assert row.images.tolist() == images
    assert not row.input_ids[used:].any()
    assert (row.targets[used:] == IGNORE).all()
    found = {name: getattr(row.counts, name) for name in counts}
    assert found == counts
    assert row.counts.pad == length - used
    assert row.counts.target == (row.targets != IGNORE).sum()


@given(
    seed=st.integers(0, 999),
    layout=st.sampled_from(["filled", "padded"]),
    row_length=st.integers(10, 48),
    patches=st.integers(0, 8),
    epochs=st.integers(1, 2),
    block_rows=st.sampled_from([3, 256]),
)
@settings(max_examples=12, deadline=None)
def test_filled_and_padded_rows_hold_every_planned_token_once_with_its_next_as_target(
    seed: int, layout: Layout, row_length: int, patches: int, epochs: int, block_rows: int
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_ROWS", block_rows)
        sources = make_sources(Path(folder), seed, longest=row_length - patches)
        rows = Rows(row_length=row_length, batch_rows=4, layout=layout)
        plan = plan_rows(sources, patches, Epochs(sources=ALL, epochs=epochs), rows, seed)
        found = rows_of(plan, sources, patches)
        for row in found:
            check_row(row, plan, sources, patches)
            assert layout == "filled" or len(row.image_starts) <= 1
            if layout == "padded" and len(row.image_starts):
                assert row.segment_ids.max() == 0
        held = sorted(token for row in found for token in held_tokens(row, patches))
        every = [token for source in sources.values() for token in source.tokens.tolist()]
        assert held == sorted(every * epochs)
        wanted = [t for piece in planned_tokens(plan, sources, patches) for t in piece]
        assert held == sorted(wanted)
        assert plan.seen_tokens == sum(row.counts.seen for row in found)
        assert plan.num_steps == -(-len(found) // 4)


def check_stream(sources: Mapping[str, Source], budget: Mixture | Epochs, length: int) -> None:
    """Joined rows against the plain form: one stream of documents, cut at the row length.

    A document's end predicts the beginning of the next one where that is in the row.
    """
    rows = Rows(row_length=length, batch_rows=4, layout="joined")
    plan = plan_rows(sources, 0, budget, rows, 0)
    stream = [t for piece in planned_tokens(plan, sources, 0) for t in piece]
    found = rows_of(plan, sources, 0)
    assert len(found) == -(-len(stream) // length)
    for row in found:
        ids, stream = stream[:length], stream[length:]
        size = len(ids)
        targets = [next_target(sources, token) for token in ids]
        for at in range(size - 1):
            targets[at] = ids[at + 1] if targets[at] == IGNORE else targets[at]
        assert row.input_ids.tolist() == ids + [0] * (length - size)
        assert row.targets.tolist() == targets + [IGNORE] * (length - size)
        assert row.position_ids[:size].tolist() == list(range(size))
        assert row.segment_ids.tolist() == [0] * size + [PADDING] * (length - size)
        assert (row.counts.text, row.counts.pad) == (size, length - size)
        assert row.counts.target == sum(target != IGNORE for target in targets)
    assert not stream


@given(
    seed=st.integers(0, 999),
    row_length=st.integers(4, 60),
    share=st.floats(0, 1),
    part=st.floats(0.1, 1),
)
@settings(max_examples=12, deadline=None)
def test_joined_rows_are_one_stream_of_documents_cut_at_the_row_length(
    seed: int, row_length: int, share: float, part: float
) -> None:
    with TemporaryDirectory() as folder:
        sources = make_sources(Path(folder), seed, longest=row_length, images=False)
        have = min(len(source.tokens) for source in sources.values())
        budget = mixture(max(row_length, int(have * part)), {"web": share, "notes": 1 - share})
        check_stream(sources, budget, row_length)


@pytest.mark.parametrize("last", range(1, 18))
def test_joined_rows_are_whole_wherever_the_last_document_ends(tmp_path: Path, last: int) -> None:
    sources = {"web": make_source(tmp_path, "web", "text", [5, 8, 3, last])}
    check_stream(sources, Epochs(sources=("web",), epochs=1), 8)


@pytest.mark.parametrize(
    ("row_length", "patches", "captions", "texts", "share"),
    [
        (2048, 729, (10, 60), 300, 0.5),
        (2048, 256, (10, 60), 60, 0.9),
        (1024, 256, (20, 120), 200, 0.3),
        (512, 196, (8, 40), 60, 0.8),
    ],
)
def test_filled_rows_with_images_have_at_most_two_percent_padding(
    tmp_path: Path,
    row_length: int,
    patches: int,
    captions: tuple[int, int],
    texts: int,
    share: float,
) -> None:
    random = np.random.default_rng(0)
    num_tokens, per_image = 400 * row_length, patches + sum(captions) // 2
    num_images = int(1.1 * share * num_tokens / per_image)
    web = np.maximum(3, random.lognormal(np.log(texts) - 0.32, 0.8, 2 * num_tokens // texts))
    sources = {
        "web": make_source(tmp_path, "web", "text", web.astype(int).tolist()),
        "pics": make_source(
            tmp_path,
            "pics",
            "caption",
            random.integers(*captions, num_images).tolist(),
            number=1,
            pictures=[0] * num_images,
        ),
    }
    budget = mixture(num_tokens, {"web": 1 - share, "pics": share})
    plan = plan_rows(sources, patches, budget, Rows(row_length=row_length, batch_rows=8), 0)
    shown = [row for row in rows_of(plan, sources, patches) if len(row.image_starts)]
    assert len(shown) > 50
    assert sum(row.counts.pad for row in shown) <= 0.02 * row_length * len(shown)


@pytest.mark.parametrize("layout", ["filled", "padded", "joined"])
def test_row_k_depends_on_the_plan_and_k_alone(tmp_path: Path, layout: Layout) -> None:
    sources = make_sources(tmp_path, 3, longest=30, images=layout != "joined")
    budget = Epochs(sources=tuple(sources), epochs=1)
    rows = Rows(row_length=34, batch_rows=4, layout=layout)
    plan = plan_rows(sources, 4, budget, rows, 3)
    once = rows_of(plan, sources, 4)
    fresh = {name: Source(name, s.folder, s.world) for name, s in reversed(sources.items())}
    again = plan_rows(fresh, 4, budget, rows, 3)
    travelled = pickle.loads(pickle.dumps(plan))
    for k in np.random.default_rng(0).permutation(len(plan)):
        for other in (again, travelled):
            row = build_row(other, fresh, int(k), 4)
            for name in ("input_ids", "targets", "position_ids", "segment_ids", "images"):
                assert np.array_equal(getattr(row, name), getattr(once[k], name))
            assert row.counts == once[k].counts


def test_another_seed_gives_other_rows_of_the_same_tokens(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 3, longest=30)
    budget, rows = Epochs(sources=ALL, epochs=1), Rows(row_length=34, batch_rows=4)
    one, other = (rows_of(plan_rows(sources, 4, budget, rows, s), sources, 4) for s in (0, 1))
    held = [[tuple(held_tokens(row, 4)) for row in found] for found in (one, other)]
    same = sum(a == b for a, b in zip(*held, strict=False))
    assert same < 0.1 * len(one)
    assert sorted(t for row in held[0] for t in row) == sorted(t for row in held[1] for t in row)


def test_rows_stay_near_their_place_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK_ROWS", 8)
    sources = make_sources(tmp_path, 5, longest=30)
    rows = Rows(row_length=34, batch_rows=4)
    plan = plan_rows(sources, 4, Epochs(sources=ALL, epochs=2), rows, 0)
    ends = np.cumsum([len(p) for p in planned_tokens(plan, sources, 0)])
    middle = [ends[plan.item[a:b]].mean() for a, b in zip(plan.first, plan.first[1:], strict=False)]
    # Between rows more than two blocks apart the plan's order is kept.
    blocks = [np.mean(middle[at : at + 8]) for at in range(0, len(middle), 8)]
    assert len(blocks) > 8
    assert all(a < b for a, b in zip(blocks, blocks[2:], strict=False))


def test_every_part_of_a_block_holds_long_and_short_pieces_alike(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 700).tolist()
    source = make_source(tmp_path, "web", "text", lengths)
    rows = Rows(row_length=60, batch_rows=4)
    plan = plan_rows({"web": source}, 0, Epochs(sources=("web",), epochs=1), rows, 0)
    assert 200 < len(plan) < packing.BLOCK_ROWS
    longest = [plan.length[a:b].max() for a, b in zip(plan.first, plan.first[1:], strict=False)]
    assert abs(np.corrcoef(longest, np.arange(len(plan)))[0, 1]) < 0.2


@pytest.mark.parametrize("layout", ["filled", "padded"])
@pytest.mark.parametrize("kind", ["caption", "instruct"])
def test_a_record_longer_than_a_row_is_named_with_both_numbers(
    tmp_path: Path, layout: Layout, kind: Literal["caption", "instruct"]
) -> None:
    pictures = [0, 1, 2, 3]
    source = make_source(tmp_path, "pics", kind, [20, 28, 29, 40], pictures=pictures)
    budget = Epochs(sources=("pics",), epochs=1)
    rows = Rows(row_length=32, batch_rows=4, layout=layout)
    # The 40 tokens with 4 patches are the longest, the 29 the first that are too many.
    number, length = (2, 33) if kind == "caption" else (3, 44)
    expected = f"source 'pics', pics-000.tar, sample {number}: {length} positions .* row of 32"
    with pytest.raises(ValueError, match=expected):
        plan_rows({"pics": source}, 4, budget, rows, 0)
    wide = Rows(row_length=44, batch_rows=4, layout=layout)
    assert len(plan_rows({"pics": source}, 4, budget, wide, 0)) >= 3


def test_a_conversation_without_a_picture_is_not_cut_either(tmp_path: Path) -> None:
    source = make_source(tmp_path, "talks", "instruct", [20, 33], pictures=[None, None])
    rows, budget = Rows(row_length=32, batch_rows=4), Epochs(sources=("talks",), epochs=1)
    with pytest.raises(ValueError, match=r"talks-000\.tar, sample 1: 33 positions"):
        plan_rows({"talks": source}, 4, budget, rows, 0)


def test_joined_rows_with_images_are_refused(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 0, longest=28)
    rows = Rows(row_length=32, batch_rows=4, layout="joined")
    with pytest.raises(ValueError, match="joined layout is for text only"):
        plan_rows(sources, 4, Epochs(sources=("web", "pics"), epochs=1), rows, 0)


def test_an_unknown_source_is_refused_with_all_that_there_are(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 0, longest=28)
    budget = mixture(100, {"web": 0.5, "wbe": 0.5})
    with pytest.raises(ValueError, match=r"'wbe' in the data; it holds \['notes', 'pics', 'talks"):
        plan_rows(sources, 4, budget, Rows(row_length=32, batch_rows=4), 0)


@given(seed=st.integers(0, 99), share=st.floats(0, 1e-3), part=st.floats(0.2, 0.9))
@settings(max_examples=10, deadline=None)
def test_the_report_of_shares_holds_every_source_also_one_that_got_no_example(
    seed: int, share: float, part: float
) -> None:
    with TemporaryDirectory() as folder:
        sources = make_sources(Path(folder), seed, longest=28)
        total = int(len(sources["web"].tokens) * part)
        budget = mixture(total, {"web": 1 - share, "pics": share})
        plan = plan_rows(sources, 4, budget, Rows(row_length=32, batch_rows=4), seed)
        report = shares_report(plan, sources)
        assert set(report) == {"web", "pics"}
        assert report["pics"]["kind"] == "caption"
        found = rows_of(plan, sources, 4)
        seen = {
            "web": sum(row.counts.text for row in found),
            "pics": sum(row.counts.caption + row.counts.image for row in found),
        }
        for name, entry in report.items():
            wanted, largest = entry["planned_tokens"], entry["largest_example_tokens"]
            assert isinstance(wanted, int)
            assert isinstance(largest, int)
            assert entry["realised_tokens"] == seen[name]
            assert 2 * abs(seen[name] - wanted) <= largest
            assert (entry["examples"] == 0) == (seen[name] == 0)
        assert sum(e["planned_tokens"] for e in report.values()) == total  # type: ignore[misc]
