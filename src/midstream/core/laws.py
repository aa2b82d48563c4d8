"""Laws over sizes: a loss and a difference by the size of a model, and what a further size gives.

Loss: L = E_place + A * (N / N_0) ** -alpha, Chinchilla's form (Hoffmann et al. 2022) with the terms
of everything but size in one floor a place. Difference: a line in log N.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from midstream.core.stats import CONFIDENCE, quantile

LEAST_SIZES, LEAST_MODELS = 3, 2
RESAMPLES = 200
# Huber's own tuning, in spreads of one model: 95 % efficient where the spread is a normal one.
HUBER = 1.345
# Exponent times log (largest / smallest size), in logarithms; the least loss that a fit tries.
LOG_BENDS, LEAST_LOSS = (-5.0, 4.0), 1e-9

# By place, which may be anything, then by size: the losses of the models of one size.
Losses = Mapping[Any, Mapping[Any, Sequence[float]]]


class UnidentifiedError(ValueError):
    """The models do not tell the law; the message says why and what would."""


@dataclass(frozen=True)
class Prediction:
    """A mean that a law tells, and where 95 % of the means of so many further models lie."""

    value: float
    low: float
    high: float

    def holds(self, measured: float | int) -> bool:
        """Whether a measured mean lies inside."""
        return self.low <= measured <= self.high


@dataclass(frozen=True)
class Law:
    """A loss by size at each place: floor + amplitude * (size / base) ** -exponent.

    Amplitude and exponent are those of all places, `base` is the smallest size of the fit and
    `largest` its largest. `fitted` holds the loss of each of `places` at the largest size, the fall
    down to it from the smallest, and the logarithm of exponent * log(largest / base): unlike floors
    and amplitudes these are known well apart. `draws` holds the same of refits to models drawn
    again within each size of each place. `spread` is the standard deviation of one model's log
    loss about the law, `freedom` that of the spread over models of one place and size.
    """

    places: tuple[Any, ...]
    base: float | int
    largest: float | int
    fitted: Float[np.ndarray, " parameters"]
    draws: Float[np.ndarray, "resamples parameters"]
    spread: float
    freedom: int

    @property
    def exponent(self) -> Prediction:
        """How fast the loss falls, with the interval of its refits; near 0 a line in log N."""
        found = _bend(np.append(self.fitted[-1], self.draws[:, -1])) / self._reach
        low, high = np.quantile(found[1:], _TAILS)
        return Prediction(float(found[0]), float(low), float(high))

    @property
    def amplitude(self) -> float:
        """What the smallest size of the fit has above the floor."""
        return float(-self.fitted[-2] / np.expm1(-_bend(self.fitted[-1])))

    def floor(self, place: Any) -> float | None:
        """The loss at this place that no size goes below; None where the sizes show none."""
        found = self.fitted[self.places.index(place)] + self.fitted[-2] - self.amplitude
        return float(found) if found > 0 else None

    def at(self, place: Any, size: float | int) -> float:
        """The loss at this place for models of `size`."""
        return float(self._losses(self.fitted[None], place, size)[0])

    def predict(self, place: Any, size: float | int, models: int) -> Prediction:
        """The mean loss of so many further models, by Student's t on log losses.

        The error is that of the refits, how far off they are together among it, and that of a mean
        of so many models about the law.
        """
        middle = self.at(place, size)
        refits = np.log(self._losses(self.draws, place, size) / middle)
        squares = float(refits @ refits) / (len(refits) - 1)
        error = math.sqrt(squares + self.spread**2 / models)
        away = math.exp(quantile((1 + CONFIDENCE) / 2, self.freedom) * error)
        return Prediction(middle, middle / away, middle * away)

    @property
    def _reach(self) -> float:
        return math.log(self.largest / self.base)

    def _losses(
        self, parameters: Float[np.ndarray, "fits parameters"], place: Any, size: float | int
    ) -> Float[np.ndarray, " fits"]:
        falling, _ = _shape(math.log(size / self.base) / self._reach, parameters[:, -1])
        losses = parameters[:, self.places.index(place)] + parameters[:, -2] * falling
        return np.asarray(np.maximum(losses, LEAST_LOSS))


_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


def _bend(log_bend: Any) -> Any:
    """Exponent times the log of the sizes' reach: from a line in log N to a fall at its start."""
    return np.exp(np.clip(log_bend, *LOG_BENDS))


