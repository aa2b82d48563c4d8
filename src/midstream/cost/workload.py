"""What a training stage computes on, in rows that `order/plan.py` makes of drawn lengths."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import ceil
from typing import Any, Literal

import numpy as np

from midstream.config import (
    Amounts,
    AnyEncoderConfig,
    Budget,
    DecoderConfig,
    Mixture,
    Rows,
    Training,
    VLMConfig,
)
from midstream.config.model import FILL_BATCH, LARGE_TOWER, LEAST_CUT_ROW, MOST_TARGETS
from midstream.cost.known import Basis, Facts, Number
from midstream.order.mixture import Supply, needs_of
from midstream.order.plan import BLOCK_ROWS, Filled, make_plan, rows_of_all
from midstream.order.stream import ArrayLengths, parts_of

Device = Literal["cpu", "cuda"]
# Of a longer plan so many rows are laid out, of padded and joined ones fewer: their rows are alike.
SAMPLE_ROWS, SAMPLE_ROWS_APART = 2 * BLOCK_ROWS, BLOCK_ROWS
# Passes over a source that are too many are refused by the checks; a plan prices them.
ANY_EPOCHS = 10**9


@dataclass(frozen=True)
class Taken:
    """What a budget takes of a source: positions that are not padding, examples, pictures."""

    tokens: int
    examples: Number
    images: Number


@dataclass(frozen=True)
class Workload:
    """A training stage in numbers.

    tokens: positions that are not padding; positions: all that are computed; squares: pairs of
    positions that attention computes, a causal mask taken for none; attended: pairs of which one
    sees the other, to its document's border; asked: positions that the last
    block computes whole; encoded: pictures that a live frozen encoder is given, the fill of its
    batches among them.
    """

    tokens: int
    images: Number
    positions: Number
    squares: Number
    attended: Number
    targets: Number
    asked: Number
    encoded: Number
    rows: int
    steps: int
    basis: Basis


def taken(training: Training, sources: Mapping[str, Facts], model: VLMConfig) -> dict[str, Taken]:
    """By source, what a budget takes of it."""
    patches = model.image_tokens
    counted = patches + _left_out(training.budget, model)
    sources = _fitted(training, sources, patches)
    texts = {name for name, source in sources.items() if source.kind == "text"}
    found = {}
    for need in needs_of(training.budget, training.rows.row_length, texts):
        source = sources[need.source]
        size = source.size(patches)
        held = {"tokens": source.size(counted), "examples": source.examples, "epochs": 1}[need.unit]
        part = need.amount / max(held, 1)
        found[need.source] = Taken(round(part * size), part * source.examples, part * source.images)
    return found


def workload(
    model: VLMConfig, training: Training, sources: Mapping[str, Facts], device: Device
) -> Workload | None:
    """The work of a stage over its whole budget; None where the checks refuse its rows.

    Rows of a step are one batch, as in `train/step.py`. On a CPU batches are cut behind their last
    held column, and long rows into their segments; on a GPU segments cost what they hold, and rows
    are whole.

    Stages of up to SAMPLE_ROWS rows are laid out whole, of longer ones as many: sources and budget
    are made smaller together, and the lengths of examples are drawn evenly over their classes, so
    that equal stages have equal numbers. Against twelve times as many rows, those of a stage with
    text are within 0.4 %, pairs within 0.1 %; encoded pictures within 2 %; `asked` within 2 % where
    about MOST_TARGETS of the positions have targets. Conversations alone in more than 512 blocks
    have rows in reserve that follow from how blocks differ: 3 %.
    """
    patches = model.image_tokens
    parts, sources = taken(training, sources, model), _fitted(training, sources, patches)
    rows, length = training.rows, training.rows.row_length
    whole = any(sources[name].kind != "text" for name in parts)
    if not any(part.tokens for part in parts.values()) or (whole and rows.layout == "joined"):
        return None
    expected = sum(part.tokens for part in parts.values()) / length
    if rows.layout == "padded":
        apart = (part.examples for name, part in parts.items() if sources[name].kind != "text")
        expected = max(expected, sum(apart))
    share = min(1.0, max(SAMPLE_ROWS, 2 * rows.batch_rows) / expected)
    laid = _laid_out(
        tuple(
            (name, sources[name], max(1, round(share * min(sources[name].examples, part.examples))))
            for name, part in parts.items()
        ),
        _smaller(training.budget, share),
        rows,
        patches,
        _left_out(training.budget, model),
        share == 1,
    )
    num_rows = laid.num_rows(1 / share)
    widths = laid.widths if device == "cpu" else np.full_like(laid.widths, length)
    positions = laid.sizes * widths
    targets = sum(
        _learnt(sources[name], rows)
        * sources[name].tokens
        * part.examples
        / max(sources[name].examples, 1)
        for name, part in parts.items()
    )
    by_rows, by_tokens = num_rows / int(laid.sizes.sum()), laid.times / share
    squares = laid.squares * by_tokens
    if rows.layout != "filled" or not _by_segment(model, length, device):
        squares = float((positions * widths).sum()) * by_rows
    asked = positions * by_rows
    if isinstance(model.decoder, DecoderConfig):
        learnt = laid.targets * targets / max(laid.targets.sum(), 1)
        asked = np.where(learnt <= MOST_TARGETS * asked, learnt, asked)
    images = sum(part.images for part in parts.values())
    return Workload(
        tokens=sum(part.tokens for part in parts.values()),
        images=images,
        positions=float(positions.sum()) * by_rows,
        squares=squares,
        attended=laid.attended * by_tokens,
        targets=targets,
        asked=float(asked.sum()),
        encoded=_encoded(images, laid.images, model.encoder, device),
        rows=num_rows,
        steps=ceil(num_rows / rows.batch_rows),
        basis="counted" if all(sources[n].basis == "counted" for n in parts) else "expected",
    )


def _left_out(budget: Budget, model: VLMConfig) -> int:
    """Patches of a picture that the connector leaves out, where the budget counts them."""
    unreduced = isinstance(budget, Mixture) and budget.by == "patches"
    return model.num_patches - model.image_tokens if unreduced else 0


def _fitted(training: Training, sources: Mapping[str, Facts], patches: int) -> Mapping[str, Facts]:
    length, pools = training.rows.row_length, training.budget.pools
    return {
        name: source.pooled(pools.get(name)).fitted(patches, length)
        for name, source in sources.items()
    }


def _learnt(source: Facts, rows: Rows) -> float:
    """The share of a source's text tokens that are targets."""
    if source.kind == "text" and rows.layout != "filled":
        # Joined documents predict each other's beginning.
        return 1.0
    return source.targets / max(source.tokens, 1)


