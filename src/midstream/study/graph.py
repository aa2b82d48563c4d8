"""The union of a study's stages: their order, what is done, what would run and what it costs."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from midstream.config import PublicFolder
from midstream.study.chain import came_from
from midstream.study.cost import StageCost, cost
from midstream.study.label import labels
from midstream.study.lacking import how_to_have, is_lacking
from midstream.study.ledger import Ledger, State
from midstream.study.stage import (
    Evaluate,
    Imported,
    LoadDecoder,
    LoadEncoder,
    LoadModel,
    PrepareSource,
    Pretrain,
    Stage,
)
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
        return sum((row.cost.flops or 0.0 for row in self.rows), 0.0)

    @property
    def naive_flops(self) -> float:
        """FLOPs if every line ran alone, each text run only up to the milestone it needs."""
        alone = ((row.cost.flops or 0.0) * sum(row.needs.values()) for row in self.rows)
        return sum(alone, 0.0)

    @property
    def text_given(self) -> tuple[float, float]:
        """FLOPs once and for every line alone, if the text runs were there already."""
        rows = [row for row in self.rows if not isinstance(row.stage, Pretrain)]
        once = sum((row.cost.flops or 0.0 for row in rows), 0.0)
        alone = sum(((row.cost.flops or 0.0) * sum(row.needs.values()) for row in rows), 0.0)
        return once, alone

    @property
    def num_expected(self) -> int:
        """Stages whose cost rests on what the recipe expects of its data, or is an estimate."""
        return sum(row.cost.basis == "expected" for row in self.rows)

    @property
    def remaining_flops(self) -> float:
        """FLOPs of the stages that are not done."""
        return sum((row.cost.flops or 0.0 for row in self.to_run), 0.0)


def order(study: AnyStudy) -> tuple[Stage, ...]:
    """The distinct stages of all lines and baselines, parents first, in the study's order.

    Raises ValueError that names the stages of a cycle.
    """
    found: dict[str, Stage] = {}
    for result in study.results:
        _visit(result, found)
    return tuple(found.values())


def order_of(stage: Stage) -> tuple[Stage, ...]:
    """A stage and all that it rests on, parents first."""
    found: dict[str, Stage] = {}
    _visit(stage, found)
    return tuple(found.values())


def missing_inputs(study: AnyStudy) -> tuple[str, ...]:
    """What a study was planned without: data, tokenizers and imported folders, in words."""
    found: dict[str, None] = {}
    for stage in order(study):
        match stage:
            case PrepareSource(world=PublicFolder(fingerprint=None) as world):
                found[f"the data of {world.root}"] = None
            case LoadDecoder(checkpoint=Imported() as model) if is_lacking(model):
                found[f"the language model of {how_to_have(model)}"] = None
            case LoadModel(checkpoint=Imported() as model) if is_lacking(model):
                found[f"the vision-language model of {how_to_have(model)}"] = None
            case LoadEncoder():
                for tower in stage.towers:
                    if is_lacking(tower):
                        found[f"the encoder of {how_to_have(tower)}"] = None
    return tuple(found)


def plan(study: AnyStudy, ledger: Ledger) -> Plan:
    """What running `study` in `ledger` would do; changes nothing.

    Raises ValueError if two lines or baselines have one name.
    """
    needs: dict[str, dict[str, float]] = {}
    # Keyed by identity alone: comparing deeply nested models costs more than all the rest.
    stages: dict[str, Stage] = {}
    for name, result in _named_results(study):
        _visit(result, stages)
        for identity, share in _needs(result).items():
            needs.setdefault(identity, {})[name] = share
    rows = tuple(
        PlanRow(stage, ledger.state(stage), needs[identity], cost(stage, ledger))
        for identity, stage in stages.items()
    )
    return Plan(study, rows)


def _named_results(study: AnyStudy) -> tuple[tuple[str, Evaluate], ...]:
    named = study.named_results
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(f"study {study.name!r} names {twice[0]!r} twice; give each line its name")
    return named


def _visit(stage: Stage, found: dict[str, Stage], above: tuple[Stage, ...] = ()) -> None:
    """Add `stage` behind its parents.

    Fields cannot hold a stage within itself, but a class of a user's own may name any stage among
    its `parents`: ValueError names the stages of a cycle.
    """
    if stage.identity in found:
        return
    path = [one.identity for one in above]
    if stage.identity in path:
        cycle = [*above[path.index(stage.identity) :], stage]
        raise ValueError(
            "a stage waits for itself: "
            + " needs ".join(one.name for one in cycle)
            + "; take one of them out of the other's `parents`"
        )
    for parent in stage.parents:
        _visit(parent, found, (*above, stage))
    found[stage.identity] = stage


def _needs(result: Evaluate) -> dict[str, float]:
    """Which share of each ancestor (and itself) a line needs, by identity."""
    ancestry: dict[str, Stage] = {}
    _visit(result, ancestry)
    shares = dict.fromkeys(ancestry, 1.0)
    for stage in ancestry.values():
        if (before := came_from(stage)) is not None:
            shares[before[0].identity] = before[1]
        if isinstance(stage, Evaluate) and isinstance(stage.of, Pretrain):
            shares[stage.of.identity] = stage.completion
    return shares
