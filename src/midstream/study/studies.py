"""Lines, and what is asked of them: studies, their figure and table, and suites of studies."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, model_validator

from midstream.config import Config, Fraction, Machine
from midstream.study.stages import Evaluate

Axis = float | int | str


def _placed(values: dict[str, Any]) -> dict[str, Any]:
    """As they came, if a machine can be made of them."""
    Machine.model_validate(values)
    return values


# Fields of `Machine` that a study's runs take unless they are told otherwise; no identity has them.
Placed = Annotated[dict[str, Any], AfterValidator(_placed)]


# What a file system allows of a name, less what is put before and behind it.
MAX_NAME_BYTES = 160


def _named(name: str) -> str:
    """A name as it came, if it can be that of a file and a folder of a store."""
    if not name or name.startswith(".") or not name.isprintable() or "/" in name:
        raise ValueError(
            f"a study's name is that of its files: not empty, no dot before it, no slash and no "
            f"line break in it, but this is {name!r}; give it another"
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"a study's name is that of its files, and {name[:40]!r}... has "
            f"{len(name.encode()):,} bytes; give it one of at most {MAX_NAME_BYTES}"
        )
    return name


StudyName = Annotated[str, AfterValidator(_named)]


class Line(Config):
    """A chain of stages that ends in an evaluated model, and where it lies on the axes."""

    name: str
    axes: dict[str, Axis]
    result: Evaluate


def place_name(place: Axis) -> str:
    """What a place on an axis is called: 7, 0.5, short; whole numbers in all their digits."""
    return f"{place:g}" if isinstance(place, float) else str(place)


def line_name(axes: Mapping[str, Axis]) -> str:
    """The name of a line by where it lies: "epochs 4, seed 7"."""
    return ", ".join(f"{axis} {place_name(place)}" for axis, place in axes.items())


class Figure(Config):
    """The study's picture: stable score over one axis, one curve per value of `by`.

    `hollow` lists the x values whose learning rate was re-warmed (paper, Figure 4).
    """

    x: str
    x_label: str
    by: str | None = None
    hollow: tuple[float, ...] = ()


class Printed(Config):
    """A number that a paper prints: the `score` (0 to 1) of the lines that lie `at` these axes.

    `score` is a task's name, one of its metrics ("hellaswag:acc_norm"), stable.vision or
    stable.text, or the stable score of a published set of tasks ("suite:text, Table 7").
    """

    at: dict[str, Axis]
    score: str
    value: float


class Published(Config):
    """A model of others with the scores (0 to 1) that `source` prints for it, and their ±."""

    name: str
    scores: dict[str, float]
    source: str
    errors: dict[str, float] = Field(default_factory=dict)


class Table(Config):
    """The study's table: means over repetitions of `scores`, the paper's numbers beside them.

    Rows are the values of the axis `rows`, and columns those of `columns`, or the scores where that
    is None. "scores" as `rows` turns the table: a row a score, a column a value of `columns`,
    baselines and `published` models in columns of their own. `source` says where `printed` stand.
    `labels` says in words what a row is: texts by column, by the row's value.
    """

    title: str
    rows: str
    columns: str | None = None
    scores: tuple[str, ...]
    printed: tuple[Printed, ...] = ()
    published: tuple[Published, ...] = ()
    source: str = ""
    labels: dict[str, dict[str, str]] = Field(default_factory=dict)


class Claim(Config):
    """A finding that the study can repeat or not: `score` is higher at one place than at another.

    `higher` and `lower` are values of axes; all lines that have them count, paired by the other
    axes. `source` is where the finding stands.
    """

    text: str
    higher: dict[str, Axis]
    lower: dict[str, Axis]
    score: str = "stable.vision"
    source: str = ""


class Failure(Config):
    """When a model counts as one that did not learn a task, fixed before the study runs.

    On the way from chance (0) to all right (1) it reaches `low` at the most, while at least half of
    the other repetitions at its place reach `high`.
    """

    low: Fraction = 0.1
    high: Fraction = 0.5

    def is_one(self, learnt: float, siblings: float) -> bool:
        """Whether a model that learnt so much failed, where its siblings' median is this."""
        return learnt <= self.low and siblings >= self.high