def _smaller(budget: Budget, share: float) -> Budget:
    """A part of a budget; passes stay, over sources that are smaller, pools among them."""
    match budget:
        case Mixture():
            shares = tuple(one.model_copy(update={"pool": None}) for one in budget.shares)
            total = max(1, round(budget.total_tokens * share))
            changed: dict[str, Any] = {"total_tokens": total, "shares": shares}
        case Amounts():
            amounts = []
            for one in budget.amounts:
                tokens = max(1, round(one.tokens * share)) if one.tokens else None
                amounts.append(one.model_copy(update={"tokens": tokens, "pool": None}))
            changed = {"amounts": tuple(amounts)}
        case _:
            return budget
    return budget.model_copy(
        update={**changed, "max_epochs": ANY_EPOCHS, "sampling": "permutation"}
    )


@dataclass(frozen=True)
class _LaidOut:
    """A plan: its rows, those of a filled one's blocks; over one in `times` of them, by step."""

    rows: int
    blocks: tuple[int, ...]
    times: float
    # Rows of each step, columns up to the last held one, targets, pictures.
    sizes: np.ndarray
    widths: np.ndarray
    targets: np.ndarray
    images: np.ndarray
    squares: float
    attended: float

    def num_rows(self, times: float) -> int:
        """Of a plan that is so many times as long."""
        return rows_of_all(self.blocks, times) if self.blocks else round(times * self.rows)


