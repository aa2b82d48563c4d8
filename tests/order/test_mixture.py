"""Budgets: how much of each source a plan takes, and how that lies over its length."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from midstream.config import Amount, Amounts, Budget, Epochs, Mixture, Share
from midstream.core.tokens import apportion
from midstream.order import stream
from midstream.order.mixture import Quota, Supply, interleaved, quotas_of
from midstream.order.stream import ArrayLengths, Stretch

SEEDS = st.integers(0, 2**32 - 1)
NAMES = "abcd"


@dataclass(frozen=True)
class Case:
    """Sources, and a budget over them that may be too large."""

    supplies: dict[str, Supply]
    budget: Budget
    row_length: int

    def quotas(self, seed: int = 0) -> dict[str, Quota]:
        found = quotas_of(
            list(self.supplies.values()), self.budget, row_length=self.row_length, seed=seed
        )
        return {quota.name: quota for quota in found}


def supplies_of(seed: int, count: int, row_length: int) -> dict[str, Supply]:
    """Texts of up to three rows, captions (nearly as long as each other), conversations."""
    random = np.random.default_rng(seed)
    found = {}
    for number, name in enumerate(NAMES[:count]):
        kind, size = (number + seed) % 3, int(random.integers(1, 120))
        lows = (1, 2 * row_length // 3, 1)
        highs = (3 * row_length, 2 * row_length // 3 + 3, row_length)
        lengths = random.integers(lows[kind], highs[kind] + 1, size)
        found[name] = Supply(name, ArrayLengths(np.minimum(lengths, highs[kind])), kind == 0)
    return found


@st.composite
def mixtures(draw: st.DrawFn) -> Case:
    """Shares of a total, down to 1e-9, of up to one and a half times what the sources hold."""
    row_length = draw(st.integers(6, 60))
    supplies = supplies_of(draw(SEEDS), draw(st.integers(1, 4)), row_length)
    smallest = draw(st.sampled_from([1, 1, 2, 9]))
    weights = [10.0 ** -draw(st.floats(0, smallest)) for _ in supplies]
    shares = {name: w / sum(weights) for name, w in zip(supplies, weights, strict=True)}
    by = draw(st.sampled_from(["tokens", "sequences"]))
    epochs = draw(st.integers(1, 3))
    unit = row_length if by == "sequences" else 1
    most = min(
        unit * epochs * held(supply, by, row_length) / max(shares[name], 1e-12)
        for name, supply in supplies.items()
    )
    total = min(int(most * draw(st.floats(0, 1.5))) + unit, 10**6)
    budget = Mixture(
        total_tokens=total,
        shares=tuple(Share(source=name, share=share) for name, share in shares.items()),
        max_epochs=epochs,
        by=by,
        sampling=draw(st.sampled_from(["permutation", "permutation", "replacement"])),
    )
    return Case(supplies, budget, row_length)


@st.composite
def amounts(draw: st.DrawFn) -> Case:
    """Tokens of some sources, whole passes of others."""
    row_length = draw(st.integers(6, 60))
    supplies = supplies_of(draw(SEEDS), draw(st.integers(1, 4)), row_length)
    sampling = draw(st.sampled_from(["permutation", "replacement"]))
    found = []
    for name, supply in supplies.items():
        if sampling == "permutation" and draw(st.booleans()):
            found.append(Amount(source=name, epochs=draw(st.integers(1, 3))))
        else:
            tokens = draw(st.integers(1, 2 * supply.lengths.total))
            found.append(Amount(source=name, tokens=tokens))
    budget = Amounts(amounts=tuple(found), max_epochs=draw(st.integers(1, 3)), sampling=sampling)
    return Case(supplies, budget, row_length)


def held(supply: Supply, by: str, row_length: int) -> int:
    """What one pass of a source has: tokens, or sequences."""
    if by == "tokens":
        return supply.lengths.total
    return supply.lengths.total // row_length if supply.divisible else len(supply.lengths)


def wanted(case: Case) -> Mapping[str, tuple[str, int, int]]:
    """By source: the unit that its budget counts in, how many of it, and how many a pass has."""
    budget, found = case.budget, {}
    for name in budget.source_names:
        supply = case.supplies[name]
        tokens = supply.lengths.total
        match budget:
            case Epochs():
                found[name] = ("passes", budget.epochs, 1)
            case Amounts():
                mine = next(amount for amount in budget.amounts if amount.source == name)
                found[name] = ("tokens", mine.tokens or 0, tokens)
                if mine.epochs:
                    found[name] = ("passes", mine.epochs, 1)
            case Mixture():
                shares = {share.source: share.share for share in budget.shares}
                if budget.by == "tokens":
                    found[name] = ("tokens", apportion(budget.total_tokens, shares)[name], tokens)
                    continue
                parts = apportion(budget.total_tokens // case.row_length, shares)
                found[name] = ("examples", parts[name], len(supply.lengths))
                if supply.divisible:
                    found[name] = ("tokens", parts[name] * case.row_length, tokens)
    return found


def refused(case: Case) -> str | None:
    """The two numbers that a refusal must name."""
    budget = case.budget
    if isinstance(budget, Epochs) or budget.sampling == "replacement":
        return None
    for name, (unit, need, have) in wanted(case).items():
        if unit != "passes" and need > have * budget.max_epochs:
            numbers = f"source '{name}' holds {have:,} {unit}, the plan needs {need:,};"
            return f"{numbers} raise max_epochs above {budget.max_epochs}"
    return None


def examples_of(quota: Quota) -> Stretch:
    """All that a quota takes."""
    if quota.divisible:
        return quota.stream.tokens(0, quota.tokens)
    return quota.stream.places(0, quota.examples)


def tokens_of(stretch: Stretch) -> np.ndarray:
    """Of each token in turn its example and its place in it."""
    ends = np.cumsum(stretch.lengths)
    first = np.repeat(ends - stretch.lengths - stretch.starts, stretch.lengths)
    places = np.arange(ends[-1] if len(ends) else 0) - first
    return np.stack([np.repeat(stretch.examples, stretch.lengths), places])


def check(case: Case, seed: int) -> None:
    """A budget is met within one example, text to the token, or refused with both numbers."""
    expected = refused(case)
    if expected is not None:
        with pytest.raises(ValueError, match="holds") as caught:
            case.quotas(seed)
        assert expected in str(caught.value)
        return
    if not any(need for _, need, _ in wanted(case).values()):
        with pytest.raises(ValueError, match="holds no token"):
            case.quotas(seed)
        return
    found = case.quotas(seed)
    assert tuple(found) == case.budget.source_names
    for name, (unit, need, _) in wanted(case).items():
        quota, lengths = found[name], case.supplies[name].lengths
        assert isinstance(lengths, ArrayLengths)
        taken = examples_of(quota)
        assert quota.tokens == taken.lengths.sum()
        assert (quota.tokens > 0) == (need > 0)
        times = np.bincount(taken.examples, minlength=len(lengths))
        if unit == "passes":
            assert times.tolist() == [need] * len(lengths)
        elif unit == "examples":
            assert quota.examples == need == len(taken.examples)
        elif quota.divisible:
            assert quota.tokens == need
        elif need:
            # Half of the example that the budget ends in, or the one that is seen all the same.
            last = int(taken.lengths[-1])
            assert need - quota.tokens < max(lengths.lengths) / 2 + 1
            assert 2 * (quota.tokens - need) < last or quota.examples == 1
        if isinstance(case.budget, Epochs) or case.budget.sampling == "permutation":
            # None again before all others: one pass is over before the next one begins.
            assert times.max() - times.min() <= 1
        if not quota.divisible:
            assert (taken.lengths == lengths.lengths[taken.examples]).all()


@given(case=mixtures(), seed=st.integers(0, 5))
@settings(max_examples=30, derandomize=True)
def test_mixtures_are_met_within_an_example_or_refused(case: Case, seed: int) -> None:
    check(case, seed)


@given(case=amounts(), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_amounts_are_met_within_an_example_or_refused(case: Case, seed: int) -> None:
    check(case, seed)


@given(seed=SEEDS, count=st.integers(1, 4), epochs=st.integers(1, 4), small=st.booleans())
@settings(max_examples=15, deadline=None)
def test_epochs_are_whole_passes(seed: int, count: int, epochs: int, small: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if small:  # Chunks of several examples, several groups a pass.
            patch.setattr(stream, "MAX_CHUNKS", 7)
            patch.setattr(stream, "MIN_CHUNK", 3)
            patch.setattr(stream, "GROUP_EXAMPLES", 8)
        supplies = supplies_of(seed, count, 20)
        check(Case(supplies, Epochs(sources=tuple(supplies), epochs=epochs), 20), seed % 7)


@given(case=st.one_of(mixtures(), amounts()), num_blocks=st.integers(1, 12), seed=SEEDS)
@settings(max_examples=50, deadline=None)
def test_blocks_hold_all_that_is_taken_once_and_each_its_part(
    case: Case, num_blocks: int, seed: int
) -> None:
    assume(refused(case) is None)
    assume(any(need for _, need, _ in wanted(case).values()))
    for quota in case.quotas(seed).values():
        bounds = [quota.before(block, num_blocks) for block in range(num_blocks + 1)]
        assert bounds[0] == 0
        assert bounds[-1] == (quota.tokens if quota.divisible else quota.examples)
        assert bounds == sorted(bounds)
        everything = examples_of(quota)
        parts = [quota.block(block, num_blocks) for block in range(num_blocks)]
        held_tokens = np.concatenate([tokens_of(part) for part in parts], axis=1)
        assert np.array_equal(held_tokens, tokens_of(everything))
        if quota.divisible:
            # Only where a document begins, or behind rows of a longer one.
            assert all((part.starts % case.row_length == 0).all() for part in parts)
            allowed = float(case.row_length)
        else:
            allowed = float(everything.lengths.max(initial=0))
        if quota.divisible or not quota.by_count:
            for part in parts:
                assert abs(part.lengths.sum() - quota.tokens / num_blocks) <= allowed
        else:
            sizes = np.diff(bounds)
            assert sizes.max() - sizes.min() <= 1


def test_documents_of_a_share_far_below_one_a_block_stay_whole() -> None:
    supplies = [
        Supply("web", ArrayLengths(np.full(1000, 100)), True),
        Supply("notes", ArrayLengths(np.full(20, 60)), True),
    ]
    shares = (Share(source="web", share=0.99), Share(source="notes", share=0.01))
    budget = Mixture(total_tokens=60_000, shares=shares)
    _, notes = quotas_of(supplies, budget, row_length=64, seed=0)
    parts = [notes.block(block, 200) for block in range(200)]
    assert [part.lengths.tolist() for part in parts if len(part.lengths)] == [[60]] * 10


def test_a_plan_is_the_same_whatever_other_sources_there_are_and_in_which_order() -> None:
    random = np.random.default_rng(0)
    a, b, c = (Supply(n, ArrayLengths(random.integers(1, 50, 100)), n == "a") for n in "abc")
    shares = (Share(source="a", share=0.3), Share(source="b", share=0.7))
    budget = Mixture(total_tokens=2000, shares=shares)
    one, other = (quotas_of(s, budget, row_length=32, seed=3) for s in ([a, b], [c, b, a]))
    for first, second in zip(one, other, strict=True):
        assert first.name == second.name
        assert examples_of(first).examples.tolist() == examples_of(second).examples.tolist()


def test_an_unknown_source_is_refused_with_those_there_are() -> None:
    web = Supply("web", ArrayLengths(np.ones(3)), True)
    budget = Mixture(total_tokens=2, shares=(Share(source="wbe", share=1.0),))
    with pytest.raises(ValueError, match=r"no source 'wbe' in the data; it holds \['web'\]"):
        quotas_of([web], budget, row_length=4, seed=0)


@given(seed=SEEDS, counts=st.lists(st.integers(0, 40), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_every_beginning_of_merged_examples_has_the_shares_of_the_whole_within_half_an_example_each(
    seed: int, counts: list[int]
) -> None:
    random, nothing = np.random.default_rng(seed), np.zeros(40, np.int64)
    stretches = [
        Stretch(np.arange(n), nothing[:n], random.integers(1, 50, n), nothing[:n]) for n in counts
    ]
    number, place = interleaved(stretches)
    for source, stretch in enumerate(stretches):
        assert place[number == source].tolist() == list(range(len(stretch.examples)))
    lengths = np.array([stretches[n].lengths[p] for n, p in zip(number, place, strict=True)])
    totals = [int(stretch.lengths.sum()) for stretch in stretches]
    done = np.zeros(len(counts))
    largest = [int(stretch.lengths.max(initial=0)) for stretch in stretches]
    for source, length in zip(number, lengths, strict=True):
        done[source] += length
        due = done.sum() / sum(totals)
        for mine, total in enumerate(totals):
            allowed = (largest[mine] + total / sum(totals) * sum(largest)) / 2
            assert abs(done[mine] - due * total) <= allowed + 1e-6
    assert len(number) == sum(counts)
