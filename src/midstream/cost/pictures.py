"""What keeping a frozen encoder's outputs on disk would cost and save, before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import expm1, log1p, prod
from pathlib import Path
from typing import Any, Literal

from midstream.config import (
    AnyEncoderConfig,
    EncoderConfig,
    Epochs,
    FusedEncoder,
    Machine,
    Mixture,
    PretrainedEncoder,
    ShareUnit,
)
from midstream.config.model import encoder_flops, picture_bytes
from midstream.core.identity import digest
from midstream.core.tokens import quantity, rounded, span
from midstream.cost.cost import StageCost, cost, images_seen
from midstream.cost.known import Facts, Number, sources_of
from midstream.cost.workload import taken
from midstream.study.label import label
from midstream.study.results import WeightsResult
from midstream.study.stages import Continue, EncoderStage, Finetune, Stage
from midstream.study.store import Ledger

# Stored features pay where each picture would be encoded this often at least, on average: below it
# writing and reading back cost more than the encoder.
LEAST_VIEWS = 1.5
# Raise it when equal weights, configuration and picture give other features than before, such as
# with another way to decode or another shape of the encoder's batches.
FEATURE_FORMAT = 1

Seeing = Continue | Finetune
Draw = tuple[int, Literal["permutation", "replacement"], Number]


@dataclass(frozen=True)
class Choice:
    """Whether features are stored or computed anew each time, and why, in words."""

    decision: Literal["stored", "live", "unknown"]
    reason: str


@dataclass(frozen=True)
class FeaturePlan:
    """One encoder on the pictures of a study, over the stages that are not done and show it
    pictures of one size; `config` is the encoder there.

    pictures: distinct ones that they see; views: how often they see one; kept: pictures whose
    features the store has already. Counts are None until the data is prepared. FLOPs of encoding
    are forward passes; `training_flops` is all that these stages compute with live features.
    """

    encoder: EncoderStage
    config: PretrainedEncoder
    pictures: Number | None
    views: Number | None
    kept: int
    training_flops: Number | None
    choice: Choice

    @property
    def missing(self) -> Number | None:
        """Pictures whose features are not kept yet."""
        return None if self.pictures is None else max(0.0, self.pictures - self.kept)

    @property
    def store_bytes(self) -> Number | None:
        """What the store holds once all pictures are in it."""
        held = None if self.pictures is None else max(self.pictures, self.kept)
        return _times(held, picture_bytes(self.config))

    @property
    def new_bytes(self) -> Number | None:
        """What storing adds to what the store holds already."""
        return _times(self.missing, picture_bytes(self.config))

    @property
    def live_flops(self) -> Number | None:
        """Encoding every picture each time it is seen."""
        return _times(self.views, encoder_flops(self.config))

    @property
    def stored_flops(self) -> Number | None:
        """Encoding every picture that is not kept yet once."""
        return _times(self.missing, encoder_flops(self.config))

    @property
    def saved_fraction(self) -> Number | None:
        """Share of the training FLOPs that storing saves; below 0 where it costs more."""
        if self.live_flops is None or self.stored_flops is None or not self.training_flops:
            return None
        return (self.live_flops - self.stored_flops) / self.training_flops

    def values(self) -> dict[str, Any]:
        """The plan as plain values."""
        names = ("pictures", "views", "kept", "store_bytes", "live_flops", "stored_flops")
        return {
            "encoder": self.encoder.name,
            "decision": self.choice.decision,
            "reason": self.choice.reason,
            "training_flops": self.training_flops,
            "saved_fraction": self.saved_fraction,
        } | {name: getattr(self, name) for name in names}

    def sentence(self) -> str:
        """One line for a reader."""
        config = self.config
        text = (
            f"features of {label(self.encoder)} ({config.num_patches} x {config.hidden_size} "
            f"{config.feature_dtype}): {self.choice.decision}, {self.choice.reason}"
        )
        if self.pictures is None or self.views is None:
            return text

        def flops(value: Number | None) -> str:
            # 5.07 TFLOPs, but 0 FLOPs.
            return f"{quantity(value)}{'' if (value or 0) >= 1e3 else ' '}FLOPs"

        saved = "" if self.saved_fraction is None else f" ({100 * self.saved_fraction:.1f} % saved)"
        return (
            f"{text}. {quantity(self.pictures)} pictures ({quantity(self.kept)} kept already), "
            f"{quantity(self.views)} views; encoding takes {flops(self.live_flops)} live, "
            f"{flops(self.stored_flops)} stored, of {flops(self.training_flops)} of training{saved}"
        )


def _times(count: Number | None, each: Number) -> Number | None:
    return None if count is None else count * each


def feature_folder(
    ledger: Ledger, encoder: EncoderStage, seen: AnyEncoderConfig | None = None
) -> Path | None:
    """Where the features of an encoder lie in the store, on pictures of its own size or, `seen`, of
    another; None until it is there.

    Encoders with equal weights and configuration share a folder, whatever else they say.
    """
    if not ledger.is_done(encoder):
        return None
    weights = ledger.result(encoder, WeightsResult).weights_digest
    return ledger.store / "features" / digest([FEATURE_FORMAT, weights, seen or encoder.encoder])


def choose(
    *, pictures: Number, views: Number, kept: int, picture_bytes: int, machine: Machine
) -> Choice:
    """Stored or live, by `machine.features`; auto stores where it saves and fits.

    `pictures` are distinct, `kept` how many of them are stored already, `views` how often one is
    seen. Stored if each picture that is missing would be seen LEAST_VIEWS times at least and all
    of them take at most `machine.max_feature_gib`.
    """
    gib = max(pictures, kept) * picture_bytes / 2**30
    size = f"{rounded(gib)} GiB on disk (at most {machine.max_feature_gib:g})"
    if machine.features != "auto":
        return Choice(machine.features, f"as the machine says; {size}")
    missing = max(0.0, pictures - kept)
    often = views / missing if missing else 0.0
    if missing and often < LEAST_VIEWS:
        return Choice(
            "live",
            f"each picture would be seen {often:.2f} times, storing pays from {LEAST_VIEWS:g} on",
        )
    if gib > machine.max_feature_gib:
        return Choice("live", f"they would take {size}; raise max_feature_gib to store them")
    if not missing:
        return Choice("stored", f"nothing is left to compute; {size}")
    return Choice(
        "stored",
        f"each picture is seen {often:.2f} times and computed once ({LEAST_VIEWS:g} pay); {size}",
    )


def feature_plan(
    stages: Sequence[Stage],
    ledger: Ledger,
    machine: Machine,
    costs: Mapping[str, StageCost] | None = None,
) -> list[FeaturePlan]:
    """For each frozen encoder: what storing what it makes of pictures costs and saves.

    `stages` are a study's (`graph.order`), `costs` theirs by name where they are known; those that
    are done count no more. Stages with one seed
    see the same first pictures of a source; those with different seeds are taken to draw
    independently. A picture that several examples share counts once for each until all are seen, so
    that a store is at most as large as said here and saves at least as much.
    """
    groups: dict[tuple[str, int], list[Seeing]] = {}
    for stage in stages:
        if (encoder := frozen_encoder(stage)) is not None and not ledger.is_done(stage):
            assert isinstance(stage, Continue | Finetune), "only these see"
            key = (encoder.identity, _seen(stage).image_size)
            groups.setdefault(key, []).append(stage)
    return [_plan_of(group, ledger, machine, costs or {}) for group in groups.values()]


def choice_for(stage: Stage, plans: Sequence[FeaturePlan]) -> Choice | None:
    """The choice of the plan that a stage falls under; None if it looks through no frozen one."""
    encoder = frozen_encoder(stage)
    if encoder is None or not isinstance(stage, Continue | Finetune):
        return None
    seen = _seen(stage)
    return next(
        (plan.choice for plan in plans if plan.encoder == encoder and plan.config == seen), None
    )


def frozen_encoder(stage: Stage) -> EncoderStage | None:
    """The frozen encoder that a stage trains behind; None where the model owns one or is blind."""
    if not isinstance(stage, Continue | Finetune) or stage.model.owns_encoder:
        return None
    return stage.encoder_stage


def _seen(stage: Seeing) -> PretrainedEncoder:
    """The frozen encoder at the size of the stage's pictures."""
    config = stage.model.encoder
    assert isinstance(config, EncoderConfig | FusedEncoder), "it looks through a frozen one"
    return config


