"""What a study asks of its data against what they hold, and how a problem is told.

Of a prepared source everything is known. Of one that is not, what the recipe expects of it is taken
for an estimate, and what speaks against that is doubtful rather than wrong.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.util import find_spec
from math import sqrt
from typing import Any, Literal, get_args

from midstream.config import (
    Caption,
    Mixture,
    PocketWorld,
    PublicFolder,
    TokenizerFile,
    check_caption,
    check_held_apart,
    check_picture,
    check_pool,
)
from midstream.core.identity import SECTIONS, file_sha256, holds_data
from midstream.core.storage import read_json
from midstream.core.tokens import name_some, num_shown
from midstream.cost.known import ids_of, prepared_index
from midstream.order.mixture import needs_of, passes_needed
from midstream.study.label import label
from midstream.study.results import SourceResult
from midstream.study.stages import (
    PLANNED,
    Continue,
    Finetune,
    Prepare,
    PrepareSource,
    PrepareTokenizer,
    PrepareWorld,
    Pretrain,
    Stage,
    Trained,
    TrainEncoder,
    came_from,
    overflow_of,
)
from midstream.study.store import Ledger

# wrong: with the study or its data. lacking: what this machine does not have. Either is refused by
# `run`. doubtful: rests on what the recipe expects of its data; it is told and runs all the same.
Level = Literal["wrong", "lacking", "doubtful"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Problem:
    """What is wrong, how it is put right, and the names of the stages that it concerns.

    Problems of one `key` are one problem; that of the greatest `weight` says it for all.
    """

    what: str
    remedy: str
    stages: tuple[str, ...] = ()
    level: Level = "wrong"
    key: str = ""
    weight: float | int = 0

    @classmethod
    def of(cls, reason: Exception | str, remedy: str = "", *stages: str) -> "Problem":
        """An error's text, whose remedy stands behind a semicolon or is the one given."""
        what, _, own = str(reason).partition("; ")
        return cls(what, own or remedy, stages)

    def __str__(self) -> str:
        where = f" [{name_some(self.stages, 1)}]" if self.stages else ""
        return f"{self.what}; {self.remedy}{where}"


