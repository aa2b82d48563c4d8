"""Figures 4 to 8 and 14. Figures 9 to 13 are Figures 4 to 8 by benchmark: part of their reports."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from midstream.recipes.scales import (
    Scale,
    Settings,
    claims_of,
    curve_of,
    decidable,
    find_scale,
    line,
    models,
    percent,
    share_label,
    text_baselines,
)
from midstream.study.studies import Claim, Figure, Study

# K, I, U as in `recipes/paper_scale.py`. K: 0, 1, 5, 10, 20 and 100 % captions (run records of
# 1.4B); U: 30 and 50 %, which Table 3 has at 79M.
IMAGE_SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
# K: 0, 2 and 10 % conversations of the tenth that has pictures (run records); U: 5 and 7.5 %.
INSTRUCT_SHARES = (0.0, 0.02, 0.05, 0.075, 0.1)


FIGURE_4_CLAIMS = claims_of(
    "text_completion",
    "paper, section 3.1",
    (
        "stable.vision",
        (
            "Images from 80 % of text training on give better vision scores than images "
            "after all of it, with the rate warmed up again"
        ),
        80.0,
        100.0,
    ),
    ("stable.vision", "A longer text training before images helps vision, up to 80 %", 80.0, 20.0),
    ("stable.text", "A longer text training before images helps text, up to 80 %", 80.0, 0.0),
)


def figure_4(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (4,),
    completions: Sequence[float] = (),
    **given: Unpack[Settings],
) -> Study:
    """Figures 4 and 9: how much text training should come before the first image?

    Without `completions` all starts that the scale has weights at, and the initialiser (0).
    """
    at = find_scale(scale, **given)
    starts = tuple(map(float, completions)) or (0.0, *at.completions)
    lines = [
        line(at, one, text_completion=100 * one.completion, epochs=one.epochs)
        for one in models(at, seeds, completion=starts, epochs=epochs)
    ]
    return at.study(
        "figure_4",
        "After what share of text training should a language model first see images?",
        lines,
        figure=Figure(
            x="text_completion",
            x_label="text training done before the first image (%)",
            by=curve_of(epochs),
            hollow=(0.0, 100.0),
        ),
        claims=decidable(FIGURE_4_CLAIMS, lines),
        baselines=text_baselines(at, [share for share in (0.8, 1.0) if share in starts]),
    )


def figure_5(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (4,),
    shares: Sequence[float] = IMAGE_SHARES,
    **given: Unpack[Settings],
) -> Study:
    """Figures 5 and 10: the share of captions, from 80 % of text training on."""
    claims = claims_of(
        "image_share",
        "paper, section 3.2",
        ("stable.vision", "Captions late in text training help vision", 10.0, 0.0),
        ("stable.vision", "Training on captions alone costs vision", 10.0, 100.0),
        ("stable.text", "Training on captions alone costs text", 10.0, 100.0),
    )
    at, varied = find_scale(scale, **given), (shares, epochs, seeds)
    return _image_shares(at, "figure_5", 0.8, varied, claims)


def figure_6(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (4,),
    shares: Sequence[float] = IMAGE_SHARES,
    **given: Unpack[Settings],
) -> Study:
    """Figures 6 and 12: the share of captions, from scratch."""
    claims = claims_of(
        "image_share",
        "paper, section 3.3",
        ("stable.vision", "From scratch, captions cost vision", 0.0, 10.0),
        ("stable.text", "From scratch, captions cost text", 0.0, 50.0),
    )
    at, varied = find_scale(scale, **given), (shares, epochs, seeds)
    return _image_shares(at, "figure_6", 0.0, varied, claims)


def figure_7(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (4,),
    shares: Sequence[float] = INSTRUCT_SHARES,
    **given: Unpack[Settings],
) -> Study:
    """Figures 7 and 13: conversations in place of captions, a tenth of the tokens together."""
    at = find_scale(scale, **given)
    lines = [
        line(
            at,
            replace(one, captions=round(0.1 - one.instruct, 10)),
            instruct_share=percent(one.instruct),
            epochs=one.epochs,
        )
        for one in models(at, seeds, instruct=shares, epochs=epochs)
    ]
    return at.study(
        "figure_7",
        "Should conversations be part of image-text training?",
        lines,
        figure=Figure(
            x="instruct_share",
            x_label=f"conversations in the image-text stage (% of {at.by}, 10 with captions)",
            by=curve_of(epochs),
        ),
        claims=claims_of(
            "instruct_share",
            "paper, section 3.4",
            ("stable.vision", "Conversations in place of captions cost vision", 0.0, 10.0),
            ("stable.text", "Conversations in place of captions help text", 10.0, 0.0),
        ),
    )


def figure_8(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (1, 2, 3, 4, 5, 6),
    **given: Unpack[Settings],
) -> Study:
    """Figures 8 and 11: how many epochs of fine-tuning?"""
    at = find_scale(scale, **given)
    lines = [line(at, one, epochs=one.epochs) for one in models(at, seeds, epochs=epochs)]
    return at.study(
        "figure_8",
        "For how many epochs should a model be fine-tuned on conversations?",
        lines,
        figure=Figure(x="epochs", x_label="epochs of fine-tuning"),
        claims=claims_of(
            "epochs",
            "paper, section 3.5",
            ("stable.vision", "More epochs help vision, up to 4", 4, 1),
            ("stable.vision", "Beyond 4 epochs vision gets worse", 4, 6),
            ("stable.text", "More epochs cost text", 1, 4),
        ),
    )


def figure_14(
    scale: str = "79m",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (1, 2, 3, 4),
    shares: Sequence[float] = (0.01, 0.05, 0.1, 0.3, 0.5),
    multiples: Sequence[float] = (1.0, 2.0, 4.0),
    **given: Unpack[Settings],
) -> Study:
    """Figure 14: 1, 2 and 4 times the image-text tokens, from 60 % of text training on.

    The paper shows curves without saying over which shares; the choice of `shares` is ours.
    """
    at = find_scale(scale, **given)
    varied = {"multiple": multiples, "epochs": epochs, "captions": shares}
    lines = [
        line(at, one, image_share=percent(one.captions), curve=_curve(one.multiple, one.epochs))
        for one in models(at, seeds, completion=(0.6,), **varied)
    ]
    return at.study(
        "figure_14",
        "Do trends over the share of captions hold when image-text training is longer?",
        lines,
        figure=Figure(x="image_share", x_label=share_label(at), by="curve"),
        claims=claims_of(
            "curve",
            "paper, appendix G (trends look alike; no order is stated)",
            (
                "stable.vision",
                "A longer image-text training helps vision",
                _curve(max(multiples), epochs[-1]),
                _curve(min(multiples), epochs[-1]),
            ),
        ),
    )


def _curve(multiple: float, epochs: int) -> str:
    return f"{multiple:g} x, {epochs} epoch{'' if epochs == 1 else 's'}"


def _image_shares(
    at: Scale,
    name: str,
    completion: float,
    varied: tuple[Sequence[float], Sequence[int], Sequence[int]],
    claims: tuple[Claim, ...],
) -> Study:
    shares, epochs, seeds = varied
    lines = [
        line(at, one, image_share=percent(one.captions), epochs=one.epochs)
        for one in models(at, seeds, completion=(completion,), captions=shares, epochs=epochs)
    ]
    begun = "from scratch" if completion == 0 else f"from {completion:.0%} of text training on"
    return at.study(
        name,
        f"What share of captions should image-text training have, {begun}?",
        lines,
        figure=Figure(x="image_share", x_label=share_label(at), by=curve_of(epochs)),
        claims=claims,
    )
