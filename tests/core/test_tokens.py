from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midstream.core.tokens import TokenCount, apportion, counted, duration, quantity, rounded

NAMES = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=8, unique=True)
COUNTS = st.builds(
    TokenCount, **{name: st.integers(0, 10**12) for name in TokenCount.__dataclass_fields__}
)


@st.composite
def shares(draw: st.DrawFn) -> dict[str, float]:
    """Shares of 1, some of them 0, rounded as floats are."""
    names = draw(NAMES)
    weights = draw(
        st.lists(st.integers(0, 10**6), min_size=len(names), max_size=len(names)).filter(any)
    )
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


@given(st.integers(0, 10**15), shares())
def test_the_parts_add_up_and_none_is_off_by_a_whole_token(
    total: int, parts: dict[str, float]
) -> None:
    found = apportion(total, parts)
    assert sum(found.values()) == total
    assert found.keys() == parts.keys()
    whole = sum(Fraction(share) for share in parts.values())
    for name, share in parts.items():
        assert abs(found[name] - total * Fraction(share) / whole) < 1


@given(st.integers(0, 10**9), shares())
def test_a_larger_share_never_gets_less_nor_nothing_anything_in_any_order_of_names(
    total: int, parts: dict[str, float]
) -> None:
    found = apportion(total, parts)
    assert found == apportion(total, dict(reversed(parts.items())))
    assert all(found[name] == 0 for name, share in parts.items() if share == 0)
    ordered = sorted(parts, key=lambda name: parts[name])
    for less, more in pairwise(ordered):
        if parts[less] < parts[more]:
            assert found[less] <= found[more]


def test_a_tie_goes_to_the_first_name_of_the_alphabet() -> None:
    assert apportion(1, {"b": 0.5, "a": 0.5}) == {"b": 0, "a": 1}
    assert apportion(10, {"c": 0.25, "b": 0.25, "a": 0.5}) == {"c": 2, "b": 3, "a": 5}


def test_shares_that_are_negative_or_not_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        apportion(10, {"a": 1.5, "b": -0.5})
    for parts in ({"a": 0.5}, {"a": 0.6, "b": 0.6}, {"a": 1 + 1e-8}):
        with pytest.raises(ValueError, match="not to 1"):
            apportion(10, parts)


@given(COUNTS, COUNTS)
def test_counts_add_kind_by_kind(one: TokenCount, other: TokenCount) -> None:
    both = one + other
    assert both == other + one
    assert both.seen == one.seen + other.seen
    assert both.total == one.total + other.total
    assert both.target == one.target + other.target
    assert one + TokenCount() == one


def test_padding_is_not_seen_and_targets_are_not_counted_twice() -> None:
    count = TokenCount(text=1, caption=2, instruct=4, image=8, pad=16, target=7)
    assert (count.seen, count.total) == (15, 31)


def test_numbers_are_said_in_few_digits_without_powers_of_ten() -> None:
    said = [quantity(one) for one in (999, 999.6, 999_499, 999_500, 999_999_999, 1.25e9)]
    assert said == ["999", "1 k", "999 k", "1 M", "1 G", "1.25 G"]
    said = [rounded(one, 0.01) for one in (0, 0.001, 0.012, 9.96, 99.4, 99.6, 8096.2)]
    assert said == ["0", "<0.01", "0.012", "10", "99", "100", "8,096"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((quantity(None), "unknown"), (quantity(0), "0"), (quantity(999), "999")),
        *((quantity(1000), "1 k"), (quantity(2.5e13), "25 T"), (quantity(3.1e21), "3.1 Z")),
        *((counted(0, "seed"), "0 seeds"), (counted(1, "seed"), "1 seed")),
        *((counted(1024, "seed"), "1,024 seeds"), (counted(2, "entry", "entries"), "2 entries")),
        *((duration(3), "3 s"), (duration(90), "2 min"), (duration(3600), "1 h")),
        *((duration(7500), "2 h 5 min"), (duration(190_000), "2 d 4 h")),
    ],
)
def test_numbers_and_times_are_told_in_few_digits_and_a_unit(text: str, words: str) -> None:
    assert text == words
