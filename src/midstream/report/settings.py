"""What a study was run with, in one line: data, sizes, tokens, repetitions."""

from collections.abc import Iterable

from midstream.config import Epochs, Mixture, PocketWorld, PublicFolder, SmallReal
from midstream.quantities import counted
from midstream.report.parts import Snapshot, parts_of
from midstream.report.words import engineering, place
from midstream.study.cost import encoder_parameters
from midstream.study.ledger import Ledger
from midstream.study.stage import Continue, Finetune, Pretrain, Stage
from midstream.study.studies import Study

TOKENS = {"pretrain": "text", "continue": "image-text", "finetune": "fine-tuning"}


def settings_line(study: Study, ledger: Ledger) -> str:
    """Data, parameters, tokens of each kind of stage (as planned), seeds and what is asked."""
    ledger = Snapshot.of(ledger)
    stages: dict[str, dict[str, Stage]] = {}
    for line in study.lines:
        for kind, part in parts_of(line.result).items():
            for stage in (*part.before, part.stage):
                stages.setdefault(kind, {})[stage.identity] = stage
    lines = [line.result.of for line in study.lines]
    said = [_join(_world(model.data.world) for model in lines)]
    said.append(f"decoder of {_range(m.model.decoder.num_parameters for m in lines)} parameters")
    towers = [m.model.encoder for m in lines if m.model.encoder is not None]
    if towers:
        said.append(f"encoder of {_range(encoder_parameters(tower) for tower in towers)}")
    for kind, name in TOKENS.items():
        words = _budgets(name, list(stages.get(kind, {}).values()))
        said += [words] if words else []
    seeds = {line.axes["seed"] for line in study.lines if "seed" in line.axes}
    repeated = f", {counted(len(seeds), 'seed')}" if seeds else ""
    said.append(counted(len(study.lines), "line") + repeated)
    return "; ".join(said)


def generated_data(study: Study) -> bool:
    """Whether a line of the study rests on the generated pocket world."""
    return any(isinstance(line.result.of.data.world, PocketWorld) for line in study.lines)


def _world(world: PocketWorld | SmallReal | PublicFolder) -> str:
    if isinstance(world, PocketWorld):
        return "a generated pocket world"
    return "small real data sets" if isinstance(world, SmallReal) else f"data {world.root.name}"


def _budgets(name: str, stages: list[Stage]) -> str:
    tokens, epochs, unknown = [], [], False
    for stage in stages:
        if not isinstance(stage, Pretrain | Continue | Finetune):
            continue
        budget = stage.training.budget
        if isinstance(budget, Epochs):
            epochs.append(budget.epochs)
        elif isinstance(budget, Mixture):
            tokens.append(budget.total_tokens)
        else:
            unknown = True
    words = [f"{_range(tokens)} {name} tokens"] if tokens else []
    if epochs:
        low, high = min(epochs), max(epochs)
        span = place(low) if low == high else f"{place(low)} to {place(high)}"
        words.append(f"{span} {name} {'epoch' if high == 1 else 'epochs'}")
    if unknown:
        words.append(f"{name} by amounts")
    return ", ".join(words)


def _range(values: Iterable[float | int]) -> str:
    found = sorted(set(values))
    if not found:
        return "none"
    ends = [engineering(found[0]), engineering(found[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _join(words: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(words)) or "no data"
