"""Figures 4 to 8 and 14. Figures 9 to 13 are Figures 4 to 8 by benchmark: part of their reports."""

from collections.abc import Sequence
from itertools import product

from midstream.recipes.models import Model, line, text_baselines
from midstream.recipes.paper.common import SHARE_LABEL, curve_of, notes_of
from midstream.recipes.scales import COMPLETIONS, Scale, find_scale
from midstream.study.studies import Claim, Figure, Study

IMAGE_SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
INSTRUCT_SHARES = (0.0, 0.025, 0.05, 0.075, 0.1)


def figure_4(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (4,),
    inputs: str = "",
    text: str = "",
) -> Study:
    """Figures 4 and 9: how much text training should come before the first image?"""
    at = find_scale(scale, inputs, text)
    lines = [
        line(
            at,
            Model(completion=share, epochs=number, seed=seed),
            text_completion=100 * share,
            epochs=number,
        )
        for share, number, seed in product((0.0, *COMPLETIONS), epochs, seeds or at.seeds)
    ]
    return Study(
        name=f"paper.figure_4.{scale}",
        question="After what share of text training should a language model first see images?",
        lines=tuple(lines),
        figure=Figure(
            x="text_completion",
            x_label="text training done before the first image (%)",
            by=curve_of(epochs),
            hollow=(0.0, 100.0),
        ),
        claims=(
            Claim(
                text="Images from 80 % of text training on give better vision scores than images "
                "after all of it, with the rate warmed up again",
                higher={"text_completion": 80.0},
                lower={"text_completion": 100.0},
                source="paper, section 3.1",
            ),
            Claim(
                text="A longer text training before images helps vision, up to 80 %",
                higher={"text_completion": 80.0},
                lower={"text_completion": 20.0},
                source="paper, section 3.1",
            ),
            Claim(
                text="A longer text training before images helps text, up to 80 %",
                score="stable.text",
                higher={"text_completion": 80.0},
                lower={"text_completion": 0.0},
                source="paper, section 3.1",
            ),
        ),
        baselines=text_baselines(at, (0.8, 1.0)),
        notes=notes_of(at),
    )


def figure_5(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (4,),
    shares: Sequence[float] = IMAGE_SHARES,
    inputs: str = "",
    text: str = "",
) -> Study:
    """Figures 5 and 10: the share of captions, from 80 % of text training on."""
    at = find_scale(scale, inputs, text)
    return _image_shares(
        at,
        "figure_5",
        0.8,
        (shares, epochs, seeds),
        (
            Claim(
                text="Captions late in text training help vision",
                higher={"image_share": 10.0},
                lower={"image_share": 0.0},
                source="paper, section 3.2",
            ),
            Claim(
                text="Training on captions alone costs vision",
                higher={"image_share": 10.0},
                lower={"image_share": 100.0},
                source="paper, section 3.2",
            ),
            Claim(
                text="Training on captions alone costs text",
                score="stable.text",
                higher={"image_share": 10.0},
                lower={"image_share": 100.0},
                source="paper, section 3.2",
            ),
        ),
    )


def figure_6(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (4,),
    shares: Sequence[float] = IMAGE_SHARES,
    inputs: str = "",
    text: str = "",
) -> Study:
    """Figures 6 and 12: the share of captions, from scratch."""
    at = find_scale(scale, inputs, text)
    return _image_shares(
        at,
        "figure_6",
        0.0,
        (shares, epochs, seeds),
        (
            Claim(
                text="From scratch, captions cost vision",
                higher={"image_share": 0.0},
                lower={"image_share": 10.0},
                source="paper, section 3.3",
            ),
            Claim(
                text="From scratch, captions cost text",
                score="stable.text",
                higher={"image_share": 0.0},
                lower={"image_share": 50.0},
                source="paper, section 3.3",
            ),
        ),
    )


