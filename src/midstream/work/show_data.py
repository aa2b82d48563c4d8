"""The work of `midstream show-data`: a row of a plan as a person reads it, and its mixture.

It only reads, unless it is asked to prepare the data.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from midstream.config import Amounts, Budget, Epochs, ImageTransform, Machine, Mixture
from midstream.core.batch import IGNORE, Row, add_counts
from midstream.core.storage import write_bytes
from midstream.core.tokens import TokenCount
from midstream.cost.graph import order_of
from midstream.data.examples import TextCodec, runs_of
from midstream.data.images import decode_pixels
from midstream.data.lengths import picture_views
from midstream.data.rows import GO_ON, build_row, plan_rows, shares_report
from midstream.data.sources import Source
from midstream.order.plan import RowPlan
from midstream.study.label import label
from midstream.study.stages import DataStage, Stage, Trained, overflow_of
from midstream.study.store import Ledger, launch_lock
from midstream.work.open_model import open_sources, open_tokenizer
from midstream.work.protocol import Channel, Request, harmless, print_line

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
# What stands around targets where there are no colours.
OPEN_MARK, CLOSE_MARK = "⟦", "⟧"
KINDS = ("text", "caption", "instruct", "interleaved", "image", "pad", "target")


class ShowDataRequest(Request):
    """A stage of a store, and the row to print, or how many rows the mixture is counted over.

    `remedy` is the command that prepares the data.
    """

    store: Path
    stage: Trained
    row: int | None
    stats: int | None
    out: Path
    prepare: bool
    remedy: str


def show_data(request: ShowDataRequest, channel: Channel) -> None:
    """Print what is asked for; FileNotFoundError names data that is not prepared."""
    stage, ledger = request.stage, Ledger(request.store)
    console = Console(highlight=False)
    data = [parent for parent in stage.parents if isinstance(parent, DataStage)]
    read = [one for parent in data for one in order_of(parent)]
    needed = [one for one in {one.name: one for one in read}.values() if not ledger.is_done(one)]
    if needed:
        if not request.prepare:
            states = ", ".join(f"{label(one)} is {ledger.state(one)}" for one in needed)
            raise FileNotFoundError(
                f"the data of {label(stage)} is not prepared: {states} in {ledger.store}; add "
                f"--prepare to prepare it now, or run the study: {request.remedy}"
            )

        def tell(note: str) -> None:
            done = sum(ledger.is_done(one) for one in needed) / len(needed)
            channel.progress(f"preparing the data of {label(stage)}", done, note)

        run_preparation(needed, ledger, tell)
    shown = open_stage(stage, ledger)
    if request.row is not None:
        print_row(shown, request.row, request.out, console)
    if request.stats is not None:
        print_stats(shown, request.stats, console)


@dataclass(frozen=True)
class Span:
    """A stretch of text that is all targets or not; `special` for a token that is no text."""

    text: str
    supervised: bool
    special: bool


@dataclass(frozen=True)
class Piece:
    """What stands side by side in a row: an example, or a part of one.

    `parts` are its texts and pictures in their order, these by their number among the row's.
    `continued`: it began in another row. `goes_on`: its end lies elsewhere; `following` is the
    token there that the last position has as its target.
    `left_out`: tokens that were cut off for good, since a row does not hold them.
    """

    where: str
    columns: range
    num_targets: int
    parts: tuple[tuple[Span, ...] | int, ...]
    continued: bool
    goes_on: bool
    following: tuple[Span, ...]
    left_out: int


@dataclass(frozen=True)
class Shown:
    """A stage's plan with what it is made of; `transform` is None where the model sees nothing."""

    name: str
    plan: RowPlan
    sources: Mapping[str, Source]
    codec: TextCodec
    budget: Budget
    num_patches: int = 0
    transform: ImageTransform | None = None


