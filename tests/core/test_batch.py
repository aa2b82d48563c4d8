import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings

from midstream.core.batch import IGNORE, PADDING, Batch, Row, stack_rows
from midstream.core.tokens import TokenCount

# A segment, position by position: "i" image, "." without a target, "t" with one.
LAYOUTS = {
    # Whole documents: the last position has no token after it.
    "text": ("ttt.", 1),
    "text of one token": (".", 1),
    # A document cut at a row's end, and the rest of it at the next row's head.
    "text cut behind": ("tttt", 1),
    "text cut before": ("tt.", 1),
    # <sep> is the first position with a target: the caption's first token.
    "caption": ("iiiittt.", 5),
    # <sep> In: question Out: <sep> reply <sep>; the second question is no prefix.
    "conversation": ("iiii....ttt.", 9),
    "conversation of two turns": ("iiii...tt....ttt.", 8),
    "conversation without an image": ("...tt..t.", 4),
    # Nothing is learnt from it; all of it is given.
    "without any target": ("ii..", 4),
}


def row_of(segments: list[str], length: int) -> Row:
    marks = "".join(segments)
    ids = [number for number, marked in enumerate(segments) for _ in marked]
    pad = length - len(marks)
    return Row(
        input_ids=np.zeros(length, dtype=np.int64),
        targets=np.array([7 if mark == "t" else IGNORE for mark in marks] + [IGNORE] * pad),
        position_ids=np.arange(length),
        segment_ids=np.array(ids + [PADDING] * pad),
        image_starts=np.zeros(0, dtype=np.int64),
        images=np.zeros((0, 2), dtype=np.int64),
        counts=TokenCount(pad=pad),
    )


def prefix_of(*rows: list[str], length: int) -> list[list[bool]]:
    batch: Batch = stack_rows([row_of(row, length) for row in rows], torch.zeros(0))
    found: list[list[bool]] = batch.prefix.tolist()
    return found


def expected(names: list[str], length: int) -> list[bool]:
    flags: list[bool] = []
    for name in names:
        marks, size = LAYOUTS[name]
        flags += [True] * size + [False] * (len(marks) - size)
    return flags + [False] * (length - len(flags))


@given(st.lists(st.lists(st.sampled_from(sorted(LAYOUTS)), max_size=5), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_segments_have_their_own_prefixes_whatever_stands_beside_them(
    rows: list[list[str]],
) -> None:
    length = 1 + max(sum(len(LAYOUTS[name][0]) for name in row) for row in rows)
    found = prefix_of(*[[LAYOUTS[name][0] for name in row] for row in rows], length=length)
    assert found == [expected(row, length) for row in rows]


def test_joined_rows_are_one_segment_with_its_first_token_as_prefix() -> None:
    # The end of a document predicts the beginning of the next one.
    assert prefix_of(["tttttttt"], ["ttttt."], length=8) == [[True] + [False] * 7] * 2
