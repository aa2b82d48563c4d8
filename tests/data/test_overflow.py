"""Captions and conversations longer than their row: cut behind a whole turn and counted, or refused
when the rows are planned."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_source

from midstream.config import Amount, Amounts, Budget, Epochs, Mixture, Rows, Share
from midstream.core.batch import IGNORE
from midstream.data.rows import build_row, plan_rows, shares_report
from midstream.data.sources import Source

PATCHES = 4


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
                patches = PATCHES if source.has_image(placed.example) else 0
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


def test_where_it_is_refused_the_longest_is_named_with_both_numbers_and_the_remedies(
    tmp_path: Path,
) -> None:
    source = make_source(
        tmp_path, "dr", "caption", [5, 30, 41, 6], pictures=[0] * 4, synthetic=[[2]] * 3 + [[70]]
    )
    rows = Rows(row_length=30, batch_rows=4)
    expected = (
        r"source 'dr', dr-000\.tar, sample 2: 45 positions do not fit into a row of 30 \(nor do 1 "
        r"others\); raise row_length.*overflow.*--max-tokens"
    )
    with pytest.raises(ValueError, match=expected):
        plan_rows({"dr": source}, PATCHES, Epochs(sources=("dr",), epochs=1), rows, 0, "refuse")
    drawn = Amounts(amounts=(Amount(source="dr", epochs=1, caption="random"),))
    with pytest.raises(ValueError, match=r"sample 3, synthetic caption 1: 74 positions do not fit"):
        plan_rows({"dr": source}, PATCHES, drawn, rows, 0, "refuse")
