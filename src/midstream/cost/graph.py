"""The stages of a study as one graph, and those of a store with the kept studies that need them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from pydantic import ValidationError

from midstream.config import PublicFolder
from midstream.core.identity import FORMAT_VERSION
from midstream.core.storage import CorruptError, read_json, remove_folder, require_writable, verify
from midstream.cost.cost import StageCost, cost
from midstream.cost.questions import Sizes
from midstream.study.imported import how_to_have, is_lacking
from midstream.study.label import digits_of, joined, labels, shortest, words
from midstream.study.results import RESULTS, checked
from midstream.study.stages import (
    Evaluate,
    LoadDecoder,
    LoadEncoder,
    LoadModel,
    PrepareSource,
    Pretrain,
    Stage,
    came_from,
    stage_from_json,
)
from midstream.study.store import Ledger, State, launch_lock
from midstream.study.studies import AnyStudy


@dataclass(frozen=True)
class PlanRow:
    """One distinct stage of a study.

    `lines` names the lines and baselines that use it; `needs` says which share of it each of them
    would compute alone (below 1 for a text run that a line leaves at a milestone).
    """

    stage: Stage
    state: State
    needs: dict[str, float]
    cost: StageCost

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines and baselines that use the stage, in the study's order."""
        return tuple(self.needs)


@dataclass(frozen=True)
class Plan:
    """A study against a ledger: its distinct stages, parents first."""

    study: AnyStudy
    rows: tuple[PlanRow, ...]

    @cached_property
    def labels(self) -> dict[str, str]:
        """By folder name, what each stage is called."""
        return labels([row.stage for row in self.rows])

    @property
    def to_run(self) -> tuple[PlanRow, ...]:
        """The rows that are not done."""
        return tuple(row for row in self.rows if row.state != "done")

    @property
    def num_done(self) -> int:
        """Stages with a success mark."""
        return len(self.rows) - len(self.to_run)

    @property
    def num_shared(self) -> int:
        """Stages that more than one line uses."""
        return sum(len(row.lines) > 1 for row in self.rows)

    @property
    def num_unknown(self) -> int:
        """Stages whose cost is unknown until their data is prepared; the sums leave them out."""
        return sum(row.cost.flops is None for row in self.rows)

    @property
    def num_alone(self) -> int:
        """Stages that would run if every line ran alone."""
        return sum(len(row.lines) for row in self.rows)

    @property
    def shared_flops(self) -> float:
        """FLOPs with every stage run once."""
        return _flops(self.rows)[0]

    @property
    def naive_flops(self) -> float:
        """FLOPs if every line ran alone, each text run only up to the milestone it needs."""
        return _flops(self.rows)[1]

    @property
    def model_flops(self) -> tuple[float, float]:
        """Model FLOPs once and for every line alone: what hours follow from."""
        return _flops(self.rows, "model_flops")

    @property
    def text_given(self) -> tuple[float, float]:
        """FLOPs once and for every line alone, if the text runs were there already."""
        return _flops([row for row in self.rows if not isinstance(row.stage, Pretrain)])

    @property
    def num_expected(self) -> int:
        """Stages whose cost rests on what the recipe expects of its data, or is an estimate."""
        return sum(row.cost.basis == "expected" for row in self.rows)

    @property
    def remaining_flops(self) -> float:
        """FLOPs of the stages that are not done."""
        return _flops(self.to_run)[0]


def _flops(rows: Sequence[PlanRow], of: str = "flops") -> tuple[float, float]:
    """FLOPs of stages once, and for every line alone."""
    flops = [(getattr(row.cost, of) or 0.0, sum(row.needs.values())) for row in rows]
    return sum((each for each, _ in flops), 0.0), sum((each * uses for each, uses in flops), 0.0)


def order(study: AnyStudy) -> tuple[Stage, ...]:
    """The distinct stages of all lines and baselines, parents first, in the study's order."""
    return order_of(*study.results)


def order_of(*stages: Stage) -> tuple[Stage, ...]:
    """Stages and all that they rest on, parents first."""
    found: dict[str, Stage] = {}
    for stage in stages:
        _visit(stage, found)
    return tuple(found.values())