def pieces_of(shown: Shown, index: int) -> tuple[Row, list[Piece]]:
    """Row `index` in arrays and in pieces; every target of the row is a supervised token of one.

    Raises ValueError with both numbers if the plan has no such row.
    """
    plan, codec = shown.plan, shown.codec
    if not 0 <= index < len(plan):
        raise ValueError(
            f"row {index:,} is not in the plan: it has {len(plan):,} rows, 0 to {len(plan) - 1:,}"
        )
    row = build_row(plan, shown.sources, index, shown.num_patches)
    predicted = np.append(False, row.targets[:-1] != IGNORE)
    added = codec.tokenizer.get_added_tokens_decoder()
    specials = {number: token.content for number, token in added.items() if token.special}
    found: list[Piece] = []
    # Where documents see each other, the end of one may have the next one's beginning as target.
    joins, num_pictures = False, 0
    for placed in plan.layout.row(index):
        source = shown.sources[plan.names[placed.source]]
        places, end = source.places_of(placed.example), placed.column + placed.length
        # What a piece in a segment of its own begins with is predicted by nothing.
        predicted[placed.column] &= joins
        parts = list[tuple[Span, ...] | int]()
        for run in runs_of(places, placed.start, placed.length, shown.num_patches):
            if run.picture is not None:
                parts.append(num_pictures)
                num_pictures += 1
                continue
            first = placed.column + run.column
            here = slice(first, first + run.high - run.low)
            marks = predicted[here].tolist()
            parts.append(tuple(_spans(codec, specials, row.input_ids[here].tolist(), marks)))
        length = shown.num_patches * len(places)
        length += len(source.input_ids(placed.example, caption=placed.caption))
        behind = length - placed.start - placed.length
        goes_on = behind > 0 and source.kind in GO_ON
        last = int(row.targets[end - 1])
        following = [last] if goes_on and last != IGNORE else []
        found.append(
            Piece(
                where=source.describe(placed.example, placed.caption),
                columns=range(placed.column, end),
                num_targets=int((row.targets[placed.column : end] != IGNORE).sum()),
                parts=tuple(parts),
                continued=placed.start > 0,
                goes_on=goes_on,
                following=tuple(_spans(codec, specials, following, [True] * len(following))),
                left_out=0 if goes_on else behind,
            )
        )
        joins = plan.layout.sees_all(index) and not goes_on
    return row, found


def _spans(
    codec: TextCodec, specials: Mapping[int, str], ids: Sequence[int], supervised: Sequence[bool]
) -> Iterator[Span]:
    """Neighbours that are targets, or not, as one text; each special token by itself."""
    tokens = list(zip(ids, supervised, strict=True))
    for (mark, special), run in groupby(tokens, key=lambda item: (item[1], specials.get(item[0]))):
        numbers = [token for token, _ in run]
        if special is not None:
            yield from (Span(special, mark, True) for _ in numbers)
        else:
            yield Span(codec.decode(numbers), mark, False)


def open_stage(stage: Trained, ledger: Ledger) -> Shown:
    """Plan a stage whose data is prepared, as its training does."""
    training, encoder = stage.training, stage.model.encoder
    sources = open_sources(stage.data, training.budget.source_names, ledger)
    patches = stage.model.image_tokens
    rows, seed, whole = training.rows, training.seed, stage.model.num_patches
    plan = plan_rows(sources, patches, training.budget, rows, seed, overflow_of(stage), whole)
    codec, transform = open_tokenizer(stage.data, ledger), encoder.transform if encoder else None
    return Shown(label(stage), plan, sources, codec, training.budget, patches, transform)