class _Spread(ArrayLengths):
    """Examples whose pictures each stand before an equal part of the text: where a document is cut
    follows from that."""

    def __init__(self, lengths: np.ndarray, images: np.ndarray, patches: int) -> None:
        super().__init__(lengths)
        self.images, self.patches = images, patches

    def parts(self, example: int) -> list[int]:
        """Of such a document; a text is one."""
        images = int(self.images[example])
        tokens = int(self.lengths[example]) - images * self.patches
        places = [tokens * number // images for number in range(images)]
        return parts_of(places, tokens, self.patches)


@lru_cache(maxsize=256)
def _laid_out(
    drawn: tuple[tuple[str, Facts, int], ...],
    budget: Budget,
    rows: Rows,
    patches: int,
    left_out: int,
    whole: bool,
) -> _LaidOut:
    supplies, shown, sizes = [], [], []
    for name, source, number in drawn:
        lengths, images_of = source.drawn(number, patches)
        text = source.kind == "text"
        goes_on = text or (source.kind == "interleaved" and rows.layout == "filled")
        lengths = lengths if goes_on else np.minimum(lengths, rows.row_length)
        unreduced = ArrayLengths(lengths + left_out * images_of) if left_out else None
        supplies.append(Supply(name, _Spread(lengths, images_of, patches), text, unreduced))
        shown.append(images_of)
        sizes.append(lengths)
    plan = make_plan(supplies, budget, rows, seed=0)
    blocks: list[int] = []
    number, batch = len(plan), rows.batch_rows
    if isinstance(plan.layout, Filled):
        blocks = np.diff(plan.layout.first_rows).tolist()
    elif not whole:
        number = min(number, max(SAMPLE_ROWS_APART, 2 * batch))
    if not whole:
        number = number // batch * batch or number
    held = [plan.layout.row(row) for row in range(number)]
    row = np.repeat(np.arange(number), list(map(len, held)))
    numbers = np.fromiter(chain.from_iterable(chain.from_iterable(held)), dtype=np.int64)
    source_of, example, start, lengths, *_ = numbers.reshape(int(row.size), -1).T
    step, steps = row // batch, -(-number // batch)
    first = np.cumsum([0, *map(len, shown)])[:-1]
    of_example = np.concatenate(shown)[first[source_of] + example]
    images = np.where(start == 0, of_example, 0)
    # A piece has its part of a document's patches.
    size = np.concatenate(sizes)[first[source_of] + example]
    texts = lengths * (1 - patches * of_example / np.maximum(size, 1))
    learnt = np.array([_learnt(source, rows) for _, source, _ in drawn])[source_of]
    ends = np.bincount(row, lengths, number)
    # Joined documents see each other, and a padded row has one example.
    seen = lengths if rows.layout == "filled" else ends
    return _LaidOut(
        rows=len(plan),
        blocks=tuple(blocks),
        times=len(plan) / number,
        sizes=np.bincount(np.arange(number) // batch),
        widths=np.maximum.reduceat(ends, np.arange(0, number, batch)),
        targets=np.bincount(step, np.maximum(texts, 0) * learnt, steps),
        images=np.bincount(step, images, steps),
        squares=float((lengths**2).sum()),
        attended=float((seen * (seen + 1)).sum()) / 2,
    )


def _by_segment(model: VLMConfig, row_length: int, device: Device) -> bool:
    """Whether attention is computed by segments: cut apart or masked by blocks, not whole rows."""
    own = isinstance(model.decoder, DecoderConfig)
    cut = own and model.attention != "prefix" and row_length >= LEAST_CUT_ROW
    return (device == "cuda" or cut) and model.attention != "causal"


def _encoded(
    images: Number, seen: np.ndarray, encoder: AnyEncoderConfig | None, device: Device
) -> Number:
    """Pictures in batches of one size, the last of each step filled up."""
    if encoder is None:
        return 0.0
    if device == "cpu" and encoder.num_patches >= LARGE_TOWER:
        return images
    batches = np.ceil(seen / FILL_BATCH).sum()
    return images * float(batches * FILL_BATCH / max(seen.sum(), 1))