def figure_7(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (4,),
    shares: Sequence[float] = INSTRUCT_SHARES,
    inputs: str = "",
    text: str = "",
) -> Study:
    """Figures 7 and 13: conversations in place of captions, a tenth of the tokens together."""
    at = find_scale(scale, inputs, text)
    lines = [
        line(
            at,
            Model(captions=round(0.1 - share, 10), instruct=share, epochs=number, seed=seed),
            instruct_share=round(100 * share, 10),
            epochs=number,
        )
        for share, number, seed in product(shares, epochs, seeds or at.seeds)
    ]
    return Study(
        name=f"paper.figure_7.{scale}",
        question="Should conversations be part of image-text training?",
        lines=tuple(lines),
        figure=Figure(
            x="instruct_share",
            x_label="conversations in the image-text stage (% of tokens, 10 with captions)",
            by=curve_of(epochs),
        ),
        claims=(
            Claim(
                text="Conversations in place of captions cost vision",
                higher={"instruct_share": 0.0},
                lower={"instruct_share": 10.0},
                source="paper, section 3.4",
            ),
            Claim(
                text="Conversations in place of captions help text",
                score="stable.text",
                higher={"instruct_share": 10.0},
                lower={"instruct_share": 0.0},
                source="paper, section 3.4",
            ),
        ),
        notes=notes_of(at),
    )


def figure_8(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (1, 2, 3, 4, 5, 6),
    inputs: str = "",
    text: str = "",
) -> Study:
    """Figures 8 and 11: how many epochs of fine-tuning?"""
    at = find_scale(scale, inputs, text)
    lines = [
        line(at, Model(epochs=number, seed=seed), epochs=number)
        for number, seed in product(epochs, seeds or at.seeds)
    ]
    return Study(
        name=f"paper.figure_8.{scale}",
        question="For how many epochs should a model be fine-tuned on conversations?",
        lines=tuple(lines),
        figure=Figure(x="epochs", x_label="epochs of fine-tuning"),
        claims=(
            Claim(
                text="More epochs help vision, up to 4",
                higher={"epochs": 4},
                lower={"epochs": 1},
                source="paper, section 3.5",
            ),
            Claim(
                text="Beyond 4 epochs vision gets worse",
                higher={"epochs": 4},
                lower={"epochs": 6},
                source="paper, section 3.5",
            ),
            Claim(
                text="More epochs cost text",
                score="stable.text",
                higher={"epochs": 1},
                lower={"epochs": 4},
                source="paper, section 3.5",
            ),
        ),
        notes=notes_of(at),
    )


def figure_14(
    scale: str = "79m",
    seeds: Sequence[int] = (),
    epochs: Sequence[int] = (1, 2, 3, 4),
    shares: Sequence[float] = (0.01, 0.05, 0.1, 0.3, 0.5),
    multiples: Sequence[float] = (1.0, 2.0, 4.0),
    inputs: str = "",
    text: str = "",
) -> Study:
    """Figure 14: 1, 2 and 4 times the image-text tokens, from 60 % of text training on.

    The paper shows curves without saying over which shares; the choice of `shares` is ours.
    """
    at = find_scale(scale, inputs, text)
    lines = [
        line(
            at,
            Model(completion=0.6, captions=share, epochs=number, seed=seed, multiple=multiple),
            image_share=round(100 * share, 10),
            curve=_curve(multiple, number),
        )
        for multiple, number, share, seed in product(multiples, epochs, shares, seeds or at.seeds)
    ]
    return Study(
        name=f"paper.figure_14.{scale}",
        question="Do trends over the share of captions hold when image-text training is longer?",
        lines=tuple(lines),
        figure=Figure(x="image_share", x_label=SHARE_LABEL, by="curve"),
        claims=(
            Claim(
                text="A longer image-text training helps vision",
                higher={"curve": _curve(max(multiples), epochs[-1])},
                lower={"curve": _curve(min(multiples), epochs[-1])},
                source="paper, appendix G (trends look alike; no order is stated)",
            ),
        ),
        notes=notes_of(at),
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
        line(
            at,
            Model(completion=completion, captions=share, epochs=number, seed=seed),
            image_share=round(100 * share, 10),
            epochs=number,
        )
        for share, number, seed in product(shares, epochs, seeds or at.seeds)
    ]
    begun = "from scratch" if completion == 0 else f"from {completion:.0%} of text training on"
    return Study(
        name=f"paper.{name}.{at.name}",
        question=f"What share of captions should image-text training have, {begun}?",
        lines=tuple(lines),
        figure=Figure(x="image_share", x_label=SHARE_LABEL, by=curve_of(epochs)),
        claims=claims,
        notes=notes_of(at),
    )
