"""Filled rows against padded ones at the paper's sizes: how much of what is computed is padding.

Rows of 1,024 positions and 729 patches a picture; lengths only, nothing is decoded. Real lengths
come from `--captions` (CSV with a column "caption") and `--texts` (JSON lines with "text" or plain
text, a document a line), tokenised with `--tokenizer`; without them they are drawn like them.
`--documents N`: instead N interleaved documents alone, drawn as OBELICS has them, in rows of 2,048
and 4,096: in as few pieces as there may be, as they are cut, and what a bin packer reaches where
every picture and text of the longer ones, or of all, is an item of its own.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from midstream.config import Epochs, Mixture, Rows, Share
from midstream.data.source_writer import MAX_TEXT_TOKENS
from midstream.order import plan as order_plan
from midstream.order.mixture import Supply
from midstream.order.pack import Packer
from midstream.order.plan import Filled, RowPlan, make_plan
from midstream.order.stream import ArrayLengths, parts_of

PATCHES, ROW_LENGTH = 729, 1024


def drawn_lengths() -> tuple[np.ndarray, np.ndarray]:
    """Captions and documents of log-normal lengths."""
    random = np.random.default_rng(0)
    captions = 2 + np.exp(random.normal(np.log(12), 0.3, 12_500)).round()
    documents = np.exp(random.normal(np.log(600), 1.0, 2_000)).round()
    return captions.astype(np.int64), np.maximum(documents, 1).astype(np.int64)


def real_lengths(captions: Path, texts: list[Path], tokenizer: Path) -> tuple[np.ndarray, ...]:
    """Tokens of each caption (separator and end-of-text included) and document."""
    encoder = Tokenizer.from_file(str(tokenizer))
    with captions.open(encoding="utf-8", newline="") as stream:
        shown = [row["caption"] for row in csv.DictReader(stream)]
    documents = []
    for path in texts:
        for line in path.read_text(encoding="utf-8").splitlines():
            documents.append(json.loads(line)["text"] if path.suffix == ".jsonl" else line)
    found = [
        np.array([len(item.ids) for item in encoder.encode_batch(part)])
        for part in (shown, [text for text in documents if text])
    ]
    return found[0] + 2, found[1] + 1


def plan_of(captions: np.ndarray, documents: np.ndarray, share: float, layout: str) -> RowPlan:
    """Nine tenths of all captions, and texts for the rest of the tokens, repeated as needed."""
    parts = np.concatenate(
        [np.minimum(MAX_TEXT_TOKENS, n - np.arange(0, n, MAX_TEXT_TOKENS)) for n in documents]
    )
    supplies = [
        Supply("captions", ArrayLengths(captions + PATCHES), False),
        Supply("web", ArrayLengths(parts), True),
    ]
    budget = Mixture(
        total_tokens=int(0.9 * (captions + PATCHES).sum()),
        shares=(Share(source="captions", share=share), Share(source="web", share=1 - share)),
        max_epochs=1000,
    )
    rows = Rows(row_length=ROW_LENGTH, batch_rows=8, layout=layout)
    return make_plan(supplies, budget, rows, 0)


def padding(plan: RowPlan) -> float:
    """The share of positions that hold nothing, over all rows."""
    return 1 - plan.seen_tokens / (len(plan) * plan.rows.row_length)


class Documents(ArrayLengths):
    """815 text tokens in the mean, log-normal with a deviation of 1 of the logarithm, and 2.5
    pictures, geometric and at most 30, anywhere among the tokens."""

    def __init__(self, count: int, num_patches: int) -> None:
        random = np.random.default_rng(0)
        tokens = np.maximum(np.rint(random.lognormal(np.log(815) - 0.5, 1.0, count)), 2)
        pictures = np.minimum(random.geometric(1 / 2.5, count), np.minimum(30, tokens))
        self.parted = []
        for number, shown in zip(tokens.astype(int), pictures.astype(int), strict=True):
            places = sorted(random.choice(number, shown, replace=False).tolist())
            self.parted.append(parts_of(places, int(number), num_patches))
        super().__init__(np.array(list(map(sum, self.parted))))

    def parts(self, example: int) -> list[int]:
        """Texts and pictures."""
        return self.parted[example]


def separate(lengths: Documents, row_length: int, longer_alone: bool) -> float:
    """Padding where the parts of documents (of those longer than a row alone) go apart."""
    items = [
        part
        for parts in lengths.parted
        for whole in ([sum(parts)] if longer_alone and sum(parts) <= row_length else parts)
        for part in (*[row_length] * (whole // row_length), whole % row_length)
        if part
    ]
    packer = Packer(row_length)
    packer.add_all(np.array([[0, 0, 0, part, 0] for part in items]))
    return 1 - lengths.total / (len(packer.rows) * row_length)


def print_documents(count: int) -> None:
    """A line for each length of rows and positions of a picture."""
    print("row   a picture   padding: fewest pieces   as cut   longer ones apart   all apart")
    for row_length in (2048, 4096):
        for num_patches in (64, 144, 256, 576):
            lengths, told, pieces = Documents(count, num_patches), list[float](), list[float]()
            longer = int((lengths.lengths > row_length).sum())
            for order_plan.LEAST_FULL in (0, 990):
                supply = Supply("pages", lengths, False)
                rows = Rows(row_length=row_length, batch_rows=8)
                plan = make_plan([supply], Epochs(sources=("pages",), epochs=1), rows, 0)
                assert isinstance(plan.layout, Filled)
                told.append(padding(plan))
                pieces.append((plan.layout.num_placed(0) - count + longer) / longer)
            told += [separate(lengths, row_length, one) for one in (True, False)]
            columns = "{}{:>12}{:>25.2%}{:>9.2%}{:>20.2%}{:>12.2%}"
            print(
                columns.format(row_length, num_patches, *told),
                "  {:.0%} cut, in {:.1f} and {:.1f} pieces".format(longer / count, *pieces),
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--documents", type=int)
    options = parser.parse_args()
    if options.documents:
        print_documents(options.documents)
        return
    if options.captions:
        captions, documents = real_lengths(options.captions, options.texts, options.tokenizer)
    else:
        captions, documents = drawn_lengths()
    print(
        f"{len(captions):,} captions of {captions.mean():.1f} tokens, "
        f"{len(documents):,} documents of {documents.mean():.0f} (mean)"
    )
    print("share of images   padding: filled   padded   useful tokens a row: filled / padded")
    for share in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        filled, padded = (
            padding(plan_of(captions, documents, share, layout)) for layout in ("filled", "padded")
        )
        print(f"{share:>15.0%} {filled:>17.2%} {padded:>8.2%} {(1 - filled) / (1 - padded):>24.2f}")
    print(
        f"a row holds one picture: at {(captions.mean() + PATCHES) / ROW_LENGTH:.0%} images every "
        "tail is filled, beyond that there are fewer texts than tails"
    )


if __name__ == "__main__":
    main()
