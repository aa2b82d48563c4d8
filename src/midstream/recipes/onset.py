"""Onset × share at constant vision tokens: two laboratories disagree, one study asks.

The paper holds that pictures from 80 % of a text run on are best; Kimi K2.5 (arXiv 2602.02276,
Table 1) that early pictures at a low share are. Kimi holds fixed what the paper's design moves:
all tokens, the tokens of pictures, and the schedule. Here the onset moves within one run: whatever
it is, the rate after n tokens is the same (`Constant` up to the onset, `WarmupStableDecay` after).
"""

from collections.abc import Sequence
from itertools import product
from typing import Unpack

from midstream.config import Constant, Mixture, WarmupStableDecay
from midstream.recipes.lines import reseeded, text_only
from midstream.recipes.scales import (
    Model,
    Scale,
    Settings,
    claims_of,
    find_scale,
    finetune_stage,
    line_of,
    mixture,
)
from midstream.study.stages import Continue, ContinueFrom, Evaluate, Finetune, FromScratch, Pretrain
from midstream.study.studies import Figure, Study

# Onset (share of all tokens) and share of pictures' tokens behind it, as printed; .1 of all each.
KIMI = ((0.0, 0.1), (0.5, 0.2), (0.8, 0.5))
# U: the report says neither; the decay begins behind the latest onset.
WARMUP, DECAY = 0.05, 0.1
# As reprinted by readers of Table 1 (J. Cai, "Kimi K2.5"); not read in the report itself.
PRINTED = (
    ("vision knowledge", 25.8, 25.0, 24.2),
    ("vision reasoning", 43.8, 40.7, 39.0),
    ("OCR", 65.7, 64.1, 61.5),
    ("text knowledge", 45.5, 43.9, 43.1),
    ("text reasoning", 58.5, 58.6, 57.8),
    ("code", 24.8, 24.0, 24.0),
)
SOURCE = "Kimi K2.5, arXiv 2602.02276, Table 1"


def onset_by_share(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: int = 4,
    points: Sequence[tuple[float, float]] = KIMI,
    **given: Unpack[Settings],
) -> Study:
    """When and how densely: do early pictures at a low share beat late ones at a high one?

    `points` are (onset, share of captions behind it); pictures and their captions have the same
    tokens at each. Raises ValueError where they do not, for an onset behind the decay's begin, and
    for a scale whose text run is not trained here.
    """
    at = find_scale(scale, **given)
    if not isinstance(at.text, Pretrain):
        raise ValueError(
            f"the schedule of {scale}'s text run is its authors'; give text='trained', so that the "
            "run is made here"
        )
    seen = {round((1 - onset) * share, 9) for onset, share in points}
    if len(seen) > 1:
        raise ValueError(
            f"the points see different shares of all tokens as captions, {sorted(seen)}; give each "
            "onset the share that makes (1 - onset) * share the same"
        )
    onsets = [onset for onset, _ in points]
    latest = max(onsets)
    if latest > 1 - DECAY or min(onsets) < 0:
        raise ValueError(f"onsets lie between 0 and {1 - DECAY:g}, where the decay begins")
    if any(0 < onset < WARMUP for onset in onsets):
        raise ValueError(f"the rate warms up until {WARMUP:g}; give an onset of 0 or behind it")
    if len(set(onsets)) < 2:
        raise ValueError("one onset compares with nothing; give two or more")
    text = _text_run(at, at.text, onsets)
    lines = [
        line_of(
            at,
            _model(
                at,
                _start(reseeded(text, seed) if "text" in at.draws else text, onset, latest),
                onset,
                share,
                seed,
                epochs,
            ),
            onset=100 * onset,
            share=100 * share,
            seed=seed,
        )
        for (onset, share), seed in product(points, seeds or at.seeds)
    ]
    early, late = 100 * min(onsets), 100 * latest
    printed = "; ".join(f"{name} {'/'.join(map(str, row))}" for name, *row in PRINTED)
    return Study(
        name=f"onset.onset_by_share.{at.name}",
        question="With as many tokens of pictures: early and thin, or late and dense?",
        lines=tuple(lines),
        figure=Figure(x="onset", x_label="share of all tokens before the first image (%)"),
        claims=claims_of(
            "onset",
            SOURCE,
            ("stable.vision", "Early pictures at a low share help vision", early, late),
            ("stable.text", "Early pictures at a low share help text", early, late),
        ),
        baselines={
            "text only, at the latest onset": Evaluate(of=text, evaluation=text_only(at.asked))
        }
        if latest
        else {},
        notes=(
            f"Printed for onsets 0, 50 and 80 % ({SOURCE}, as reprinted by readers): {printed}.",
            "Total tokens, tokens of pictures and the rate after every token are the same at every "
            "onset; in the paper's design (Figure 4) the image-text tokens come on top of the text "
            "run, and the rate that they begin with falls with the onset.",
            "The image-text stage draws its text anew, so that a late onset may meet a document of "
            "the text run again.",
            *at.notes,
        ),
    )


def total_tokens(scale: Scale) -> int:
    """Tokens of a whole run, text and pictures: those of the scale's text run."""
    assert isinstance(scale.text, Pretrain), "checked by onset_by_share"
    budget = scale.text.training.budget
    assert isinstance(budget, Mixture), "a text run has a mixture"
    return budget.total_tokens


def _text_run(scale: Scale, text: Pretrain, onsets: Sequence[float]) -> Pretrain:
    """Text up to the latest onset, at the whole run's rates and in its rows."""
    latest, budget = max(onsets), text.training.budget
    assert isinstance(budget, Mixture), "a text run has a mixture"
    tokens = round(total_tokens(scale) * (latest or 1.0))
    schedule = Constant(
        peak_rate=scale.rewarm.peak_rate, warmup_fraction=WARMUP / latest if latest else WARMUP
    )
    training = text.training.model_copy(
        update={
            "budget": budget.model_copy(update={"total_tokens": tokens}),
            "schedule": schedule,
            "rows": scale.rows,
            "optimizer": scale.optimizer,
        }
    )
    milestones = sorted({onset / latest for onset in onsets if onset} | {1.0})
    return text.model_copy(update={"training": training, "milestones": tuple(milestones)})


def _start(text: Pretrain, onset: float, latest: float) -> FromScratch | ContinueFrom:
    """Where the second part begins; Adam's moments come along, as within one run."""
    if not onset:
        return FromScratch()
    return ContinueFrom(stage=text, completion=onset / latest, optimizer="carry")


def _model(
    scale: Scale,
    start: FromScratch | ContinueFrom,
    onset: float,
    share: float,
    seed: int,
    epochs: int,
) -> Finetune:
    """The run's second part from `onset` on, then conversations as the paper fine-tunes."""
    plain = finetune_stage(scale, Model(seed=seed, epochs=epochs))
    assert isinstance(plain.start, Continue), "the paper's models are fine-tuned from one"
    behind = 1 - onset
    multiple = behind * total_tokens(scale) / scale.image_text_tokens
    budget = mixture(scale, share, 0.0, round(1 - share, 10), multiple=multiple)
    schedule = WarmupStableDecay(
        peak_rate=scale.rewarm.peak_rate,
        end_rate=scale.end_rate,
        warmup_fraction=0.0 if onset else WARMUP,
        decay_fraction=round(DECAY / behind, 12),
    )
    training = plain.start.training.model_copy(update={"budget": budget, "schedule": schedule})
    seen = plain.start.model_copy(update={"start": start, "training": training})
    return Finetune(start=seen, training=plain.training)
