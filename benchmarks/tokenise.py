"""Tokenising: `encode_batch` of `tokenizers` against Midstream's `TextCodec.encode_many`.

The same texts through the same tokenizer, the sides taking turns in one process that uses one
thread. The time is that of the processor, from a list of texts to a list of lists of ids; the ids
are compared, and a difference ends the script with an error.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from midstream.data.examples import TextCodec
from midstream.data.tokenise import open_tokenizer

# Characters of one text: about a long web page.
TEXT_LENGTH = 10_000
NUM_WORDS = 20_000
SUFFIXES = {".txt", ".md", ".tex", ".csv", ".tsv", ".json"}
Side = Callable[[list[str]], list[list[int]]]


def generated_texts(total: int) -> list[str]:
    """About `total` characters of words that come as often as in English (Zipf), in sentences."""
    draw = random.Random(0)
    parts = [
        "th",
        "an",
        "er",
        "in",
        "re",
        "on",
        "at",
        "es",
        "or",
        "ti",
        "st",
        "al",
        "ou",
        "le",
        "k",
    ]
    words = ["".join(draw.choices(parts, k=draw.randrange(1, 5))) for _ in range(NUM_WORDS)]
    weights = [1 / (rank + 3) for rank in range(NUM_WORDS)]
    texts = []
    while total > 0:
        drawn = iter(draw.choices(words, weights, k=TEXT_LENGTH // 4))
        text = " ".join(_sentences(drawn, draw))[:TEXT_LENGTH]
        texts.append(text)
        total -= len(text)
    return texts


def _sentences(words: Iterator[str], draw: random.Random) -> Iterator[str]:
    while sentence := [word for word, _ in zip(words, range(draw.randrange(4, 25)), strict=False)]:
        sentence[0] = sentence[0].capitalize()
        middle = draw.randrange(len(sentence))
        sentence[middle] += draw.choice([",", ";", "'s", "’s", f" {draw.randrange(2000)}", ""])
        yield " ".join(sentence) + draw.choice([".", ".", ".", "?", "!", ".\n", ".\n\n"])


def texts_of(paths: list[Path]) -> list[str]:
    """The texts of files and folders: `jsonl` by its field `text`, others in pieces.

    Raises FileNotFoundError for a path that does not exist or a folder without text.
    """
    texts: list[str] = []
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        before = len(texts)
        for file in files:
            if file.suffix == ".jsonl":
                lines = file.read_text(encoding="utf-8").split("\n")
                texts += [str(json.loads(line)["text"]) for line in lines if line.strip()]
            elif file.suffix in SUFFIXES or file == path:
                text = file.read_bytes().decode(errors="replace")
                texts += [text[at : at + TEXT_LENGTH] for at in range(0, len(text), TEXT_LENGTH)]
        if len(texts) == before:
            raise FileNotFoundError(f"{path} holds no text ({', '.join(sorted(SUFFIXES))}, .jsonl)")
    return texts


def trained_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE as the pocket recipe trains one."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    return found


def seconds_of(side: Side, texts: list[str]) -> float:
    """Processor seconds of one pass over all texts."""
    before = time.process_time()
    side(texts)
    return time.process_time() - before


def main() -> None:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files or folders")
    parser.add_argument("--tokenizer", help="a tokenizer's file, folder or hub name")
    parser.add_argument("--characters", type=int, default=2_000_000, help="of generated text")
    parser.add_argument("--vocab-size", type=int, default=16_384, help="of the trained tokenizer")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = texts_of(options.text) if options.text else generated_texts(options.characters)
    tokenizer = (
        open_tokenizer(options.tokenizer)
        if options.tokenizer
        else trained_tokenizer(texts[: max(1, len(texts) // 2)], options.vocab_size)
    )
    codec = TextCodec(tokenizer)

    def plain(batch: list[str]) -> list[list[int]]:
        found = codec.tokenizer.encode_batch(batch, add_special_tokens=False)
        return [list(item.ids) for item in found]

    before = time.process_time()
    codec.encode("The first text opens the fast path.")
    opening = time.process_time() - before
    expected, found = plain(texts), codec.encode_many(texts)
    different = [
        n for n, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]
    ]
    if different:
        sys.exit(f"the ids of {len(different):,} of {len(texts):,} texts differ: {different[:10]}")
    num_tokens = sum(map(len, found))
    del expected, found
    sides: dict[str, Side] = {"tokenizers": plain, "midstream": codec.encode_many}
    seconds = {name: [] for name in sides}  # type: dict[str, list[float]]
    for _ in range(options.rounds):
        for name, side in sides.items():
            seconds[name].append(seconds_of(side, texts))
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"{len(texts):,} texts, {size:.1f} MB, {num_tokens:,} tokens of a vocabulary of "
        f"{codec.size:,}; the same ids on both sides; {options.rounds} rounds"
    )
    for name, each in seconds.items():
        print(
            f"  {name:<10} {size / statistics.median(each):>6.2f} MB a processor second "
            f"(best {size / min(each):.2f})"
        )
    ratios = [a / b for a, b in zip(seconds["tokenizers"], seconds["midstream"], strict=True)]
    print(f"  ratio midstream / tokenizers: {statistics.median(ratios):.2f}")
    print(f"  opening, once a process: {opening:.2f} s")


if __name__ == "__main__":
    main()
