"""Options of a stage's data: how much of which sources, and the rows made of it."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from midstream.config.base import Config, Fraction, Positive

# Which of a picture's captions is seen: its own, the first synthetic one, or a synthetic one drawn
# from the plan's seed each time that the picture is seen.
Caption = Literal["original", "synthetic", "random"]


# Captions that an encoder's training does not see; its retrieval is measured on them.
HELD_APART = 256


def check_caption(
    name: str, kind: str, caption: Caption, have: Mapping[str, int], num_examples: int
) -> None:
    """Refuse a budget that asks a source for captions which some of its pictures lack.

    `have` counts the examples with an "original" and with a "synthetic" caption. Raises ValueError
    with the source, both numbers and the remedy.
    """
    asked = "original" if caption == "original" else "synthetic"
    if have[asked] == num_examples:
        return
    if kind != "caption":
        raise ValueError(
            f"source {name!r} holds {kind}, which has no {asked} captions; leave its caption at "
            '"original"'
        )
    other = '"synthetic" or "random"' if asked == "original" else '"original"'
    raise ValueError(
        f"source {name!r}: {have[asked]:,} of its {num_examples:,} pictures have "
        f"{'an' if asked == 'original' else 'a'} {asked} caption, and caption={caption!r} asks for "
        f"one of each; ask for caption={other}, or leave the other pictures out (midstream prepare "
        f"captions --require {asked})"
    )


def check_pool(name: str, kind: str, pool: int, num_examples: int) -> None:
    """Refuse a pool of a source that shows no pictures with captions, or holds fewer examples.

    Raises ValueError with the source, both numbers and the remedy.
    """
    if kind != "caption":
        raise ValueError(
            f"source {name!r} holds {kind}, and a pool is of pictures with captions; leave its "
            "pool out"
        )
    if pool > num_examples:
        raise ValueError(
            f"source {name!r} holds {num_examples:,} examples, the pool asks for {pool:,}; lower "
            "the pool, or leave it out for all of them"
        )


def check_held_apart(name: str, num_examples: int, batch_images: int) -> None:
    """Raises ValueError where a source of captions has none for a batch of an encoder's training
    beside those that its retrieval is measured on."""
    left = num_examples - HELD_APART
    if left < batch_images:
        remedy = f"lower batch_images to {left:,}" if left > 1 else "give more of them"
        raise ValueError(
            f"source {name!r} holds {num_examples:,} captions, batch_images {batch_images:,} and "
            f"{HELD_APART} held apart need {batch_images + HELD_APART:,}; {remedy}, or load an "
            "encoder (midstream import)"
        )


def check_picture(name: str, num_positions: int, row_length: int) -> None:
    """Raises ValueError for a picture that takes so many positions, where a row has no room for it
    and its separator."""
    if num_positions and num_positions + 1 > row_length:
        raise ValueError(
            f"a picture of source {name!r} and its separator take {num_positions + 1:,} positions, "
            f"a row has {row_length:,}; raise row_length, or choose an encoder or a connector of "
            "fewer positions a picture"
        )


class Share(Config):
    """A named source and its share of a token budget (all its tokens that are not padding).

    `caption` says which of a picture's captions is seen. `pool`: of a caption source the first so
    many examples of the stage's seeded order alone, over and over (`max_epochs` are passes over
    them); contained in every larger pool. None: all of them.
    """

    source: str
    share: Fraction
    caption: Caption = "original"
    pool: Positive | None = None


Sampling = Literal["permutation", "replacement"]
# What shares are of: positions of rows, sequences, or positions before the connector's reduction.
ShareUnit = Literal["tokens", "sequences", "patches"]


class _Named(Config):
    """A budget of parts, each with its source and its caption."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources that the budget draws from."""
        return tuple(self.captions)

    @property
    def captions(self) -> dict[str, Caption]:
        """By source: which caption is seen; the sources in the budget's order."""
        return {part.source: part.caption for part in self._parts}

    @property
    def pools(self) -> dict[str, int]:
        """By source: how many of its examples may be seen, of those that have a pool."""
        return {part.source: part.pool for part in self._parts if part.pool is not None}

    @property
    def _parts(self) -> "tuple[Share | Amount, ...]":
        raise NotImplementedError

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [part.source for part in self._parts]
        if len(set(names)) != len(names):
            raise ValueError(f"a source is named twice: {names}; name each of them once")
        return self


