"""Rows built from sources: each position, target, segment and picture against the plain form."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_source, make_sources, mixture

from midstream.config import Amount, Amounts, Budget, Epochs, Mixture, Rows, Share
from midstream.core.batch import IGNORE, PADDING, Row
from midstream.core.tokens import TokenCount
from midstream.data.rows import build_row, plan_rows, shares_report
from midstream.data.sources import Source
from midstream.order import plan as order_plan
from midstream.order.plan import RowPlan

PATCHES = 4
Layout = Literal["joined", "filled", "padded"]
ALL = ("web", "notes", "pics", "talks")
FIELDS = ("input_ids", "targets", "position_ids", "segment_ids", "image_starts", "images")


@dataclass(frozen=True)
class Example:
    """Its tokens, what each predicts by itself, and whether a picture stands before them."""

    tokens: list[int]
    targets: list[int]
    image: bool


def examples_of(source: Source) -> list[Example]:
    """All examples, read from the files of the shards and nothing else."""
    found = []
    for folder in sorted((source.folder / "shards").iterdir()):
        tokens = np.fromfile(folder / "tokens.bin", dtype="<u4").astype(int).tolist()
        offsets = np.load(folder / "offsets.npy").tolist()
        text = source.kind == "text"
        marks = [1] * len(tokens) if text else (folder / "supervised.bin").read_bytes()
        for number, (low, high) in enumerate(pairwise(offsets)):
            following = [tokens[at] if marks[at] else IGNORE for at in range(low + 1, high)]
            image = not text and np.load(folder / "images.npy")[number, 0] >= 0
            found.append(Example(tokens[low:high], [*following, IGNORE], bool(image)))
    return found


Examples = Mapping[str, list[Example]]


def plain_row(
    plan: RowPlan, sources: Mapping[str, Source], examples: Examples, index: int, patches: int
) -> Row:
    """A row put together token by token."""
    joined = plan.layout.sees_all(index)
    ids, targets, positions, segments = (list[int]() for _ in range(4))
    starts, images, counts = list[int](), list[list[int]](), dict[str, TokenCount]()
    for segment, placed in enumerate(plan.layout.row(index)):
        source = sources[plan.names[placed.source]]
        example = examples[plan.names[placed.source]][placed.example]
        head = patches if example.image else 0
        # What begins a text, before the picture.
        first = int(head > 0 and source.begin_of_text is not None)
        assert placed.column == len(ids)
        if head:
            starts.append(len(ids) + first)
            images.append([placed.source, placed.example, 0])
        mine = slice(placed.start, placed.start + placed.length)
        inside = (example.tokens[:first] + [0] * head + example.tokens[first:])[mine]
        predicted = ([IGNORE] * (first + head) + example.targets[first:])[mine]
        if joined and targets and targets[-1] == IGNORE:
            targets[-1] = inside[0]
        ids, targets = ids + inside, targets + predicted
        positions += range(len(positions), len(ids)) if joined else range(placed.length)
        segments += [0 if joined else segment] * placed.length
        kinds = {"image": head, source.kind: placed.length - head}
        counts[source.name] = counts.get(source.name, TokenCount()) + TokenCount(**kinds)
    for placed in plan.layout.row(index):
        here = targets[placed.column : placed.column + placed.length]
        name = plan.names[placed.source]
        counts[name] += TokenCount(target=sum(target != IGNORE for target in here))
    rest = plan.rows.row_length - len(ids)

    def filled(column: list[int], filler: int) -> np.ndarray:
        return np.array(column + [filler] * rest, dtype=np.int64)

    return Row(
        input_ids=filled(ids, 0),
        targets=filled(targets, IGNORE),
        position_ids=filled(positions, 0),
        segment_ids=filled(segments, PADDING),
        image_starts=np.array(starts, dtype=np.int64),
        images=np.array(images, dtype=np.int64).reshape(-1, 3),
        counts=sum(counts.values(), TokenCount(pad=rest)),
        sources=counts,
    )


def check_equal(found: Row, expected: Row) -> None:
    for name in FIELDS:
        column = getattr(found, name)
        assert column.dtype == np.int64
        assert column.shape == getattr(expected, name).shape
        assert column.tolist() == getattr(expected, name).tolist(), name
    assert found.counts == expected.counts
    assert dict(found.sources) == dict(expected.sources)


def rows_of(plan: RowPlan, sources: Mapping[str, Source], patches: int) -> list[Row]:
    return [build_row(plan, sources, index, patches) for index in range(len(plan))]


@given(
    seed=st.integers(0, 999),
    layout=st.sampled_from(["filled", "padded", "joined"]),
    row_length=st.integers(10, 48),
    patches=st.integers(0, 8),
    whole=st.booleans(),
    begins=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_every_position_target_segment_and_picture_is_that_of_the_plain_form(
    seed: int, layout: Layout, row_length: int, patches: int, whole: bool, begins: bool
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_plan, "BLOCK_ROWS", 9)
        names = ALL[:2] if layout == "joined" else ALL
        sources = make_sources(
            Path(folder),
            seed,
            longest=row_length - patches,
            images=layout != "joined",
            begins=begins,
        )
        rows = Rows(row_length=row_length, batch_rows=4, layout=layout)
        budget: Budget = Epochs(sources=names, epochs=2)
        if not whole:
            first = 1 - 0.2 * (len(names) - 1)
            budget = mixture(300, {**dict.fromkeys(names[1:], 0.2), names[0]: first}, 5)
        plan = plan_rows(sources, patches, budget, rows, seed)
        found = rows_of(plan, sources, patches)
        examples = {name: examples_of(source) for name, source in sources.items()}
        for index in range(len(plan)):
            check_equal(found[index], plain_row(plan, sources, examples, index, patches))
        assert sum(row.counts.seen for row in found) == plan.seen_tokens
        for row in found:
            assert row.counts.total == row_length
            used = row.segment_ids != PADDING
            assert used[: used.sum()].all()
        if whole:
            held = np.sort(np.concatenate([row.input_ids for row in found]))
            every = [token for name in names for one in examples[name] for token in one.tokens]
            assert held[held > 0].tolist() == sorted(2 * every)


def test_building_a_row_leaves_those_built_before_alone(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 0, longest=28, images=False)
    for layout in ("joined", "filled"):
        rows = Rows.model_validate({"row_length": 32, "batch_rows": 4, "layout": layout})
        plan = plan_rows(sources, 0, Epochs(sources=("web",), epochs=1), rows, 0)
        found = rows_of(plan, sources, 0)
        kept = [{name: getattr(row, name).tolist() for name in FIELDS} for row in found]
        rows_of(plan, sources, 0)
        assert kept == [{name: getattr(row, name).tolist() for name in FIELDS} for row in found]


def test_counts_bear_the_names_of_the_plan_whatever_the_sources_are_called(tmp_path: Path) -> None:
    sources = {"other": make_source(tmp_path, "web", "text", [5, 8, 30])}
    rows = Rows(row_length=8, batch_rows=4)
    plan = plan_rows(sources, 0, Epochs(sources=("other",), epochs=1), rows, 0)
    assert all(set(row.sources) == {"other"} for row in rows_of(plan, sources, 0))


@pytest.mark.parametrize(
    ("layout", "kind"), [("filled", "caption"), ("padded", "caption"), ("filled", "instruct")]
)
def test_a_record_longer_than_a_row_is_named_with_both_numbers_and_the_remedies(
    tmp_path: Path, layout: Layout, kind: Literal["caption", "instruct"]
) -> None:
    made = [[2], [2], [2], [90]] if kind == "caption" else None
    source = make_source(tmp_path, "dr", kind, [20, 45, 30, 40], pictures=[0] * 4, synthetic=made)
    rows = Rows(row_length=43, batch_rows=4, layout=layout)
    expected = (
        r"source 'dr', dr-000\.tar, sample 1: 49 positions do not fit into a row of 43 \(nor do 1 "
        r"others\); raise row_length.*overflow.*--max-tokens"
    )
    budget = Epochs(sources=("dr",), epochs=1)
    with pytest.raises(ValueError, match=expected):
        plan_rows({"dr": source}, PATCHES, budget, rows, 0)
    wide = Rows(row_length=49, batch_rows=4, layout=layout)
    assert len(plan_rows({"dr": source}, PATCHES, budget, wide, 0)) >= 3
    if made:
        drawn = Amounts(amounts=(Amount(source="dr", epochs=1, caption="random"),))
        longest = r"sample 3, synthetic caption 1: 94 positions do not fit"
        with pytest.raises(ValueError, match=longest):
            plan_rows({"dr": source}, PATCHES, drawn, rows, 0, "refuse")


@given(seed=st.integers(0, 99), share=st.floats(0, 1e-2), part=st.floats(0.05, 0.9))
@settings(max_examples=8, deadline=None)
def test_shares_before_the_reduction_are_of_the_same_examples_whatever_the_connector(
    seed: int, share: float, part: float
) -> None:
    with TemporaryDirectory() as folder:
        sources = make_sources(Path(folder), seed, longest=28)
        total = int(sources["web"].num_tokens * part)
        shares = {"web": 1 - 2 * share, "pics": share, "notes": share}
        budget = mixture(total, shares, 3).model_copy(update={"by": "patches"})
        rows = Rows(row_length=32, batch_rows=4)
        shown = []
        for left in (1, 2, 4):
            plan = plan_rows(sources, left, budget, rows, seed, unreduced_patches=4)
            report = shares_report(plan, sources, left)
            shown.append({name: entry["examples"] for name, entry in report.items()})
            found = rows_of(plan, sources, left)
            planned = 0
            for name, entry in report.items():
                counts = (row.sources.get(name, TokenCount()) for row in found)
                seen = sum(counts, TokenCount())
                assert entry["realised_tokens"] == seen.seen
                images = seen.image // left
                counted = entry["unreduced"] or entry
                # Planned is realised: to the token for text, within half an example otherwise.
                assert counted["realised_tokens"] == seen.seen + (4 - left) * images
                gap = abs(counted["realised_tokens"] - counted["planned_tokens"])
                assert gap <= (0 if name == "web" else counted["largest_example_tokens"])
                assert (entry["unreduced"] is None) == (entry["planned_tokens"] is not None)
                planned += counted["planned_tokens"]
            assert planned == total
            check_report(report, plan, sources, left)
        assert shown[0] == shown[1] == shown[2]
        # As shares of positions are where the connector leaves all.
        plain = plan_rows(sources, 4, budget.model_copy(update={"by": "tokens"}), rows, seed)
        check_report(shares_report(plain, sources, 4), plain, sources, 4)
        assert [row for k in range(len(plan)) for row in plan.layout.row(k)] == [
            row for k in range(len(plain)) for row in plain.layout.row(k)
        ]


def check_report(
    report: Mapping[str, Any], plan: RowPlan, sources: Mapping[str, Source], patches: int
) -> None:
    """It says what the rows hold."""
    assert list(report) == ["web", "pics", "notes"]
    for number, (name, entry) in enumerate(report.items()):
        every = (part for k in range(len(plan)) for part in plan.layout.row(k))
        held = [part for part in every if part.source == number]
        assert entry["kind"] == sources[name].kind
        assert entry["realised_tokens"] == sum(part.length for part in held)
        assert entry["examples"] == len({part.example for part in held})
        planned = (entry["unreduced"] or entry)["planned_tokens"]
        assert (planned > 0) == (entry["realised_tokens"] > 0)
        have = sources[name].num_tokens + patches * sources[name].num_images
        assert entry["epochs"] == pytest.approx(entry["realised_tokens"] / have)


# What is longer than its row.


def talks(folder: Path, seed: int, count: int) -> tuple[Source, list[list[int]]]:
    """Conversations of up to five turns, and of each what is learnt (1) of its tokens."""
    random = np.random.default_rng(seed)
    marks: list[list[int]] = []
    for _ in range(count):
        mine: list[int] = []
        for _ in range(int(random.integers(1, 6))):
            mine += [0] * int(random.integers(1, 9)) + [1] * int(random.integers(1, 7))
        marks.append(mine)
    pictures = [number if number % 3 else None for number in range(count)]
    shards = int(random.integers(1, 4))
    source = make_source(
        folder,
        "talks",
        "instruct",
        [len(mine) for mine in marks],
        pictures=pictures,
        shards=shards,
        supervised=marks,
    )
    return source, marks


def kept_of(marks: list[int], room: int) -> int:
    """Tokens of a conversation that stay, found turn by turn."""
    if len(marks) <= room:
        return len(marks)
    ends = [at for at in range(1, len(marks)) if marks[at - 1] and not marks[at]]
    return max((end for end in ends if end <= room), default=room)


def budgets(tokens: int) -> list[Budget]:
    share = (Share(source="talks", share=1.0),)
    return [
        Epochs(sources=("talks",), epochs=2),
        Mixture(total_tokens=tokens, shares=share, max_epochs=9),
        Mixture(total_tokens=tokens, shares=share, sampling="replacement"),
        Mixture(total_tokens=tokens, shares=share, max_epochs=9, by="sequences"),
    ]


@given(
    seed=st.integers(0, 999),
    row_length=st.integers(10, 30),
    layout=st.sampled_from(["filled", "padded"]),
    number=st.integers(0, 3),
)
@settings(max_examples=20, deadline=None)
def test_a_conversation_is_cut_behind_the_last_whole_turn_that_fits_and_all_counts_follow(
    seed: int, row_length: int, layout: Literal["filled", "padded"], number: int
) -> None:
    with TemporaryDirectory() as folder:
        source, marks = talks(Path(folder), seed, 20)
        rows = Rows(row_length=row_length, batch_rows=4, layout=layout)
        plan = plan_rows({"talks": source}, PATCHES, budgets(300)[number], rows, seed, "cut")
        cut = dropped = total = examples = 0
        for index in range(len(plan)):
            row = build_row(plan, {"talks": source}, index, PATCHES)
            total += row.counts.seen
            for placed in plan.layout.row(index):
                patches = PATCHES * len(source.places_of(placed.example))
                mine = marks[placed.example]
                kept = kept_of(mine, row_length - patches)
                assert placed.length == patches + kept
                text = slice(placed.column + patches, placed.column + placed.length)
                ids = source.input_ids(placed.example).tolist()
                assert row.input_ids[text].tolist() == ids[:kept]
                learnt = [t if m else IGNORE for t, m in zip(ids[:kept], mine, strict=False)][1:]
                # Nothing that is cut off is anybody's target.
                assert row.targets[text].tolist() == [*learnt, IGNORE]
                cut, dropped = cut + (kept < len(mine)), dropped + len(mine) - kept
                examples += 1
        (quota,) = plan.quotas
        assert total == quota.tokens == plan.seen_tokens
        report = shares_report(plan, {"talks": source}, PATCHES)["talks"]
        assert report["cut"] == {"examples": cut, "tokens": dropped}
        assert report["examples"] == examples
        assert report["largest_example_tokens"] <= row_length


@given(seed=st.integers(0, 999), row_length=st.integers(8, 20), made=st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_caption_is_cut_at_the_last_position_that_fits(
    seed: int, row_length: int, made: bool
) -> None:
    with TemporaryDirectory() as folder:
        random = np.random.default_rng(seed)
        own = random.integers(2, 30, 12).tolist()
        synthetic = [random.integers(2, 30, random.integers(1, 4)).tolist() for _ in own]
        source = make_source(
            Path(folder), "dr", "caption", own, pictures=[0] * 12, synthetic=synthetic, shards=4
        )
        amount = Amount(source="dr", epochs=2, caption="random" if made else "original")
        rows = Rows(row_length=row_length, batch_rows=4)
        budget = Amounts(amounts=(amount,))
        plan = plan_rows({"dr": source}, PATCHES, budget, rows, seed, "cut")
        total = dropped = 0
        for index in range(len(plan)):
            for placed in plan.layout.row(index):
                caption = [own[placed.example], *synthetic[placed.example]][placed.caption]
                assert placed.length == min(row_length, PATCHES + caption)
                total, dropped = total + placed.length, dropped + PATCHES + caption - placed.length
        assert total == plan.seen_tokens
        report = shares_report(plan, {"dr": source}, PATCHES)["dr"]
        assert report["cut"]["tokens"] == dropped