def print_row(shown: Shown, index: int, out: Path, console: Console) -> None:
    """A row's counts, its pieces and their texts; its pictures go to `out` as PNG files."""
    row, pieces = pieces_of(shown, index)
    rows, plain = shown.plan.rows, not console.is_terminal or console.no_color
    print_line(
        console,
        f"{shown.name}: row {index:,} of {len(shown.plan):,} (0 to {len(shown.plan) - 1:,}), "
        f"{rows.layout}, {rows.row_length:,} positions, {len(pieces)} examples or parts of them, "
        f"{len(row.images)} pictures",
        style="bold",
    )
    _print_counts(row.sources, row.counts, console)
    pictures = _save_pictures(shown, index, row, out)
    for number, piece in enumerate(pieces):
        colour = COLOURS[number % len(COLOURS)]
        print_line(
            console,
            f"\n[{number + 1}] {piece.where}; positions {piece.columns[0]}-{piece.columns[-1]}, "
            f"{piece.num_targets} targets",
            style=f"bold reverse {colour}",
        )
        if piece.continued:
            print_line(console, "(goes on from another row)", style="italic")
        for part in piece.parts:
            if isinstance(part, int):
                line = f"[image {shown.num_patches} positions -> {pictures[part].name}]"
                print_line(console, line, style=colour)
            else:
                console.print(_body(part, colour, plain), soft_wrap=True)
        if piece.left_out:
            text = f"(cut to fit into a row: {piece.left_out:,} tokens are left out)"
            print_line(console, text, style="italic")
        if piece.goes_on:
            note = Text("(cut here, goes on in another row", style="italic")
            if piece.following:
                note.append("; its next token is a target here: ")
                note.append(_body(piece.following, colour, plain))
            console.print(note.append(")"), soft_wrap=True)
    if row.counts.pad:
        print_line(console, f"\n({row.counts.pad} positions of padding)", style="italic")
    if pictures:
        print_line(console, f"\npictures: {', '.join(str(path) for path in pictures)}")


def _body(spans: Sequence[Span], colour: str, plain: bool) -> Text:
    text = Text()
    for supervised, group in groupby(spans, key=lambda span: span.supervised):
        marked = plain and supervised
        text.append(OPEN_MARK if marked else "")
        for span in group:
            style = f"{'bold underline' if supervised else 'dim'} {colour}"
            text.append(harmless(span.text), style + (" reverse" if span.special else ""))
        text.append(CLOSE_MARK if marked else "")
    return text


def _print_counts(sources: Mapping[str, TokenCount], total: TokenCount, console: Console) -> None:
    """Positions by source and kind; `target` counts some of them once more."""
    table = [["source", *KINDS, "share"]]
    for name, counts in [*sources.items(), ("all", total)]:
        cells = [f"{asdict(counts)[kind]:,}" for kind in KINDS]
        table.append([name, *cells, f"{counts.seen / max(total.seen, 1):.4%}"])
    _print_table(table, console)


def _print_table(table: Sequence[Sequence[str]], console: Console) -> None:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print_line(console, "  ".join(cells).rstrip())


def _save_pictures(shown: Shown, index: int, row: Row, out: Path) -> list[Path]:
    """The row's pictures as the encoder sees them, back in 8 bits."""
    saved = []
    for number, (which, example, picture) in enumerate(row.images.tolist()):
        source = shown.sources[shown.plan.names[which]]
        transform = shown.transform
        assert transform is not None
        data = source.image_bytes(example, picture)
        pixels = decode_pixels(data, source.describe(example), transform)
        colours = pixels.transpose(1, 2, 0) * np.array(transform.std) + np.array(transform.mean)
        stream = io.BytesIO()
        Image.fromarray(np.rint(colours * 255).clip(0, 255).astype(np.uint8)).save(stream, "PNG")
        saved.append(out / f"row-{index}-image-{number}.png")
        write_bytes(saved[-1], stream.getvalue())
    return saved