class Mixture(_Named):
    """Exact shares of a budget of tokens; a source may be repeated `max_epochs` times.

    by="sequences" (OpenLM's weights): shares are of the `total_tokens // row_length` sequences; one
    is an example with a picture, a conversation, or a row's length of text. by="patches": total and
    shares are of tokens before the connector's reduction, a picture as all of its patches, so that
    equal budgets are of the same examples whatever the connector. sampling="replacement"
    (the paper's runs): every draw is from the whole source, and `max_epochs` sets no limit.
    """

    kind: Literal["mixture"] = "mixture"
    total_tokens: Positive
    shares: Annotated[tuple[Share, ...], Field(min_length=1)]
    max_epochs: Positive = 1
    by: ShareUnit = "tokens"
    sampling: Sampling = "permutation"

    @property
    def _parts(self) -> "tuple[Share, ...]":
        return self.shares

    @model_validator(mode="after")
    def _whole(self) -> "Mixture":
        if abs(sum(share.share for share in self.shares) - 1) > 1e-9:
            raise ValueError(f"shares add up to {sum(s.share for s in self.shares)}, not to 1")
        return self


class Epochs(_Named):
    """Every example of the sources, `epochs` times."""

    kind: Literal["epochs"] = "epochs"
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    epochs: Positive

    @property
    def _parts(self) -> "tuple[Amount, ...]":
        return tuple(Amount(source=name, epochs=self.epochs) for name in self.sources)


class Amount(Config):
    """A source and how much of it: either tokens, patches included, or whole passes.

    `caption` and `pool` are those of a `Share`; whole passes are over the pool.
    """

    source: str
    tokens: Positive | None = None
    epochs: Positive | None = None
    caption: Caption = "original"
    pool: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> "Amount":
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError(f"source {self.source!r} needs either tokens or epochs")
        return self


class Amounts(_Named):
    """Absolute amounts; the total follows. A source may be repeated `max_epochs` times."""

    kind: Literal["amounts"] = "amounts"
    amounts: Annotated[tuple[Amount, ...], Field(min_length=1)]
    max_epochs: Positive = 1
    sampling: Sampling = "permutation"

    @property
    def _parts(self) -> "tuple[Amount, ...]":
        return self.amounts

    @model_validator(mode="after")
    def _whole(self) -> "Amounts":
        if self.sampling == "replacement" and any(amount.epochs for amount in self.amounts):
            raise ValueError(
                "epochs are whole passes; with replacement there are none: give tokens"
            )
        return self


Budget = Annotated[Mixture | Amounts | Epochs, Field(discriminator="kind")]


# What becomes of a caption or conversation that is longer than its row.
Overflow = Literal["cut", "refuse"]


class Rows(Config):
    """How examples become rows of `row_length` positions, `batch_rows` of which make a step.

    joined: documents joined by end-of-text and cut at the row length, no document mask (OpenLM).
    filled: examples side by side, kept apart by segments, as full as they fit.
    padded: one image example a row and padding behind it, text rows as in `joined` (the paper).
    overflow: a caption or conversation longer than its row is cut behind the last whole turn that
    fits, and counted (cut), or refused when the rows are planned (refuse); None: cut in
    fine-tuning, as Prismatic truncates, refused elsewhere.
    """

    row_length: Positive
    batch_rows: Positive
    layout: Literal["joined", "filled", "padded"] = "filled"
    overflow: Overflow | None = None
