"""When should images arrive? The starts along one text run, as lines of a study."""

from collections.abc import Sequence
from itertools import product

from midstream.config import Budget, Evaluation, Mixture, Rows, Training
from midstream.recipes.lines import finetuned_line, image_text_schedule, start_at
from midstream.study.stages import Continue, Pretrain, TrainEncoder
from midstream.study.studies import Figure, Line

QUESTION = "After what share of text training should a language model first see images?"
FIGURE = Figure(
    x="text_completion",
    x_label="text training done before the first image (%)",
    hollow=(0.0, 100.0),
)


def arrival_lines(
    text: Pretrain,
    encoder: TrainEncoder,
    completions: Sequence[float],
    seeds: Sequence[int],
    *,
    pictures: Mixture,
    talks: Budget,
    rows: Rows,
    rewarm_rate: float,
    finetune_rate: float,
    asked: Evaluation,
) -> tuple[Line, ...]:
    """Each start, once a seed, continued on `pictures`, fine-tuned on `talks` and evaluated.

    The seed draws the order of captions and conversations, and the projector.
    """
    return tuple(
        finetuned_line(
            Continue(
                data=text.data,
                encoder=encoder,
                decoder=text.decoder,
                start=start_at(text, completion),
                training=Training(
                    budget=pictures,
                    rows=rows,
                    schedule=image_text_schedule(completion, rewarm_rate),
                    seed=seed,
                ),
            ),
            talks,
            finetune_rate,
            asked,
            completion,
        )
        for completion, seed in product(completions, seeds)
    )
