"""A new axis: do Adam's moments of the text run help when images arrive?

The paper does not say whether they came along. `optimizer` is a field of the image-text stage's
start, so the question is a grid over it:

    midstream run docs/examples/new_axis.py:study
    midstream report docs/examples/new_axis.py:study
"""

from midstream.recipes.scales import Model, find_scale, line
from midstream.study.axes import Axis, grid
from midstream.study.studies import Claim, Figure, Line, Study


def study(
    scale: str = "pocket",
    end_rates: tuple[float, ...] = (3e-5, 1e-4),
    seeds: tuple[int, ...] = (7, 365, 124),
    inputs: str = "",
    shrink: float = 1.0,
) -> Study:
    """Moments x end rate x seed, from 80 % of text training on."""
    at = find_scale(scale, shrink, inputs=inputs, text="trained")
    lines: list[Line] = []
    for seed in seeds:
        base = line(at, Model(completion=0.8, epochs=2, seed=seed)).result
        lines += [
            Line(
                name=f"{one.name}, seed {seed}", axes={**one.axes, "seed": seed}, result=one.result
            )
            for one in grid(
                base,
                moments=Axis("continue.start.optimizer", ("carry", "fresh", "warm")),
                end_rate=Axis("continue.training.schedule.end_rate", end_rates),
            )
        ]
    return Study(
        name="new_axis.moments",
        question="Should Adam's moments come along when images arrive?",
        lines=tuple(lines),
        figure=Figure(x="moments", x_label="moments of the text run", by="end_rate"),
        claims=(
            Claim(
                text="Carrying the moments gives better vision scores than dropping them",
                higher={"moments": "carry"},
                lower={"moments": "fresh"},
            ),
        ),
    )