def _shape(along: Any, log_bend: Any) -> tuple[Any, Any]:
    """How much of the fall is left at a share of the way in log N, and its slope by `log_bend`."""
    bend = _bend(log_bend)
    whole, left = -np.expm1(-bend), np.exp(-bend * along)
    found = (left - np.exp(-bend)) / whole
    return found, bend * (np.exp(-bend) * (1 - found) - along * left) / whole


def fit_law(losses: Losses, *, resamples: int = RESAMPLES) -> Law:
    """The law of these models, by Huber's loss on log losses, and `resamples` refits.

    Raises UnidentifiedError for fewer than three sizes, a place with one model of a size, models of
    one size that are all equal, and a loss that does not fall from the smallest size to the
    largest by more than its error; ValueError for a loss that is no positive number.
    """
    places = tuple(losses)
    cells = [
        (place, size, _logs(place, size, own))
        for place in places
        for size, own in sorted(losses[place].items())
    ]
    sizes = sorted({size for _, size, _ in cells})
    deviations = _deviations([(f"{p}, size {s:,.0f}", logs) for p, s, logs in cells], len(sizes))
    freedom = sum(len(each) - 1 for each in deviations)
    within = math.sqrt(sum(float(each @ each) for each in deviations) / freedom)
    fall = _fall(cells, sizes, within)
    logs = np.concatenate([logs for _, _, logs in cells])
    numbers = [np.full(len(logs), places.index(place)) for place, _, logs in cells]
    along = [
        np.full(len(logs), math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0]))
        for _, size, logs in cells
    ]
    models = _Models(np.concatenate(numbers), np.concatenate(along), len(places), HUBER * within)
    ends = [math.exp(logs[models.place == number].min()) for number in range(len(places))]
    starts = [np.array([*ends, fall * min(ends), log_bend]) for log_bend in (-2.0, 0.0, 2.0)]
    # Of squares first: far from the law Huber's loss shows little of the way.
    squares = [models.fit(logs, start, "linear") for start in starts]
    fitted = models.fit(logs, min(squares, key=lambda found: found[1])[0])[0]
    left = logs - models.law(fitted)
    spread = math.sqrt(float(left @ left) / max(1, len(logs) - len(fitted)))
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        # Deviations within so few models are smaller than those of the law that they are drawn of.
        drawn = [
            own.mean() + math.sqrt(len(own) / (len(own) - 1)) * generator.choice(away, len(own))
            for (_, _, own), away in zip(cells, deviations, strict=True)
        ]
        draws.append(models.fit(np.concatenate(drawn), fitted)[0])
    return Law(places, sizes[0], sizes[-1], fitted, np.array(draws), spread, freedom)