def merged(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """One problem for all of a key (of a text, where there is none), the gravest level first."""
    found: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        key = (problem.level, problem.key or f"{problem.what}; {problem.remedy}")
        other = found.get(key, problem)
        stages = tuple(dict.fromkeys((*other.stages, *problem.stages)))
        graver = problem if problem.weight > other.weight else other
        found[key] = replace(graver, stages=stages)
    return tuple(sorted(found.values(), key=lambda problem: LEVELS.index(problem.level)))


def refused(found: Sequence[Problem]) -> tuple[Problem, ...]:
    """Those that keep `run` from starting."""
    return tuple(problem for problem in found if problem.level != "doubtful")


@dataclass(frozen=True)
class Counted:
    """A source as far as it is known; `tokens` without patches, `images` as its examples show them.

    `longest` is, of examples by their pictures (`shown_name`), the longest one's tokens and where
    it stands. `captions` counts the examples with each kind of caption, None where
    nobody did; `seen` has these numbers for captions that are not a picture's own. `expected`:
    nothing was counted, the recipe says so.
    """

    kind: str
    tokens: int
    examples: int
    images: int
    longest: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    captions: Mapping[str, int] | None = None
    seen: Mapping[str, Any] = field(default_factory=dict)
    expected: bool = False

    def with_caption(self, caption: Caption) -> "Counted":
        """The source as it is seen with this caption of each picture."""
        if (other := self.seen.get(caption)) is None:
            return self
        return replace(
            self, tokens=round(other["num_tokens"]), longest=_longest_of(other.get("longest", {}))
        )


def data_problems(stages: Iterable[Stage], ledger: Ledger) -> Iterator[Problem]:
    """What the stages ask of their data that these do not hold."""
    for stage in stages:
        found: Iterable[Problem] = ()
        match stage:
            case PrepareSource():
                found = (*_folder(stage), *_prepared(stage))
            case PrepareWorld():
                found = _folder(stage)
            case PrepareTokenizer():
                found = _tokenizer(stage)
            case TrainEncoder():
                found = _encoder_data(stage, ledger)
            case Pretrain() | Continue() | Finetune():
                found = _training_data(stage, ledger)
        yield from (replace(problem, stages=(label(stage),)) for problem in found)


def counted(source: PrepareSource, ledger: Ledger) -> Counted | None:
    """What is known of a source before, or after, it is prepared; None where nothing is."""
    is_done, index = ledger.is_done(source), prepared_index(source)
    if is_done:
        held = dict(ledger.result(source, SourceResult))
    elif index is not None:
        found = read_json(index)
        held = found | {f"num_{name}": number for name, number in found["train"].items()}
    elif source.expected is not None:
        held = dict(source.expected)
    else:
        return None
    return Counted(
        held["kind"],
        round(held["num_tokens"]),
        held["num_examples"],
        held["num_images"],
        longest=_longest_of(held.get("longest", {})),
        captions=held.get("captions"),
        seen=held.get("seen", {}),
        expected=not is_done and index is None,
    )


def _longest_of(longest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Where nobody says which example it is, it is the longest one."""
    return {
        shown: (one, "its longest example")
        if isinstance(one, int)
        else (one["tokens"], one["where"])
        for shown, one in longest.items()
    }


def _folder(stage: PrepareSource | PrepareWorld) -> Iterator[Problem]:
    """A folder that was there when the study was planned."""
    world = stage.world
    if isinstance(world, PocketWorld) or world.fingerprint is None:
        return
    if not world.root.is_dir():
        yield Problem(f"data folder {world.root} does not exist", "give the folder that holds it")
    elif isinstance(stage, PrepareSource) and isinstance(world, PublicFolder):
        for section, kind in SECTIONS.items():
            folder = world.root / section / stage.source
            if folder.is_dir() and not holds_data(folder):
                what = f"{folder} holds no file that a source of {kind} is read from"
                yield Problem(
                    what, "put files of its formats there (docs/data.md), or leave it out"
                )


def _prepared(stage: PrepareSource) -> Iterator[Problem]:
    """What `data/prepare.py` refuses of a prepared source, as far as its index tells."""
    if (path := prepared_index(stage)) is None:
        return
    folder, index = path.parent, read_json(path)
    if index["kind"] != (kind := SECTIONS[folder.parent.name]):
        what = f"{folder} is prepared as {index['kind']} and lies among the sources of {kind}"
        yield Problem(what, "move it to their folder")
    have, tokenizer = index["tokenizer"]["vocab_size"], stage.tokenizer.tokenizer
    if (size := ids_of(tokenizer)) is None:
        return
    told, differs = f"trained to {size:,} ids", have > size
    if isinstance(tokenizer, TokenizerFile):
        told, differs = f"{tokenizer.path} with {size:,} ids", have != size
    if differs:
        yield Problem(
            f"{folder} is prepared with a tokenizer of {have:,} ids, the study's is {told}",
            f"prepare it with that one, or plan with the file {folder / 'tokenizer.json'}",
        )


def _tokenizer(stage: PrepareTokenizer) -> Iterator[Problem]:
    tokenizer = stage.tokenizer
    if not isinstance(tokenizer, TokenizerFile) or tokenizer.sha256.startswith(PLANNED):
        return
    path = tokenizer.path
    if not path.is_file():
        yield Problem(f"tokenizer file {path} does not exist", "give its path")
    elif file_sha256(path) != tokenizer.sha256:
        yield Problem(f"{path} has another sha256 than the plan says", "plan again")
    elif tokenizer.begin_of_text is None and TokenizerFile.read(path).begin_of_text is not None:
        yield Problem(
            f"{path} begins each text with a token by its own rule, and the study does not say so",
            "make it with TokenizerFile.read(path), or give begin_of_text",
        )


def _absent(name: str, data: Prepare) -> Iterator[Problem]:
    world = data.world
    names = world.source_names or tuple(source.name for source in data.expected)
    if not names or name in names:
        return
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    add = f", or put its folder into {world.root}" if isinstance(world, PublicFolder) else ""
    remedy = f"choose from {', '.join(sorted(names))}{add}"
    yield Problem(f"no source {name!r} in the data{hint}", remedy)


def _encoder_data(stage: TrainEncoder, ledger: Ledger) -> Iterator[Problem]:
    training = stage.training
    yield from _absent(training.source, stage.data)
    source = counted(stage.data.source(training.source), ledger)
    if source is None:
        return
    yield from _captions(training.source, training.caption, source)
    try:
        check_held_apart(training.source, source.examples, training.batch_images)
    except ValueError as reason:
        yield replace(Problem.of(reason), level="doubtful" if source.expected else "wrong")
    for tokens, where in source.with_caption(training.caption).longest.values():
        # The separator before a caption is not given to the tower.
        if (length := tokens - 1) > training.max_text_tokens:
            yield Problem(
                f"source {training.source!r}, {where}: the caption has {length} tokens, "
                f"the text tower takes {training.max_text_tokens}",
                "raise max_text_tokens",
            )


def _training_data(stage: Trained, ledger: Ledger) -> Iterator[Problem]:
    budget, patches = stage.training.budget, stage.model.image_tokens
    names = budget.source_names
    sources = {}
    for name, caption in budget.captions.items():
        yield from _absent(name, stage.data)
        if (source := counted(stage.data.source(name), ledger)) is None:
            continue
        yield from _captions(name, caption, source)
        sources[name] = source.with_caption(caption)
        yield from _longest(name, sources[name], patches, stage)
    yield from _budget(sources, patches, stage)
    whole = [name for name, source in sources.items() if source.kind != "text"]
    if stage.training.rows.layout == "joined" and whole:
        what = f"the joined layout is for text only, {', '.join(whole)} are none"
        yield Problem(what, "choose filled or padded")
    blind = len(sources) == len(names) and not any(one.images for one in sources.values())
    if stage.training.freeze_decoder and blind:
        who = f"the decoder is frozen and {', '.join(names)} hold no picture"
        yield Problem(f"{who}, so that nothing would be learnt", "add a source that does")
    if stage.training.lora is not None and find_spec("peft") is None:
        yield Problem("lora is given, and peft is not installed", 'pip install "midstream[lora]"')
    if isinstance(stage, Pretrain | Continue) and came_from(stage) is None:
        yield from _vocabulary(stage)


def _vocabulary(stage: Pretrain | Continue) -> Iterator[Problem]:
    """Ids that a decoder which begins anew has no row for."""
    tokenizer, size = stage.data.tokenizer, stage.decoder.vocab_size
    if (number := ids_of(tokenizer)) is None or number <= size:
        return
    told, remedy = "the tokenizer is trained to", ", or lower the tokenizer's"
    if isinstance(tokenizer, TokenizerFile):
        told, remedy = f"with the separator {tokenizer.path} has", " to that"
    what = f"{told} {number:,} ids, the decoder has {size:,}"
    yield Problem(what, f"raise the decoder's vocab_size{remedy}")


def _budget(sources: Mapping[str, Counted], patches: int, stage: Trained) -> Iterator[Problem]:
    training = stage.training
    if isinstance(training.budget, Mixture) and training.budget.by == "patches":
        patches = stage.model.num_patches
    texts = {name for name, source in sources.items() if source.kind == "text"}
    needs = needs_of(training.budget, training.rows.row_length, texts)
    if not any(need.amount for need in needs):
        yield Problem(
            f"a budget of less than a sequence of {training.rows.row_length:,} tokens holds none",
            f"raise total_tokens to {training.rows.row_length:,} at least",
        )
    for need in needs:
        if (source := sources.get(need.source)) is None:
            continue
        tokens, examples = source.tokens + patches * source.images, source.examples
        level: Level = "doubtful" if source.expected else "wrong"
        pool, pooled, doubt = training.budget.pools.get(need.source), "", 0
        if pool is not None:
            try:
                check_pool(need.source, source.kind, pool, examples)
            except ValueError as reason:
                yield replace(Problem.of(reason), level=level)
                continue
            if pool < examples:
                # The captions of a part may miss what they hold on average by three standard
                # errors of lengths that spread as far as their mean.
                part = source.tokens * pool // examples
                doubt = min(part // 2, round(3 * part / sqrt(pool)))
            tokens, examples, pooled = tokens * pool // examples, pool, f"the pool of {pool:,} of "
        if not source.examples or not tokens:
            what = f"source {need.source!r} holds no example"
            yield Problem(what, "leave it out", level=level)
        passes, at_most = (
            passes_needed(need, training.budget, tokens=tokens + more, examples=examples)
            for more in (-doubt, doubt)
        )
        if passes is None or not tokens:
            continue
        have = tokens if need.unit == "tokens" else examples
        if at_most is None:
            level = "doubtful"
        is_guess = source.expected or (doubt and need.unit == "tokens")
        holds = "is expected to hold" if is_guess else "holds"
        counted = f", {patches} patches a picture among them" if patches and source.images else ""
        yield Problem(
            f"{pooled}source {need.source!r} {holds} {have:,} {need.unit}{counted}, the plan needs "
            f"{need.amount:,}",
            f"raise max_epochs to {passes:,} or lower the budget",
            level=level,
            key=f"budget {stage.data.source(need.source).name} {patches} {pooled}".rstrip(),
            weight=passes,
        )


def _longest(name: str, source: Counted, patches: int, stage: Trained) -> Iterator[Problem]:
    rows = stage.training.rows
    document = source.kind == "interleaved"
    if source.images:
        # The same as `data/lengths.py` refuses once the source is prepared.
        tokenizer = stage.data.tokenizer
        begins = isinstance(tokenizer, TokenizerFile) and bool(tokenizer.begin_of_text)
        try:
            check_picture(name, patches + (begins and not document), rows.row_length)
        except ValueError as reason:
            yield Problem.of(reason)
            return
    # Documents go on in other filled rows.
    cut = rows.layout == "filled" if document else overflow_of(stage) == "cut"
    if source.kind == "text" or cut:
        return
    for shown, (tokens, where) in source.longest.items():
        length = tokens + patches * num_shown(shown)
        if length > rows.row_length:
            yield Problem(
                f"source {name!r}, {where}: {length} positions do not fit into a row of "
                f"{rows.row_length}",
                "raise row_length, "
                + ("choose filled rows, " if document else "")
                + "or leave such records out (midstream prepare --max-tokens)",
                key=f"longest {stage.data.source(name).name} {rows.row_length}",
                weight=length,
            )


def _captions(name: str, asked: Caption, source: Counted) -> Iterator[Problem]:
    if source.captions is not None:
        try:
            check_caption(name, source.kind, asked, source.captions, source.examples)
        except ValueError as reason:
            yield Problem.of(reason)