def missing_inputs(study: AnyStudy) -> tuple[str, ...]:
    """What a study was planned without: data, tokenizers and imported folders, in words."""
    found: dict[str, None] = {}
    for stage in order(study):
        match stage:
            case PrepareSource(world=PublicFolder(fingerprint=None) as world):
                found[f"the data of {world.root}"] = None
            case LoadDecoder() | LoadModel():
                what = "language" if isinstance(stage, LoadDecoder) else "vision-language"
                if is_lacking(stage.checkpoint):
                    found[f"the {what} model of {how_to_have(stage.checkpoint)}"] = None
            case LoadEncoder():
                for tower in filter(is_lacking, stage.towers):
                    found[f"the encoder of {how_to_have(tower)}"] = None
    return tuple(found)


def plan(study: AnyStudy, ledger: Ledger, sizes: Sizes = MappingProxyType({})) -> Plan:
    """What running `study` in `ledger` would do; changes nothing. `sizes` of benchmarks were read
    beside what the store knows of them.

    Raises ValueError if two lines or baselines have one name.
    """
    needs: dict[str, dict[str, float]] = {}
    # Keyed by identity alone: comparing deeply nested models costs more than all the rest.
    stages: dict[str, Stage] = {}
    named = study.named_results
    if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
        raise ValueError(
            f"study {study.name!r} names {twice[0]!r} twice; give each line its own name, and "
            "each seed and place once"
        )
    for name, result in named:
        _visit(result, stages)
        for identity, share in _needs(result).items():
            needs.setdefault(identity, {})[name] = share
    rows = tuple(
        PlanRow(stage, ledger.state(stage), needs[identity], cost(stage, ledger, sizes=sizes))
        for identity, stage in stages.items()
    )
    return Plan(study, rows)


def _visit(stage: Stage, found: dict[str, Stage]) -> None:
    """Add `stage` behind its parents."""
    if stage.identity not in found:
        for parent in stage.parents:
            _visit(parent, found)
        found[stage.identity] = stage


def _needs(result: Evaluate) -> dict[str, float]:
    """Which share of each ancestor (and itself) a line needs, by identity."""
    ancestry = order_of(result)
    shares = dict.fromkeys((stage.identity for stage in ancestry), 1.0)
    for stage in ancestry:
        if (before := came_from(stage)) is not None:
            shares[before[0].identity] = before[1]
        if isinstance(stage, Evaluate) and isinstance(stage.of, Pretrain):
            shares[stage.of.identity] = stage.completion
    return shares


@dataclass(frozen=True)
class StoredStage:
    """A stage's folder, what the stage is called, its state, the bytes of its files, and the kept
    studies that need it.

    `state` is "unreadable" for a folder whose stage.json this version cannot read, and "stale" for
    one that it would give another name: made before an option was added, it is not used any more.
    """

    name: str
    label: str
    kind: str
    state: str
    num_bytes: int
    studies: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """What `check` looked at, and what is wrong: (stage's label, what)."""

    num_stages: int
    num_folders: int
    num_bytes: int
    problems: tuple[tuple[str, str], ...]


def stored_stages(ledger: Ledger) -> list[StoredStage]:
    """Every stage's folder in the store, in the order of their names.

    Raises FileNotFoundError for a store that does not exist, ValueError for a kept study that
    cannot be read: what it needs is then unknown.
    """
    if not ledger.store.is_dir():
        raise FileNotFoundError(f"store {ledger.store} does not exist; give another --store")
    needs = _users(ledger)
    found = []
    folders = [path.parent for path in sorted(ledger.store.glob("*/stage.json"))]
    length = shortest([digits_of(folder.name) for folder in folders])
    for folder in folders:
        kind: str
        state: str
        try:
            stage = stage_from_json((folder / "stage.json").read_bytes())
            kind, text = stage.kind, words(stage)
            state = ledger.state(stage) if stage.name == folder.name else "stale"
        except ValidationError:
            kind, state = folder.name.rpartition("-")[0], "unreadable"
            text = kind
        label = joined(text, digits_of(folder.name), length)
        lines = needs.get(folder.name, ())
        found.append(StoredStage(folder.name, label, kind, state, _bytes(folder), lines))
    return found