@dataclass(frozen=True)
class _Models:
    """Where each model lies: its place's number, its share of the way in log N from the smallest
    size to the largest; and Huber's threshold."""

    place: np.ndarray
    along: np.ndarray
    places: int
    threshold: float

    def fit(
        self, logs: np.ndarray, start: np.ndarray, loss: str = "huber"
    ) -> tuple[np.ndarray, float]:
        """The nearest law from there, and what is left."""
        from scipy.optimize import least_squares

        found = least_squares(
            lambda at: self.law(at) - logs,
            start,
            jac=self._slopes,
            loss=loss,
            f_scale=self.threshold,
            ftol=1e-6,
            max_nfev=50,
        )
        return np.append(found.x[:-1], np.clip(found.x[-1], *LOG_BENDS)), float(found.cost)

    def law(self, at: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(self._losses(at)[0]))

    def _losses(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        falling, bends = _shape(self.along, at[-1])
        return np.maximum(at[self.place] + at[-2] * falling, LEAST_LOSS), falling, at[-2] * bends

    def _slopes(self, at: np.ndarray) -> np.ndarray:
        losses, falling, bends = self._losses(at)
        own = np.eye(self.places)[self.place]
        return np.asarray(np.column_stack([own, falling, bends]) / losses[:, None])


def _logs(place: Any, size: Any, losses: Sequence[float]) -> np.ndarray:
    found = np.asarray(losses, dtype=float)
    if not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(
            f"the losses at {place}, size {size:,.0f}, are {list(losses)}; a loss is "
            "a number above 0, evaluate them again"
        )
    return np.asarray(np.log(found))


def _deviations(cells: Sequence[tuple[str, np.ndarray]], sizes: int) -> list[np.ndarray]:
    """How far each model lies from the mean of its cell; refuses what tells no spread."""
    if sizes < LEAST_SIZES:
        raise UnidentifiedError(
            f"a law over sizes is fitted to {LEAST_SIZES} of them at least, and there are {sizes}; "
            "give more sizes beside the one that is predicted"
        )
    for name, values in cells:
        if len(values) < LEAST_MODELS:
            raise UnidentifiedError(
                f"there is {len(values)} model at {name}, and the spread of one is not known; give "
                f"{LEAST_MODELS} seeds or more"
            )
    found = [values - values.mean() for _, values in cells]
    if max(np.abs(each).max() for each in found) < 1e-12:
        raise UnidentifiedError(
            "models of one size are all equal, so that nothing tells how far a further one lies; "
            "let the seeds draw something anew"
        )
    return found


def _fall(
    cells: Sequence[tuple[Any, Any, np.ndarray]], sizes: Sequence[Any], within: float
) -> float:
    """The fall of log losses over all sizes; refuses one that is not larger than its error."""
    ends = [
        np.concatenate([own for _, at, own in cells if at == size])
        for size in (sizes[0], sizes[-1])
    ]
    fall = float(ends[0].mean() - ends[1].mean())
    freedom = sum(len(own) - 1 for *_, own in cells)
    error = within * math.sqrt(1 / len(ends[0]) + 1 / len(ends[1]))
    error *= quantile((1 + CONFIDENCE) / 2, freedom)
    if fall <= error:
        raise UnidentifiedError(
            f"the loss falls by {100 * fall:.2f} % from {sizes[0]:,.0f} to {sizes[-1]:,.0f} "
            f"parameters, which its error of {100 * error:.2f} % does not tell from nothing; give "
            "sizes further apart, or more seeds"
        )
    return fall


@dataclass(frozen=True)
class Trend:
    """A difference of two places by size: a line in log N, through its means by least squares.

    `slope` is the change by a doubling of the size; `spread` the standard deviation of one
    difference about the line, with `freedom` degrees.
    """

    middle: float
    log_middle: float
    slope: float
    spread: float
    freedom: int
    num_pairs: int
    squares: float

    @property
    def doubling(self) -> Prediction:
        """The slope with its interval."""
        return self._interval(self.slope, 1 / self.squares)

    def at(self, size: float | int) -> float:
        """The difference at `size`."""
        return self.middle + self.slope * (math.log2(size) - self.log_middle)

    def predict(self, size: float | int, pairs: int) -> Prediction:
        """The mean difference of so many further pairs of models, by Student's t."""
        away = math.log2(size) - self.log_middle
        return self._interval(
            self.at(size), 1 / self.num_pairs + away * away / self.squares + 1 / pairs
        )

    def _interval(self, value: float, variances: float) -> Prediction:
        reach = quantile((1 + CONFIDENCE) / 2, self.freedom) * self.spread * math.sqrt(variances)
        return Prediction(value, value - reach, value + reach)


def fit_trend(differences: Mapping[Any, Sequence[float]]) -> Trend:
    """The line through differences by size, a difference a seed.

    Raises UnidentifiedError as `fit_law` does, but for a fall: a difference may well not change.
    """
    cells = [(f"size {size:,.0f}", np.asarray(own, float)) for size, own in differences.items()]
    _deviations(cells, len(cells))
    sizes = np.concatenate(
        [np.full(len(own), math.log2(size)) for size, own in differences.items()]
    )
    values = np.concatenate([own for _, own in cells])
    away = sizes - sizes.mean()
    squares = float(away @ away)
    slope = float(away @ values) / squares
    left = values - values.mean() - slope * away
    freedom = len(values) - 2
    return Trend(
        middle=float(values.mean()),
        log_middle=float(sizes.mean()),
        slope=slope,
        spread=math.sqrt(float(left @ left) / freedom),
        freedom=freedom,
        num_pairs=len(values),
        squares=squares,
    )