def print_stats(shown: Shown, num_rows: int, console: Console) -> None:
    """The mixture: planned against realised in the whole plan, and what a sample of rows holds.

    The sample is `num_rows` rows, evenly spread over the plan, or all of them if there are fewer.
    """
    plan = shown.plan
    asked = _asked(shown.budget)
    heads = "source kind planned planned_tokens realised_tokens difference share examples epochs"
    table = [[head.replace("_", " ") for head in heads.split()]]
    report = shares_report(plan, shown.sources, shown.num_patches)
    for name, found in report.items():
        planned, realised = found["planned_tokens"], found["realised_tokens"]
        known = planned is not None
        table.append([name, found["kind"], asked[name], f"{planned:,}" if known else "-"])
        table[-1] += [f"{realised:,}", f"{realised - planned:+,}" if known else "-"]
        table[-1] += [f"{realised / plan.seen_tokens:.4%}"]
        table[-1] += [f"{found['examples']:,}", f"{found['epochs']:.4f}"]
    table.append(["all", "", "", "", f"{plan.seen_tokens:,}", "", f"{1:.4%}", "", ""])
    positions = len(plan) * plan.rows.row_length
    print_line(console, f"{shown.name}: {len(plan):,} rows, {plan.rows.layout}", style="bold")
    _print_table(table, console)
    _print_padding("all rows", len(plan), positions - plan.seen_tokens, positions, console)
    for name, found in report.items():
        if (unreduced := found["unreduced"]) is not None:
            planned, realised = unreduced["planned_tokens"], unreduced["realised_tokens"]
            text = f"{name}: {planned:,} tokens planned before the connector's reduction, "
            print_line(console, f"{text}{realised:,} realised ({realised - planned:+,})")
        if (cut := found["cut"])["examples"]:
            text = f"{name}: {cut['examples']:,} of {found['examples']:,} examples are cut to fit "
            left = f"{cut['tokens']:,} tokens are left out"
            if "pieces" in cut:
                left = f"{cut['pieces']:,} pieces of them go on in other rows"
            print_line(console, f"{text}into a row, {left}")
    for quota in plan.quotas:
        if (views := picture_views(quota, shown.sources[quota.name])) is not None:
            print_line(console, f"{quota.name}: {views.words}")

    chosen = min(num_rows, len(plan))
    total, pictured, by_source = TokenCount(), TokenCount(), dict[str, TokenCount]()
    num_pictured = 0
    for number in range(chosen):
        index = number * len(plan) // chosen
        row = build_row(plan, shown.sources, index, shown.num_patches)
        total, by_source = total + row.counts, add_counts([by_source, row.sources])
        if len(row.images):
            num_pictured, pictured = num_pictured + 1, pictured + row.counts
    print_line(console, f"\nsample: {chosen:,} of {len(plan):,} rows, evenly spread", style="bold")
    named = {name: by_source.get(name, TokenCount()) for name in plan.names}
    _print_counts(named, total, console)
    _print_padding("sampled rows", chosen, total.pad, total.total, console)
    _print_padding("of them with a picture", num_pictured, pictured.pad, pictured.total, console)


def _print_padding(what: str, rows: int, pad: int, positions: int, console: Console) -> None:
    share = f", {pad / positions:.4%}" if positions else ""
    print_line(console, f"{what}: {rows:,}; padding {pad:,} of {positions:,} positions{share}")


def _asked(budget: Budget) -> dict[str, str]:
    match budget:
        case Epochs():
            asked = dict.fromkeys(budget.sources, f"{budget.epochs} epochs")
        case Amounts():
            asked = {
                part.source: f"{part.tokens:,} tokens" if part.tokens else f"{part.epochs} epochs"
                for part in budget.amounts
            }
        case Mixture():
            asked = {part.source: f"{part.share:.4%} of {budget.by}" for part in budget.shares}
    return asked | {name: f"{asked[name]}, pool {n:,}" for name, n in budget.pools.items()}


def run_preparation(stages: Sequence[Stage], ledger: Ledger, note: Callable[[str], None]) -> None:
    """Run data stages, parents first, with the store locked; ValueError says why one does not end
    well."""
    # It imports all that trains and evaluates, and most rows are shown without.
    from midstream.work.run_stage import StageRunner

    with launch_lock(ledger.store):
        runner = StageRunner(
            ledger, Machine(workers=1), lambda event: note(event["note"]), lambda: False
        )
        for stage in stages:
            try:
                runner.run(stage)
            except Exception as error:
                told = f"{label(stage)} is not prepared: {type(error).__name__}: {error}"
                raise ValueError(told) from error
