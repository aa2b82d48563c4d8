"""What readers share: `VisualExample`, and records whose errors name file and entry."""

import gzip
import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

from PIL import Image, UnidentifiedImageError

from midstream.config.training import is_pool
from midstream.core.digests import is_hidden
from midstream.core.storage import write_bytes
from midstream.data.examples import IMAGE_MARK, without_marks
from midstream.data.formats.files import packing
from midstream.data.formats.packed import decoded

# Where pictures out of tables lie: hidden, and so no part of a benchmark's identity.
UNPACKED = ".pictures"
# Bytes by which a file is known.
_HEAD = 16
_PACKED = (".zip", ".tar", ".gz", ".tgz", ".7z")


@dataclass(frozen=True)
class Record:
    """One record of a file; its errors say where it stands, and how it is mended."""

    where: str
    value: Any
    remedy: str = "give the official file, or mend this record"

    def __contains__(self, key: str) -> bool:
        """Whether it says something under `key`; null says nothing."""
        return isinstance(self.value, dict) and self.value.get(key) is not None

    def get(self, key: str, kind: type) -> Any:
        """The value under `key`; ValueError if it is absent or no `kind` (bool never is)."""
        if not isinstance(self.value, dict):
            self.refuse(f"it is a {type(self.value).__name__}, not an object")
        if key not in self.value:
            self.refuse(f"it has no {key!r}, only {', '.join(map(str, self.value))}")
        value = self.value[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            self.refuse(f"its {key!r} is {value!r}, not a {kind.__name__}")
        return value

    def text(self, key: str) -> str:
        """The text under `key`."""
        return str(self.get(key, str))

    def texts(self, key: str, least: int = 1) -> list[str]:
        """The list of `least` texts or more under `key`."""
        values = list(self.get(key, list))
        if len(values) < least or not all(isinstance(value, str) for value in values):
            told = json.dumps(values)[:80]
            self.refuse(f"its {key!r} is no list of {least} or more texts: {told}")
        return values

    def index(self, key: str, count: int) -> int:
        """The number under `key`, which counts `count` options from 0."""
        index = self.get(key, int)
        if not 0 <= index < count:
            self.refuse(f"its {key} {index} is none of {count} options")
        return int(index)

    def records(self, key: str) -> list["Record"]:
        """The records in the list under `key`."""
        values = enumerate(self.get(key, list))
        return [Record(f"{self.where} {key} {number}", value) for number, value in values]

    def one_of(self, key: str, *values: str) -> str:
        """The number or text under `key`, one of `values`."""
        value = self.identifier(key)
        value = value if value in values else value.strip().lower()
        if value not in values:
            self.refuse(f"its {key} is {value!r}, not {' or '.join(values)}")
        return value

    def kinds(self, *keys: str) -> dict[str, str]:
        """As text what it says under `keys`, of those that it has."""
        return {key: str(self.value[key]) for key in keys if key in self.value}

    def identifier(self, key: str) -> str:
        """The number or text under `key`, as text."""
        value = self.get(key, object)
        if isinstance(value, float) and value.is_integer():  # as pandas writes them
            value = int(value)
        if not isinstance(value, int | str):
            self.refuse(f"its {key!r} is {value!r}, neither a number nor a text")
        return str(value)

    def refuse(self, problem: str) -> NoReturn:
        """Raise ValueError with the place, the problem and the remedy."""
        raise ValueError(f"{self.where}: {problem}; {self.remedy}")


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, texts and numbers only: a pickle that names code cannot run it."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse code in a pickle."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, and nothing in it may be code")


def load_plain_pickle(path: Path) -> list[Any]:
    """The list in a pickle of plain values; ValueError for one that names code or is broken."""
    if not path.is_file():
        missing(path)
    try:
        with path.open("rb") as stream:
            packing(str(path), stream.read(_HEAD))
            stream.seek(0)
            # latin1 reads the byte strings of Python 2, in which the file was written.
            value = _PlainUnpickler(stream, encoding="latin1").load()
        if not isinstance(value, list):
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
    except Exception as error:  # a broken pickle raises anything
        raise ValueError(f"{path} is refused: {error}; give the official file") from None
    return value


def missing(path: Path) -> NoReturn:
    """Raise FileNotFoundError that lists what the folder holds instead."""
    there = sorted(item.name for item in path.parent.glob("*"))
    held = f"the folder holds {', '.join(there[:20])}" if there else "the folder is empty or absent"
    packed = [name for name in there if name.endswith(_PACKED)]
    held += f" (unpack {packed[0]} there?)" if packed else ""
    raise FileNotFoundError(f"{path} does not exist; {held} (docs/evaluation.md)")


def read_text(path: Path) -> str:
    """A file's text, gzip undone where its first bytes say so; ValueError names what is no text."""
    content = path.read_bytes()
    packing(str(path), content[:_HEAD])  # refuses what stands for a file that was not fetched
    if content.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is a zip archive; unpack it")
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return decoded(content)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        told = "save it as UTF-8, or fetch it again"
        raise ValueError(f"{path} is no whole text file ({error}); {told}") from None


def read_json_file(path: Path) -> Any:
    """A JSON file in which no object holds a key twice."""
    if not path.is_file():
        missing(path)
    try:
        text = read_text(path)
        return json.loads(text, object_pairs_hook=lambda pairs: no_key_twice(pairs, path))
    except json.JSONDecodeError as error:
        told = (
            f"{path} is not JSON (line {error.lineno}: {error.msg}); give the official file, whole"
        )
        raise ValueError(told) from None


def find_file(folder: Path, *patterns: str, own: bool = False) -> Path:
    """The file of a folder that the first fitting pattern names; no training file of a benchmark
    where no shots are drawn from it. `own` questions may be called anything.

    Raises FileNotFoundError that lists what is there, ValueError where a pattern fits several.
    """
    for pattern in patterns:
        found = sorted(p for p in folder.glob(pattern) if p.is_file() and not is_hidden(p.name))
        if not (own or is_pool(folder.name)):
            found = [path for path in found if "train" not in re.split(r"[\W_\d]+", path.stem)]
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in found[:5])
            raise ValueError(f"{folder} holds several files like {pattern}: {names}; keep one")
        if found:
            return found[0]
    missing(folder / patterns[0])


