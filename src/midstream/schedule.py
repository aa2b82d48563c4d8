"""Learning rate as a function of tokens seen: warm up, anneal, continue a parent's schedule.

Shapes as in OpenLM (open_lm/scheduler.py) with tokens in place of steps; the continuation is a
fresh half-cosine from the parent's rate (authors' scripts/lr_plot.py).
"""

import math

from midstream.config import (
    AnySchedule,
    Constant,
    ContinuedCosine,
    WarmupStableDecay,
)

# The share of a stage's tokens over which `moments_factor` rises.
_MOMENTS_FRACTION = 0.01


def rate_at(
    schedule: AnySchedule,
    tokens_seen: int,
    total_tokens: int,
    *,
    parent_rate: float | None = None,
    step_tokens: int = 0,
) -> float:
    """The learning rate of the step behind `tokens_seen` of the stage's `total_tokens`.

    `parent_rate` is the parent schedule's rate at the checkpoint, needed by `ContinuedCosine`.
    `step_tokens` is what a whole step holds: a warm-up counts the step that is about to be taken,
    so that the first does not pass at a rate of 0 (OpenLM's `(step + 1) / warmup`).
    """
    if isinstance(schedule, ContinuedCosine):
        assert parent_rate is not None
        return _half_cosine(parent_rate, schedule.end_rate, tokens_seen / total_tokens)
    warmup = schedule.warmup_fraction * total_tokens
    if tokens_seen + step_tokens < warmup:
        return schedule.peak_rate * (tokens_seen + step_tokens) / warmup
    if isinstance(schedule, Constant):
        return schedule.peak_rate
    if isinstance(schedule, WarmupStableDecay):
        decay = schedule.decay_fraction * total_tokens
        left = max(total_tokens - tokens_seen, 0) / decay if decay else 1.0
        return schedule.end_rate + (schedule.peak_rate - schedule.end_rate) * min(left, 1.0)
    rest = max(total_tokens - warmup, 1.0)
    return _half_cosine(
        schedule.peak_rate, schedule.end_rate, max(tokens_seen - warmup, 0.0) / rest
    )


def moments_factor(tokens_seen: int, total_tokens: int, *, step_tokens: int) -> float:
    """What a rate is multiplied by while moments that start at zero fill: a line from 0 to 1.

    It ends after a hundredth of the stage (our choice; the paper carries moments or drops them).
    """
    warm = _MOMENTS_FRACTION * total_tokens
    return min(1.0, (tokens_seen + step_tokens) / warm) if warm else 1.0


def check_start(schedule: AnySchedule, parent_rate: float | None, where: str) -> None:
    """Raises ValueError for a rate of 0, or where a continued schedule starts at its own end."""
    if not isinstance(schedule, ContinuedCosine):
        if schedule.peak_rate == 0:
            raise ValueError(
                f"{where}: the learning rate is 0 from its first step, so it would learn nothing; "
                "give the schedule a peak_rate above 0"
            )
        return
    if parent_rate is None:
        raise ValueError(
            f"{where}: a continued schedule needs a rate to start at, and its parent has none; "
            "re-warm with WarmupCosine, or import the checkpoint again with --rate"
        )
    if parent_rate <= schedule.end_rate:
        raise ValueError(
            f"{where}: the parent's rate at its checkpoint is {parent_rate:g}, not above the end "
            f"rate {schedule.end_rate:g}; re-warm with WarmupCosine instead"
        )


def end_rate(schedule: AnySchedule) -> float:
    """The rate that a schedule ends with."""
    if isinstance(schedule, ContinuedCosine):
        return schedule.end_rate
    return rate_at(schedule, 1, 1)


def check_end(before: AnySchedule, schedule: AnySchedule) -> None:
    """Raises ValueError where `schedule` would continue one that ends at its own end rate."""
    if isinstance(schedule, ContinuedCosine) and end_rate(before) <= schedule.end_rate:
        raise ValueError(
            f"a continued schedule starts at the rate with which the stage before ends, "
            f"{end_rate(before):g}, which is not above its own end rate {schedule.end_rate:g}; let "
            "that stage end higher, or re-warm with WarmupCosine"
        )


def _half_cosine(start: float, end: float, done: float) -> float:
    # Weighted so that both ends are exact: a continuation starts at its parent's very rate.
    weight = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return weight * start + (1 - weight) * end
