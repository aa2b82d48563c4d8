"""What a benchmark asks, and where its pictures lie."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from midstream.eval.readers.records import Record


@dataclass(frozen=True)
class VisualExample:
    """A question about a picture.

    gold: JSON-able, and what the format's scorer takes. split: splits weigh alike in a score.
    kinds: what the official evaluator breaks its score down by. choices: the fixed answers, where
    there are some. size: the picture's width and height in pixels, where the gold is a box.
    other_id: another id under which people's predictions name it.
    """

    example_id: str
    question: str
    image: Path
    gold: Any
    split: str = ""
    kinds: dict[str, str] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    other_id: str | None = None


class Pictures:
    """A benchmark's pictures, by the names that its files give them.

    They may lie in any of `places` under `folder`. Where they are not `needed` (predictions are
    scored without a model), the first place stands in for what is not there.
    """

    def __init__(self, folder: Path, places: Sequence[str], *, needed: bool) -> None:
        self.folder, self.places, self.needed = folder, (*places, "images", "."), needed
        self._found: dict[str, Path] = {}

    def find(self, record: Record, *names: str) -> Path:
        """The picture of a record, under the first of `names` that is there.

        Raises FileNotFoundError with the record and the path, ValueError for a name that leads
        out of the folder.
        """
        if names[0] in self._found:
            return self._found[names[0]]
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                record.refuse(f"picture {name!r} leads out of {self.folder}")
        paths = [self.folder / place / name for name in names for place in self.places]
        there = next((path for path in paths if path.is_file()), None)
        if there is None and self.needed:
            raise FileNotFoundError(
                f"{record.where} asks for picture {paths[0]}, which does not exist; "
                "put the benchmark's pictures there (docs/evaluation.md)"
            )
        return self._found.setdefault(names[0], there or paths[0])


def plain_words(text: str) -> str:
    """A text without regard to case and white space, as joins by words compare it."""
    return " ".join(text.split()).casefold()


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels; ValueError names a file that is no picture."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that Pillow can read; replace the file") from None


def coco_names(subset: str, number: int) -> tuple[str, ...]:
    """The names that COCO's picture has had: with its subset (val2014) and, from 2017, without."""
    names = [f"COCO_{one}_{number:012d}.jpg" for one in dict.fromkeys((subset, *_COCO_SUBSETS))]
    return (*names, f"{number:012d}.jpg")


_COCO_SUBSETS = ("val2014", "train2014")