def split_of(folder: Path, split: str) -> str:
    """The split whose files a folder holds: `split`, or "train" where shots are drawn from it."""
    return "train" if is_pool(folder.name) else split


def no_key_twice(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """An object of a JSON file; ValueError for a key that it holds twice."""
    # json keeps the last of equal keys, which would drop a question without a word.
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{path} holds key {twice!r} twice in one object; remove one of them")
    return dict(pairs)


def records(path: Path, key: str = "") -> Iterator[Record]:
    """The records of a JSON list, or of the list `key` in a JSON object; ValueError if there are
    none."""
    value = read_json_file(path)
    found = (value.get(key) if isinstance(value, dict) else None) if key else value
    if not isinstance(found, list) or not found:
        listed = f"list {key!r}" if key else "list"
        raise ValueError(f"{path} holds no {listed} of records; give the official file")
    for index, record in enumerate(found):
        yield Record(f"{path} {key} record {index}" if key else f"{path} record {index}", record)


def entries(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a JSON object by id; ValueError if there are none or an id comes twice."""
    value = read_json_file(path)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path} holds no object of records by id; give the official file")
    for key, record in value.items():
        yield key, Record(f"{path} record {key!r}", record)


def lines(path: Path, remedy: str = Record.remedy) -> Iterator[Record]:
    """The records of a file of JSON lines, or of a JSON list; ValueError if there are none."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from records(path)
        return
    found = text.split("\n")  # a text may hold U+2028
    if not any(line.strip() for line in found):
        raise ValueError(f"{path} is empty; {remedy}")
    for number, line in enumerate(found, start=1):
        if not line.strip():
            continue
        try:
            yield Record(f"{path} line {number}", json.loads(line), remedy)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error.msg}); {remedy}") from None


def gqa_kinds(record: Record) -> dict[str, str]:
    """The kinds of a question of GQA, as the official evaluator parts them."""
    types = record.get("types", dict) if "types" in record else {}
    kinds = {name: str(types[name]) for name in ("structural", "semantic") if types.get(name)}
    if "structural" in kinds:
        kinds["form"] = "open" if kinds["structural"] == "query" else "binary"
    return kinds