def other_bytes(ledger: Ledger) -> dict[str, int]:
    """The bytes of what is no stage: features of pictures, reports, kept studies."""
    return {
        name: _bytes(ledger.store / name)
        for name in ("features", "reports", "studies")
        if (ledger.store / name).is_dir()
    }


def removable(ledger: Ledger, names: Sequence[str]) -> list[StoredStage]:
    """The stages of these folders.

    Raises ValueError for a name that is no stage here, a stage that a kept study needs, or one
    that runs.
    """
    by_name = {stage.name: stage for stage in stored_stages(ledger)}
    for name in names:
        if name not in by_name:
            raise ValueError(f"{ledger.store} has no stage {name!r}; see midstream store ls")
        stage = by_name[name]
        if stage.studies:
            raise ValueError(
                f"{stage.label} is needed by {', '.join(stage.studies)}; forget that study first "
                "(midstream store forget)"
            )
        if stage.state == "running":
            raise ValueError(f"{stage.label} is running; wait until it ends, or stop it")
    return [by_name[name] for name in names]


def remove_stages(ledger: Ledger, names: Sequence[str]) -> int:
    """Delete stages by their folders' names; returns the bytes.

    No launcher may use the store meanwhile. Raises as `removable`, with nothing deleted.
    """
    stages = removable(ledger, names)
    require_writable(ledger.store)
    with launch_lock(ledger.store):
        for name in names:
            remove_folder(ledger.store / name)
    return sum(stage.num_bytes for stage in stages)


def unneeded(ledger: Ledger) -> list[StoredStage]:
    """The stages that no kept study needs and that do not run."""
    return [
        stage for stage in stored_stages(ledger) if not stage.studies and stage.state != "running"
    ]


def forget_study(ledger: Ledger, name: str) -> None:
    """Stop keeping a study; its stages stay until they are removed.

    Raises FileNotFoundError that lists the studies there are.
    """
    if name not in ledger.study_names():
        ledger.load_study(name)
    (ledger.store / "studies" / f"{name}.json").unlink()


def check(ledger: Ledger) -> Checked:
    """Read every file that a manifest lists, in every stage that is done, and its results."""
    problems: list[tuple[str, str]] = []
    num_folders, num_bytes, stages = 0, 0, stored_stages(ledger)
    done = [stage for stage in stages if stage.state == "done"]
    for stage in done:
        folder = ledger.store / stage.name
        try:
            path = folder / "results.json"
            unknown = checked(RESULTS[stage.kind], read_json(path), path).unknown_keys()
            if unknown:
                text = f"results.json has keys of another version: {', '.join(unknown)}"
                problems.append((stage.label, text))
        except (OSError, ValueError) as error:
            problems.append((stage.label, f"results.json cannot be read: {error}"))
        for manifest in sorted(folder.rglob("manifest.json")):
            num_folders, num_bytes = num_folders + 1, num_bytes + _bytes(manifest.parent)
            try:
                verify(manifest.parent)
            except CorruptError as error:
                problems.append((stage.label, str(error)))
    problems += [
        (stage.label, "stage.json is of another version of Midstream, or broken")
        for stage in stages
        if stage.state == "unreadable"
    ]
    return Checked(len(done), num_folders, num_bytes, tuple(problems))


def older_stages(ledger: Ledger) -> str | None:
    """What is said of a store in which an earlier version has worked; None for any other.

    Up to format 4 the data of a study was one stage, whose folder no later version makes.
    """
    if next(ledger.store.glob("prepare-*/stage.json"), None) is None:
        return None
    return (
        f"store {ledger.store} holds stages of an earlier version of Midstream (format 4 or less, "
        f"this one writes {FORMAT_VERSION}), which are not used: give another --store, or delete "
        "them (midstream store rm --unneeded)"
    )


def _users(ledger: Ledger) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in ledger.study_names():
        try:
            study = ledger.load_study(name)
        except ValueError:
            raise ValueError(
                f"study {name} in {ledger.store / 'studies'} is of another version, so that nobody "
                "knows what it needs; forget it, or use that version"
            ) from None
        for stage in order(study):
            found[stage.name] = (*found.get(stage.name, ()), name)
    return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
