"""Your own Hugging Face checkpoint: what share of images, and go on with its rate or warm up again?

    midstream import MODEL --revision step100000 --rate 6e-4 --out my-model
    midstream import google/siglip-so400m-patch14-384 --out my-encoder
    midstream plan docs/examples/own_checkpoint.py:study \\
        --set checkpoint=my-model --set encoder=my-encoder --set data=DIR
"""

from midstream.config import ContinuedCosine, WarmupCosine
from midstream.recipes.own_model import image_shares
from midstream.study.axes import Axis, grid
from midstream.study.studies import Figure, Study


def study(
    checkpoint: str,
    encoder: str,
    data: str,
    shares: tuple[float, ...] = (0.05, 0.1, 0.3),
    rewarm_rate: float = 3e-3,
    seeds: tuple[int, ...] = (0, 1, 2),
    tokens: int = 2_000_000_000,
    row_length: int = 1024,
    batch_rows: int = 256,
    epochs: int = 2,
    limit: int = 0,
) -> Study:
    """Share of images x schedule x seed, from one imported checkpoint."""
    by_share = image_shares(
        checkpoint=checkpoint,
        encoders=(encoder,),
        data=data,
        shares=shares,
        continue_tokens=tokens,
        max_epochs=8,
        finetune_epochs=epochs,
        row_length=row_length,
        batch_rows=batch_rows,
        limit=limit,
    )
    schedules = {
        "continued": ContinuedCosine(),
        "warmed up again": WarmupCosine(peak_rate=rewarm_rate, end_rate=3e-5, warmup_fraction=0.05),
    }
    lines = []
    for line in by_share.lines:
        # Both training stages that see images get the seed, as the recipe's own lines do.
        for seed in seeds:
            varied = grid(
                line.result,
                schedule=Axis("continue.training.schedule", schedules),
                seed=Axis("continue.training.seed", (seed,)),
            )
            for one in varied:
                (last,) = grid(one.result, seed=Axis("finetune.training.seed", (seed,)))
                axes = {**one.axes, "image_share": line.axes["image_share"]}
                name = ", ".join(f"{axis} {value}" for axis, value in axes.items())
                lines.append(last.model_copy(update={"name": name, "axes": axes}))
    return Study(
        name="own_checkpoint.shares_and_schedules",
        question="What share of images should our checkpoint see, and at which rate?",
        lines=tuple(lines),
        figure=Figure(
            x="image_share", x_label="images in the image-text stage (% of tokens)", by="schedule"
        ),
        baselines=by_share.baselines,
    )
