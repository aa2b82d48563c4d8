"""Filled rows against padded rows: how much is padding, and what that costs in useful tokens.

The same examples are laid out both ways; the model, its step and the row length are the pocket
recipe's. Padding is counted over the whole plan; the two layouts take turns in one process. So do
filled rows of interleaved documents and of captions, each beside as many tokens of text.
"""

import argparse
import statistics
import time

import torch

from generated import continue_stage, pocket_sources, rows_of
from midstream.config import AdamW, Machine
from midstream.data.rows import RowDataset, load_steps
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.train.parallel import Place, set_up
from midstream.train.step import make_optimizer, train_step

MIXTURES = {
    "captions": {"pictures": 1.0},
    "captions and text": {"pictures": 0.5, "web": 0.5},
    "conversations": {"talks": 1.0},
}
# Of pictures and their text; the other half is text alone.
HALVES = {"captions": "pictures", "documents": "pages"}


def pad_fraction(dataset: RowDataset) -> float:
    """The share of positions that hold nothing, over all rows of the plan."""
    plan = dataset.plan
    return 1 - plan.seen_tokens / (len(plan) * plan.rows.row_length)


def useful_tokens_per_second(datasets: dict[str, RowDataset], steps: int) -> dict[str, float]:
    """By name: tokens that are not padding, a second of the median step."""
    stage = continue_stage()
    device = torch.device("cpu")
    models = {name: VLM(stage.model) for name in datasets}
    for model in models.values():
        initialise(model, 0)
    optimizers = {name: make_optimizer(model, AdamW()) for name, model in models.items()}
    batches = {
        name: load_steps(dataset, first_row=0, micro_rows=dataset.plan.rows.batch_rows)
        for name, dataset in datasets.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in datasets}
    tokens: dict[str, list[int]] = {name: [] for name in datasets}
    for number in range(steps + 1):
        for name in datasets:
            step = next(batches[name])
            before = time.perf_counter()
            train_step(
                models[name],
                optimizers[name],
                step,
                encode=lambda features: features,
                rate=1e-3,
                settings=AdamW(),
                place=Place(device),
            ).read()
            if number:
                seconds[name].append(time.perf_counter() - before)
                tokens[name].append(sum(batch.counts.seen for batch in step))
    return {
        name: statistics.mean(tokens[name]) / statistics.median(seconds[name]) for name in datasets
    }


def report(datasets: dict[str, RowDataset], rates: dict[str, float]) -> None:
    """A line each."""
    for name, dataset in datasets.items():
        print(
            f"  {name:<9} {len(dataset):>5} rows   {pad_fraction(dataset):>6.1%} padding"
            f"   {rates[name]:>8,.0f} useful tokens/s"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row-length", type=int, help="positions of a row; the recipe's if absent")
    parser.add_argument("--steps", type=int, default=8, help="steps of each layout that count")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    set_up(Machine(threads=options.threads, device="cpu"))
    stage = continue_stage()
    assert stage.model.encoder is not None
    length = options.row_length or stage.training.rows.row_length
    rows = stage.training.rows.model_copy(update={"row_length": length})
    total = (options.steps + 2) * rows.batch_rows * length
    print(
        f"rows of {length}, {rows.batch_rows} a step, {options.steps} steps of each layout, "
        f"{options.threads} thread(s)"
    )
    with pocket_sources() as sources:
        for name, shares in MIXTURES.items():
            datasets = {
                layout: rows_of(
                    sources,
                    stage.model.encoder,
                    rows.model_copy(update={"layout": layout}),
                    shares,
                    total,
                )
                for layout in ("padded", "filled")
            }
            rates = useful_tokens_per_second(datasets, options.steps)
            print(f"{name} ({total:,} tokens planned)")
            report(datasets, rates)
            print(f"  ratio filled / padded: {rates['filled'] / rates['padded']:.2f}")
        filled = rows.model_copy(update={"layout": "filled"})
        datasets = {
            name: rows_of(sources, stage.model.encoder, filled, {source: 0.5, "web": 0.5}, total)
            for name, source in HALVES.items()
        }
        rates = useful_tokens_per_second(datasets, options.steps)
        print(f"half of it text, in filled rows ({total:,} tokens planned)")
        report(datasets, rates)
        print(f"  ratio documents / captions: {rates['documents'] / rates['captions']:.2f}")


if __name__ == "__main__":
    main()
