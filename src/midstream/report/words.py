"""How numbers, places and scores are written."""

from collections.abc import Mapping
from typing import Any

KIND_NAMES = {
    "prepare_world": "World laid out",
    "prepare_tokenizer": "Tokenizer",
    "prepare_source": "Data preparation",
    "train_encoder": "Encoder training",
    "load_encoder": "Imported encoder",
    "fuse_encoders": "Encoders side by side",
    "load_decoder": "Imported language model",
    "load_model": "Imported model that sees",
    "pretrain": "Text pre-training",
    "continue": "Image-text training",
    "finetune": "Fine-tuning",
    "evaluate": "Evaluation",
}
SCORE_NAMES = {
    "stable.vision": "Vision, stable",
    "stable.vision_blind": "Vision, blind",
    "stable.text": "Text, stable",
}


def score_name(score: str) -> str:
    """A column or a score as a table's head names it."""
    name, _, part = score.partition(":")
    if part:
        return f"stable score, {part}" if name == "suite" else f"{name} ({part})"
    return SCORE_NAMES.get(score, score.removesuffix(".score"))


def place(value: Any) -> Any:
    """A value of an axis."""
    return f"{value:g}" if isinstance(value, int | float) else value


def place_words(at: Mapping[str, Any]) -> str:
    """Values of axes: "text completion 80, seed 7"."""
    return ", ".join(f"{axis.replace('_', ' ')} {place(value)}" for axis, value in at.items())


def points(value: float | int) -> str:
    """A score from 0 to 1 in points of 100."""
    return f"{100 * value:.1f}"


def signed(value: float | int) -> str:
    """A difference in points, with its sign; never minus nothing."""
    text = f"{100 * value:+.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def engineering(value: float | int) -> str:
    """Three digits with a unit's letter up to tera, powers of ten above."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value:.2e}" if value >= 1e15 else f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def duration(seconds: float | int) -> str:
    """Seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