def distinct_pictures(num_images: int, draws: Sequence[Draw]) -> float:
    """Different pictures among (seed, sampling, number) draws from `num_images`, as expected.

    A permutation gives each picture once before any comes again. Draws of one seed and sampling
    are the beginnings of one order.
    """
    if not num_images:
        return 0.0
    unseen = []
    for (_, sampling), same in groupby(sorted(draws), key=lambda draw: draw[:2]):
        number = max(draw[2] for draw in same)
        if sampling == "permutation":
            unseen.append(1.0 - min(number, num_images) / num_images)
        else:
            # (1 - 1/N)^n, exact for large N.
            unseen.append(0.0 if num_images == 1 else 1 + expm1(number * log1p(-1 / num_images)))
    return float(num_images * (1.0 - prod(unseen)))


def _plan_of(
    stages: Sequence[Seeing], ledger: Ledger, machine: Machine, costs: Mapping[str, StageCost]
) -> FeaturePlan:
    encoder = frozen_encoder(stages[0])
    assert encoder is not None, "these stages look through one"
    seen = _seen(stages[0])
    each, folder = picture_bytes(seen), feature_folder(ledger, encoder, seen)
    parts = () if folder is None else folder.glob("part-*/features.bin")
    kept = sum(path.stat().st_size for path in parts) // each
    flops = [(costs.get(stage.name) or cost(stage, ledger)).flops for stage in stages]
    if (counted := _count(stages, ledger)) is not None:
        pictures, views = counted
        choice = choose(
            pictures=pictures, views=views, kept=kept, picture_bytes=each, machine=machine
        )
    else:
        pictures, views = None, None
        choice = Choice("unknown", "until its data is prepared")
        if machine.features != "auto":
            choice = Choice(machine.features, "as the machine says")
    known = [one for one in flops if one is not None]
    whole = sum(known) if len(known) == len(flops) else None
    return FeaturePlan(encoder, seen, pictures, views, kept, whole, choice)


