"""One study at several sizes, to tell a further size's loss and effect before it is trained.

Tokens and rates: the sizes of the paper and public models have their own (a multiple of parameters,
`paper_scale.py`). Pocket sizes see the same tokens, a fifth of that scale's, so that size alone
varies and Chinchilla's form holds along it as it stands; their rates go with 1 / width from the
pocket's own, ours (U).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Unpack

from midstream.config import DecoderConfig, PublicFolder, WarmupCosine
from midstream.core.storage import read_json
from midstream.recipes.scales import Model, Scale, Settings, find_scale, line, percent, share_label
from midstream.study.axes import with_field
from midstream.study.stages import Continue, Finetune, Pretrain
from midstream.study.studies import Figure, Ladder, Line, Study

# Widths of the pocket's decoder, about a doubling of its parameters each; the paper's sizes but 1b.
WIDTHS = (16, 28, 52, 96)
PAPER = ("11m", "79m", "154m", "411m")
# What is held out for the losses: of the generated world, and of a folder that is prepared here.
POCKET_HELD_OUT, FOLDER_HELD_OUT = 0.05, 0.01
# Of the pocket scale's budgets, so that four sizes take minutes (U).
POCKET_SHARE = 0.2


def sizes(
    scale: str = "pocket",
    sizes: Sequence[int | str] = (),
    shares: Sequence[float] = (0.1, 0.5),
    onsets: Sequence[float] = (0.8,),
    seeds: Sequence[int] = (7, 365, 124),
    epochs: int = 1,
    predict: int | str | None = None,
    **given: Unpack[Settings],
) -> Study:
    """How do losses, and the effects of share and onset, go with the size of the decoder?

    `sizes` are widths at the pocket scale; with scale="paper" names of the paper's sizes or of
    public models. Each has a text run, image-text stages at the `shares` of captions after the
    `onsets` (shares of the text run), fine-tuning and evaluation; seeds draw all of it but the
    encoder, unless `draws` says otherwise. `predict` is the size that the laws are not fitted to,
    the largest without it. Raises ValueError for fewer than three sizes beside it, fewer than two
    seeds, two sizes of as many parameters, and prepared sources that hold nothing out.
    """
    if scale not in ("pocket", "paper"):
        raise ValueError(f"scale is 'pocket' or 'paper', and sizes name its sizes, not {scale!r}")
    named: Sequence[int | str] = sizes or (WIDTHS if scale == "pocket" else PAPER)
    found = {str(name): _scale(scale, name, given) for name in named}
    # To four digits.
    axis = {n: float(f"{at.decoder.num_parameters / 1e6:.4g}") for n, at in found.items()}
    top = str(predict) if predict is not None else max(axis, key=axis.__getitem__)
    _check(axis, top, seeds)
    lines = tuple(
        _held_out(
            line(
                found[name],
                Model(completion=onset, captions=share, epochs=epochs, seed=seed),
                size=axis[name],
                onset=percent(onset),
                share=percent(share),
            )
        )
        for name, onset, share, seed in product(found, onsets, shares, seeds)
    )
    first = next(iter(found.values()))
    return Study(
        name=f"ladder.sizes.{scale}",
        question="What do losses and effects at small sizes tell of a larger one?",
        lines=lines,
        figure=Figure(
            x="size",
            x_label="decoder parameters (millions)",
            by="share" if len(shares) > 1 else "onset" if len(onsets) > 1 else None,
        ),
        ladder=Ladder(axis="size", predict=axis[top]),
        notes=(
            f"share: {share_label(first)}; onset: share of the text run before it (%).",
            f"Every pocket size sees the same tokens, {POCKET_SHARE:g} of the pocket scale's, so "
            "that size alone varies; rates go with 1 / width."
            if scale == "pocket"
            else "Sizes have the tokens and rates of their own recipes: text and image-text tokens "
            "go with parameters, so that the law's fall is that of both.",
            *dict.fromkeys(note for one in found.values() for note in one.notes),
        ),
    )


def _scale(kind: str, name: int | str, given: Settings) -> Scale:
    """A size with all but the encoder drawn anew by its repetitions."""
    drawn: Settings = {"draws": ("text", "image-text"), **given}
    if kind == "paper":
        return find_scale(str(name), **drawn)
    at = find_scale("pocket", shrink=POCKET_SHARE, **drawn)
    assert isinstance(at.text, Pretrain), "the pocket scale trains its text"
    assert isinstance(at.decoder, DecoderConfig), "the pocket scale has a decoder of its own"
    if not str(name).isdigit():
        raise ValueError(f"sizes of the pocket scale are widths, such as {WIDTHS}, not {name!r}")
    slower = at.decoder.hidden_size / int(name)
    decoder = DecoderConfig(**{**at.decoder.model_dump(), "hidden_size": int(name)})
    schedule = at.text.training.schedule
    assert isinstance(schedule, WarmupCosine), "the pocket scale's text run has a peak"
    schedule = schedule.model_copy(update={"peak_rate": schedule.peak_rate * slower})
    training = at.text.training.model_copy(update={"schedule": schedule})
    return replace(
        at,
        name=f"pocket, width {name}",
        decoder=decoder,
        text=at.text.model_copy(update={"decoder": decoder, "training": training}),
        rewarm=at.rewarm.model_copy(update={"peak_rate": at.rewarm.peak_rate * slower}),
        finetune_rate=at.finetune_rate * slower,
    )


def _check(axis: Mapping[str, float], predict: str, seeds: Sequence[int]) -> None:
    if predict not in axis:
        raise ValueError(f"predict is {predict}, which is none of the sizes {', '.join(axis)}")
    if len(axis) < 4:
        raise ValueError(
            f"the sizes are {', '.join(axis)}; a law takes three of them and one that it is not "
            "fitted to, give four or more"
        )
    if len(set(axis.values())) < len(axis):
        raise ValueError(f"two sizes have as many parameters: {dict(axis)}; leave one out")
    if len(set(seeds)) < 2:
        raise ValueError(
            f"seeds is {list(seeds)}; one model of a size tells no spread, give two or more"
        )


def _held_out(made: Line) -> Line:
    """The line with examples held out of its world.

    Raises ValueError for a source of a user's folder that is prepared with none held out.
    """
    tuned, fraction = made.result.of, POCKET_HELD_OUT
    assert isinstance(tuned, Finetune), "the paper's models are fine-tuned"
    assert isinstance(tuned.start, Continue), "from an image-text stage"
    if isinstance(world := tuned.data.world, PublicFolder):
        for training in (tuned.start.training, tuned.training):
            for name in training.budget.source_names:
                _check_prepared(world.root, name)
        fraction = FOLDER_HELD_OUT
    held = with_field(made.result, "prepare.world.validation_fraction", fraction)
    return made.model_copy(update={"result": held})


def _check_prepared(root: Path, name: str) -> None:
    for index in root.glob(f"*/{name}/source.json"):
        if not read_json(index)["validation"]["examples"]:
            raise ValueError(
                f"{index.parent} holds nothing out, and a ladder's laws are of held-out losses; "
                f"prepare it again with midstream prepare --validation {FOLDER_HELD_OUT}"
            )
