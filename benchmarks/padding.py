"""Filled rows against padded ones at the paper's sizes: how much of what is computed is padding.

Rows of 1,024 positions and 729 patches a picture; lengths only, nothing is decoded. Real lengths
come from `--captions` (CSV with a column "caption") and `--texts` (JSON lines with "text" or plain
text, a document a line), tokenised with `--tokenizer`; without them they are drawn like them.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from midstream.config import Mixture, Rows, Share
from midstream.data.source_writer import MAX_TEXT_TOKENS
from midstream.order.mixture import Supply
from midstream.order.plan import RowPlan, make_plan
from midstream.order.stream import ArrayLengths

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
    return 1 - plan.seen_tokens / (len(plan) * ROW_LENGTH)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
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