def add(table: dict[str, Any], key: str, value: Any, record: Record) -> None:
    """Put `value` under `key`; ValueError names the record if the key is taken."""
    if key in table:
        record.refuse(f"id {key} stands there twice")
    table[key] = value


class Shot(NamedTuple):
    """A question with its answer and pictures that stands before another one as a turn."""

    question: str
    reply: str
    pictures: tuple[Path, ...]


class Shown(NamedTuple):
    """What a question shows beside a single picture: several, in the order of the image marks in it
    (those that have none stand before it), and the shots before it; whether other questions share
    these shots. `document`: all of it as one document rather than turns."""

    pictures: tuple[Path, ...]
    shots: tuple[Shot, ...] = ()
    shared: bool = True
    document: bool = False


def all_pictures(image: Path | Shown | None) -> tuple[Path, ...]:
    """Every picture that stands before a reply, in order."""
    if isinstance(image, Shown):
        return (*(path for shot in image.shots for path in shot.pictures), *image.pictures)
    return () if image is None else (image,)


def places(question: str, num_pictures: int) -> tuple[str, tuple[int, ...]]:
    """A question without its image marks, and where its pictures stand (`Turn.pictures`).

    Raises ValueError for more marks than pictures.
    """
    text, marked = without_marks(question)
    if len(marked) > num_pictures:
        raise ValueError(
            f"{question[:80]!r} has {len(marked)} {IMAGE_MARK} marks and {num_pictures} pictures"
        )
    return text, (0,) * (num_pictures - len(marked)) + marked


def marked(record: Record, question: str, num_pictures: int) -> str:
    """A record's question with the image marks that say where its pictures stand; the mark of a
    single one is taken out. ValueError names the record where it has more marks than pictures."""
    marks = question.count(IMAGE_MARK)
    if marks > num_pictures:
        record.refuse(f"it has {marks} {IMAGE_MARK} marks, {num_pictures} pictures")
    return question if num_pictures > 1 else question.replace(IMAGE_MARK, "").strip()


@dataclass(frozen=True)
class VisualExample:
    """A question about a picture, or about several.

    more: its pictures behind the first; marks in the question say where they stand (`Shown`).
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
    more: tuple[Path, ...] = ()

    @property
    def pictures(self) -> tuple[Path, ...]:
        """All its pictures, in order."""
        return (self.image, *self.more)

    def showing(
        self,
        pictures: tuple[Path, ...],
        shots: tuple[Shot, ...] = (),
        *,
        shared: bool = True,
        document: bool = False,
    ) -> Path | Shown:
        """What is shown where these are its pictures, behind shots, which others may share, in
        turns or as a document."""
        if len(pictures) == 1 and not shots:
            return pictures[0]
        return Shown(pictures, shots, shared, document)


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
                f"{record.where} asks for picture {paths[0]}, which does not exist; put it there"
            )
        return self._found.setdefault(names[0], there or paths[0])

    def unpack(self, record: Record, value: Any) -> Path:
        """The picture in a table's cell as a file of its own, in a hidden folder beside the table:
        no part of the benchmark's files, and written once. Without need the first place stands in.

        Raises ValueError for a cell without bytes and for a folder that cannot be written to.
        """
        held = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(held, bytes) or not held:
            record.refuse("one of its pictures has no bytes in the table")
        path = self.folder / UNPACKED / hashlib.sha256(held).hexdigest()[:32]
        if not self.needed:
            return path
        if not path.is_file():
            try:
                path.parent.mkdir(exist_ok=True)
                write_bytes(path, held)
            except OSError as error:
                raise ValueError(
                    f"pictures of {record.where} cannot be unpacked into {path.parent} ({error}); "
                    "copy the benchmark's folder to where it can be written"
                ) from None
        return path


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
    names = [
        f"COCO_{one}_{number:012d}.jpg" for one in dict.fromkeys((subset, "val2014", "train2014"))
    ]
    return (*names, f"{number:012d}.jpg")


def both_names(name: str) -> tuple[str, ...]:
    """A picture of COCO by its name of 2014, and its name since 2017, which is its number alone."""
    return name, re.sub(r"^COCO_\w+_(\d{12}\.jpg)$", r"\1", name)
