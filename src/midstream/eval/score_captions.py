"""CIDEr-D of captions, as COCO's evaluation has it (Vedantam et al. 2015; cider_scorer.py).

Captions are parted into words by nltk's Penn Treebank rules instead of the Java program of the
original: docs/decisions.md says how far the two agree.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

_LONGEST, _SIGMA = 4, 6.0
# What the original leaves out of captions.
_PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())  # noqa: SIM905
# A full stop that ends a sentence inside a caption: behind a number or a word of two letters or
# more, without other stops in it (p.m.), that is no abbreviation.
_ABBREVIATIONS = "mr|mrs|ms|dr|st|jr|sr|vs|etc"
_STOP = re.compile(rf"(?<![\w.])(?!(?:{_ABBREVIATIONS})\.)([\w'-]*(?:\w\w|\d))\.(?=\s)", re.I)
Grams = Counter[tuple[str, ...]]
# By length of the n-grams: their weights, and the norm of these.
_Vector = list[tuple[dict[tuple[str, ...], float], float]]


def caption_words(text: str) -> list[str]:
    """The words of a caption, lowered, without punctuation."""
    from nltk.tokenize import NLTKWordTokenizer  # type: ignore[import-untyped]

    # The tokenizer parts the last full stop alone.
    parted = " ".join(_STOP.sub(r"\1 .", text).split())
    found = NLTKWordTokenizer().tokenize(parted, convert_parentheses=True)
    # Lowered first: the original keeps "-lrb-" for that reason.
    return [word for word in map(str.lower, found) if word not in _PUNCTUATION]


def one_of(prediction: str, captions: Sequence[str]) -> float:
    """1 if it is one of the captions, word for word."""
    return float(caption_words(prediction) in map(caption_words, captions))


def cider(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> list[float]:
    """Each caption's score against its references (1.0 is what papers print as 100), words being
    weighed by how few of the pictures' references have them; the mean is the benchmark's score."""
    references = [[_grams(caption_words(text)) for text in own] for own in golds]
    frequency = Counter(gram for own in references for gram in set().union(*own))
    total = math.log(len(golds)) if golds else 0.0

    def weighed(grams: Grams) -> tuple[_Vector, int]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * (total - math.log(max(1, frequency[gram])))
        norms = [math.sqrt(math.fsum(w * w for w in part.values())) for part in parts]
        pairs = sum(count for gram, count in grams.items() if len(gram) == 2)
        return list(zip(parts, norms, strict=True)), pairs

    scores = []
    for text, own in zip(predictions, references, strict=True):
        mine, length = weighed(_grams(caption_words(text)))
        found = []
        for other, its_length in map(weighed, own):
            penalty = math.exp(-((length - its_length) ** 2) / (2 * _SIGMA**2))
            found += [penalty * _cosine(a, b) for a, b in zip(mine, other, strict=True)]
        scores.append(10 * math.fsum(found) / (_LONGEST * len(own)))
    return scores


def _grams(words: list[str]) -> Grams:
    return Counter(
        tuple(words[at : at + n])
        for n in range(1, _LONGEST + 1)
        for at in range(len(words) - n + 1)
    )


def _cosine(
    mine: tuple[dict[tuple[str, ...], float], float],
    other: tuple[dict[tuple[str, ...], float], float],
) -> float:
    """With the caption's weights cut to the reference's."""
    (one, norm), (two, its_norm) = mine, other
    shared = math.fsum(min(w, two.get(gram, 0.0)) * two.get(gram, 0.0) for gram, w in one.items())
    return shared / (norm * its_norm) if norm and its_norm else shared
