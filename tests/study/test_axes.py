"""Axes over fields: what changes, what is shared, what is refused."""

import pytest

from midstream.config import Rows, WarmupCosine
from midstream.cost.graph import order
from midstream.recipes.paper import figure_8
from midstream.study.axes import Axis, grid, with_field
from midstream.study.stages import Continue, Evaluate, Finetune, InitFrom, Prepare
from midstream.study.studies import Figure, Study, line_name


@pytest.fixture(scope="module")
def base() -> Evaluate:
    return figure_8(seeds=(7,)).lines[0].result


def test_a_grid_shares_every_stage_in_front_of_the_varied_one(base: Evaluate) -> None:
    lines = grid(
        base,
        epochs=Axis("finetune.training.budget.epochs", (1, 2, 3)),
        seed=Axis("finetune.training.seed", (0, 1)),
    )
    study = Study(
        name="mine", question="?", lines=lines, figure=Figure(x="epochs", x_label="epochs")
    )
    stages = order(study)
    assert len(lines) == 6
    assert sum(isinstance(stage, Finetune) for stage in stages) == 6
    assert sum(isinstance(stage, Continue) for stage in stages) == 1
    assert lines[3].axes == {"epochs": 2, "seed": 1}


def test_a_field_of_the_first_stage_changes_every_stage_behind_it(base: Evaluate) -> None:
    changed = with_field(base, "prepare.world.seed", 5)
    assert isinstance(changed.of, Finetune)
    start = changed.of.start
    assert isinstance(start, Continue)
    assert start.data == start.encoder_stage.data == start.start.stage.data  # type: ignore[union-attr]
    assert start.data.world.seed == 5  # type: ignore[union-attr]
    before = base.of.data  # type: ignore[union-attr]
    assert isinstance(before, Prepare)
    assert start.data.source("web").identity != before.source("web").identity
    assert changed.identity != base.identity


def test_a_field_changes_in_both_stages_where_one_starts_from_the_other(base: Evaluate) -> None:
    seen = base.of.start  # type: ignore[union-attr]
    assert isinstance(seen, Continue)
    again = seen.training.model_copy(update={"schedule": WarmupCosine(peak_rate=1e-3)})
    second = seen.model_copy(update={"start": InitFrom(stage=seen), "training": again})
    changed = with_field(
        Evaluate(of=second, evaluation=base.evaluation), "continue.projector.num_layers", 1
    )
    assert isinstance(changed.of, Continue)
    assert isinstance(changed.of.start, InitFrom)
    assert changed.of.projector.num_layers == changed.of.start.stage.projector.num_layers == 1


def test_the_value_that_a_field_has_already_changes_no_identity(base: Evaluate) -> None:
    rows = base.of.start.training.rows  # type: ignore[union-attr]
    same = with_field(base, "continue.training.rows.row_length", rows.row_length)
    assert same.identity == base.identity


def test_values_that_are_no_numbers_have_names_on_the_axis(base: Evaluate) -> None:
    axis = Axis(
        "finetune.training.rows",
        {"short": Rows(row_length=128, batch_rows=2), "long": Rows(row_length=256, batch_rows=1)},
    )
    assert [line.axes["rows"] for line in grid(base, rows=axis)] == ["short", "long"]
    with pytest.raises(ValueError, match="give a dict from a number or a name"):
        grid(base, rows=Axis("finetune.training.rows", list(axis.values.values())))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("continue.training.row", "did you mean 'rows'"),
        ("continue.training.rows.row_lenght", "did you mean 'row_length'"),
        ("continu.training.seed", "did you mean 'continue'"),
        ("finetune", "begins with a kind of stage and a dot"),
        ("continue.training.seed.value", "seed is a int and has no fields"),
        ("continue.training.schedule.peak_rate", "ContinuedCosine has no field 'peak_rate'"),
    ],
)
def test_a_field_that_does_not_exist_is_named_with_what_there_is(
    base: Evaluate, field: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        with_field(base, field, 1)


def test_a_value_that_the_stage_refuses_is_refused(base: Evaluate) -> None:
    with pytest.raises(ValueError, match="row_length"):
        with_field(base, "continue.training.rows.row_length", 4)


def test_places_that_differ_in_a_late_digit_have_names_of_their_own(base: Evaluate) -> None:
    seeds = grid(base, seed=Axis("finetune.training.seed", (20240101, 20240102)))
    assert [line.name for line in seeds] == ["seed 20240101", "seed 20240102"]
    assert line_name({"a": 80.0, "b": 0.25, "c": "short", "d": 7}) == "a 80, b 0.25, c short, d 7"