class Ladder(Config):
    """Lines of several sizes: laws are fitted to all but those at `predict`, and tell these.

    `axis` is that of the sizes, whose places are numbers.
    """

    axis: str
    predict: float


class Asking(Config):
    """What asks for evaluations."""

    @property
    def named_results(self) -> tuple[tuple[str, Evaluate], ...]:
        """Every evaluation that is asked for, under the name of its line or baseline, in a suite
        "<study>: <line or baseline>"."""
        raise NotImplementedError

    @property
    def results(self) -> tuple[Evaluate, ...]:
        """Every evaluation that is asked for."""
        return tuple(result for _, result in self.named_results)


class Study(Asking):
    """A set of lines, the question they answer and the figure that shows it.

    `baselines` are evaluations beside the lines: text-only models, by a name for the table.
    `machine` is where it runs unless a run says otherwise (`launch/local.py`). `text_rates` are
    (tokens, rate) along the text run whose checkpoints are given, for pictures of the rates.
    `smallest_difference` (0.02 are 2 points) is what findings call the same within. `pilot` are the
    seeds that were run first where more were added to decide (`midstream run --decide`). `levels`
    are axes of draws within one another, outermost first, whose own spread the report tells.
    `ladder` has laws over sizes fitted.
    """

    kind: Literal["study"] = "study"
    name: StudyName
    question: str
    lines: tuple[Line, ...]
    figure: Figure
    table: Table | None = None
    claims: tuple[Claim, ...] = ()
    baselines: dict[str, Evaluate] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    machine: Placed = Field(default_factory=dict)
    text_rates: tuple[tuple[int, float], ...] = ()
    smallest_difference: Annotated[float, Field(gt=0, lt=1)] = 0.02
    failure: Failure = Failure()
    pilot: tuple[int, ...] = ()
    levels: tuple[str, ...] = ()
    ladder: Ladder | None = None

    @model_validator(mode="after")
    def _has_its_sizes(self) -> "Study":
        if self.ladder is not None:
            axis, predict = self.ladder.axis, self.ladder.predict
            places = [line.axes.get(axis) for line in self.lines]
            if None in places or predict not in places:
                found = ", ".join(sorted({str(place) for place in places}))
                raise ValueError(
                    f"study {self.name!r} has a ladder along {axis!r} that leaves out {predict:g}, "
                    f"and its lines stand there at {found}; name an axis of every line, and one "
                    "of its places"
                )
        return self

    @property
    def named_results(self) -> tuple[tuple[str, Evaluate], ...]:
        return (*((line.name, line.result) for line in self.lines), *self.baselines.items())

    @property
    def studies(self) -> "tuple[Study, ...]":
        """The studies to report on: this one."""
        return (self,)


class Suite(Asking):
    """Several studies run as one, so that they share their stages; each has its own report.

    `machine` places all of them; what the studies say of it themselves counts where they run alone.
    """

    kind: Literal["suite"] = "suite"
    name: StudyName
    question: str
    studies: tuple[Study, ...]
    notes: tuple[str, ...] = ()
    machine: Placed = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> "Suite":
        by_name: dict[str, Study] = {}
        for study in self.studies:
            other = by_name.setdefault(study.name, study)
            if other is not study:
                raise ValueError(
                    f"suite {self.name!r} has two studies of the name {study.name!r}"
                    + ("" if other == study else " and different content")
                    + "; give each its own"
                )
        return self

    @property
    def named_results(self) -> tuple[tuple[str, Evaluate], ...]:
        return tuple(
            (f"{study.name}: {name}", result)
            for study in self.studies
            for name, result in study.named_results
        )

    @property
    def lines(self) -> tuple[Line, ...]:
        """The lines of all studies."""
        return tuple(line for study in self.studies for line in study.lines)

    @property
    def baselines(self) -> dict[str, Evaluate]:
        """The baselines of all studies, under "<study>: <baseline>"."""
        return {
            f"{study.name}: {name}": result
            for study in self.studies
            for name, result in study.baselines.items()
        }


AnyStudy = Study | Suite

_ADAPTER: TypeAdapter[AnyStudy] = TypeAdapter(Annotated[AnyStudy, Field(discriminator="kind")])


def study_from_json(text: str | bytes) -> AnyStudy:
    """The study or suite written by `model_dump_json()`; ValidationError if it is neither."""
    return _ADAPTER.validate_json(text)
