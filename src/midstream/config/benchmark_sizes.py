"""How much the published benchmarks ask, for plans made before any of them is at hand.

Whole official splits as vlm-evaluation (TRI-ML) and lm-evaluation-harness ask them.
"""

from collections.abc import Mapping
from typing import NamedTuple


class VisualSize(NamedTuple):
    """Questions of a visual task, and the splits that a slim evaluation takes its part of each."""

    questions: int
    splits: int = 1


class TextSize(NamedTuple):
    """Items of a text task, and how many answers each is asked with (BIG-bench's: the chance's)."""

    items: int
    choices: int


VISUAL_SIZES: Mapping[str, VisualSize] = {
    "vqav2": VisualSize(214_354),
    "gqa": VisualSize(12_578),
    "textvqa": VisualSize(5_000),
    "textvqa_ocr": VisualSize(5_000),
    "vizwiz": VisualSize(4_319),
    "pope": VisualSize(8_910, splits=3),
    "refcoco": VisualSize(10_834),
    "refcoco_plus": VisualSize(10_758),
    "refcocog": VisualSize(4_896),
    "ocid_ref": VisualSize(18_342, splits=3),
    "vsr": VisualSize(1_222),
    "tallyqa": VisualSize(38_589, splits=2),
    "ai2d": VisualSize(15_501, splits=2),
}
TEXT_SIZES: Mapping[str, TextSize] = {
    "agieval_sat_en": TextSize(206, 4),
    "arc_easy": TextSize(2_376, 4),
    "bigbench_conceptual_combinations_multiple_choice": TextSize(103, 4),
    "bigbench_cs_algorithms_multiple_choice": TextSize(1_320, 4),
    "boolq": TextSize(3_270, 2),
    "copa": TextSize(100, 2),
    "hellaswag": TextSize(10_042, 4),
    "mathqa": TextSize(2_985, 5),
    "piqa": TextSize(1_838, 2),
    "pubmedqa": TextSize(500, 3),
}