def _count(stages: Sequence[Seeing], ledger: Ledger) -> tuple[Number, Number] | None:
    """Distinct pictures and views of stages with one encoder."""
    draws: dict[str, list[Draw]] = {}
    known: dict[str, Facts] = {}
    views: Number = 0
    for stage in stages:
        budget = stage.training.budget
        sources = sources_of(stage.data, budget.captions, ledger)
        if sources is None:
            return None
        sampling = "permutation" if isinstance(budget, Epochs) else budget.sampling
        for name, part in taken(stage.training, sources, stage.model).items():
            source, seed = stage.data.source(name).identity, stage.training.seed
            known[source] = sources[name]
            number = part.images
            if (pool := budget.pools.get(name)) is not None:
                # Pools of one seed are the beginnings of one order.
                pooled = round(sources[name].pooled(pool).images)
                number = distinct_pictures(pooled, [(seed, sampling, number)])
            drawn = (seed, "permutation" if pool else sampling, number)
            draws.setdefault(source, []).append(drawn)
            views += part.images
    # Several captions may show one picture.
    pictures = sum(
        min(distinct_pictures(round(known[one].images), drawn), known[one].distinct_images)
        for one, drawn in draws.items()
    )
    return pictures, views


def pictures_seen(stages: Sequence[Stage], ledger: Ledger) -> list[str]:
    """A line for a plan: pictures that the image-text stages see, under each unit of a share."""
    seeing = [stage for stage in stages if isinstance(stage, Continue)]
    told = []
    units: dict[ShareUnit, str] = {
        "tokens": "tokens (filled rows)",
        "sequences": "sequences (padded rows)",
    }
    if any(stage.model.num_patches > stage.model.image_tokens for stage in seeing):
        units["patches"] = "tokens before the connector's reduction"
    asked = {one.training.budget.by for one in seeing if isinstance(one.training.budget, Mixture)}
    for by, unit in units.items():
        known = [images_seen(stage, ledger, by) for stage in seeing]
        if numbers := [round(images) for images in known if images is not None]:
            told.append(f"{span(numbers)} with shares of {unit}" + " (as asked)" * (by in asked))
    return [f"pictures seen by an image-text stage: {', '.join(told)}"] if told else []


def passes_seen(stages: Sequence[Stage], ledger: Ledger) -> list[str]:
    """Lines for a plan: how often the image-text stages go through each source of pictures, by the
    number of pictures that they may see, and through a text of which some see more than a pass."""
    passes: dict[tuple[str, int], list[float]] = {}
    texts: dict[tuple[str, int], list[float]] = {}
    for stage in stages:
        if not isinstance(stage, Continue):
            continue
        budget, patches = stage.training.budget, stage.model.image_tokens
        sources = sources_of(stage.data, budget.captions, ledger)
        if sources is None or not patches:
            continue
        for name, part in taken(stage.training, sources, stage.model).items():
            if images := round(sources[name].pooled(budget.pools.get(name)).images):
                passes.setdefault((name, images), []).append(part.images / images)
            elif size := sources[name].size(0):
                texts.setdefault((name, size), []).append(part.tokens / size)
    again = {key: numbers for key, numbers in texts.items() if max(numbers) > 1}
    return [
        f"passes over source {name!r} ({quantity(number)} {unit}): {span(numbers)}"
        for unit, found in (("pictures", passes), ("tokens", again))
        for (name, number), numbers in sorted(found.items())
    ]
