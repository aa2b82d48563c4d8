"""What a result rests on and what that took, read from the store once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from midstream.study.chain import came_from
from midstream.study.ledger import Ledger, State
from midstream.study.stage import (
    Continue,
    DataStage,
    EncoderStage,
    Evaluate,
    Finetune,
    FuseEncoders,
    LoadDecoder,
    LoadModel,
    Pretrain,
    Stage,
)

KINDS = (
    "prepare_world",
    "prepare_tokenizer",
    "prepare_source",
    "train_encoder",
    "load_encoder",
    "fuse_encoders",
    "load_decoder",
    "load_model",
    "pretrain",
    "continue",
    "finetune",
    "evaluate",
)


@dataclass(frozen=True)
class Part:
    """A stage that a result rests on, and the share of its tokens that the result uses.

    `before` are others of its kind: image-text stages that it starts from, towers beside it.
    """

    stage: Stage
    share: float = 1.0
    before: tuple[Stage, ...] = ()


def parts_of(result: Evaluate) -> dict[str, Part]:
    """The stages that one result rests on, by kind, in the order in which they run."""
    parts = {"evaluate": Part(result), **_prepared(result, {})}
    found: tuple[LoadDecoder | LoadModel | Pretrain | Continue | Finetune, float] | None
    found = result.of, result.completion
    while found is not None:
        stage, share = found
        last = parts.get(stage.kind)
        parts[stage.kind] = (
            replace(last, before=(stage, *last.before)) if last else Part(stage, share)
        )
        parts |= _prepared(stage, parts)
        if isinstance(stage, LoadModel | Continue | Finetune) and stage.encoder_stage is not None:
            parts |= _seeing(stage.encoder_stage)
        found = came_from(stage)
    return {kind: parts[kind] for kind in KINDS if kind in parts}


def _prepared(stage: Stage, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The data stages that a stage reads, beside those of `parts`, by kind."""
    added: dict[str, Part] = {}
    for parent in stage.parents:
        if not isinstance(parent, DataStage):
            continue
        last = added.get(parent.kind) or parts.get(parent.kind)
        if last is None:
            added[parent.kind] = Part(parent)
        elif parent.identity not in {one.identity for one in (last.stage, *last.before)}:
            added[parent.kind] = Part(last.stage, before=(*last.before, parent))
    return added


def _seeing(encoder: EncoderStage) -> dict[str, Part]:
    """An encoder's stage and, where it fuses them, its towers', by kind."""
    parts: dict[str, Part] = {encoder.kind: Part(encoder)}
    for tower in encoder.towers if isinstance(encoder, FuseEncoders) else ():
        last = parts.get(tower.kind)
        before = () if last is None else (*last.before, last.stage)
        parts[tower.kind] = Part(tower, before=before)
    return parts


def spent(part: Part, ledger: Ledger) -> tuple[int | None, float | None]:
    """Tokens seen and seconds of the used share of a stage; None where it is not done or has none.

    A share of a text run ends with the first step that reaches it, as its milestones do. Others of
    its kind are added.
    """
    if part.before:
        each = [spent(Part(stage), ledger) for stage in part.before]
        each.append(spent(replace(part, before=()), ledger))
        tokens, seconds = (
            None if None in numbers else sum(numbers) for numbers in zip(*each, strict=True)
        )
        return tokens, seconds
    if not ledger.is_done(part.stage):
        return None, None
    results = ledger.results(part.stage)
    if part.share == 1.0:
        return results.get("tokens_seen"), results["seconds"]
    tokens, seconds = 0, 0.0
    for line in ledger.metrics(part.stage):
        if tokens >= part.share * results["tokens_seen"]:
            break
        tokens, seconds = line["tokens_seen"], seconds + line["seconds"]
    return tokens, seconds


class Snapshot(Ledger):
    """A ledger as it stands when each stage is first asked for; a stage is read once.

    A report asks for the same stage by every line that uses it, and while a study runs its numbers
    must not change half-way down the page.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger.store)
        self._ledger = ledger
        self._states: dict[str, State] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._spent: dict[tuple[str, ...], tuple[int | None, float | None]] = {}

    @classmethod
    def of(cls, ledger: Ledger) -> "Snapshot":
        """The ledger itself where it is a snapshot already."""
        return ledger if isinstance(ledger, Snapshot) else cls(ledger)

    def is_done(self, stage: Stage) -> bool:
        """As of the first look."""
        return self.state(stage) == "done"

    def state(self, stage: Stage) -> State:
        """As of the first look."""
        if stage.identity not in self._states:
            self._states[stage.identity] = self._ledger.state(stage)
        return self._states[stage.identity]

    def results(self, stage: Stage) -> dict[str, Any]:
        """As of the first look."""
        if stage.identity not in self._results:
            self._results[stage.identity] = self._ledger.results(stage)
        return self._results[stage.identity]

    def spent(self, part: Part) -> tuple[int | None, float | None]:
        """As the function `spent`."""
        others = (other.identity for other in part.before)
        place = (part.stage.identity, str(part.share), *others)
        if place not in self._spent:
            self._spent[place] = spent(part, self)
        return self._spent[place]
