"""Which shards of a source can be used again, its rejects, and which of its files nobody reads.

Each shard records what it was made from. A source with too many rejects is refused.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from midstream.core.digests import PACKED, TEXT_SUFFIXES, is_note, plain_name
from midstream.core.storage import MANIFEST, read_json, remove_folder
from midstream.core.tokens import counted, name_some
from midstream.data.columns import MADE_FROM, PICTURES, SHARD_INDEX
from midstream.data.formats import conversations, read_captions, read_documents
from midstream.data.formats.captions import NOT_FETCHED
from midstream.data.formats.files import base_name, is_url, shown_files
from midstream.data.formats.read_text import MANIFEST as TOKENS_MANIFEST
from midstream.data.formats.record_files import SPLIT_NAMES, SPLIT_WORD
from midstream.data.formats.records import ReadOptions, Section, Unit, is_picture
from midstream.data.remote import NUM_REQUESTS, Stamp, stamp_of_url
from midstream.data.source_writer import REJECTS, Reject
from midstream.data.sources import FORMAT, INDEX

# By section; raise one when equal input would give another shard: its shards are then made anew.
PREPARATION: dict[Section, int] = {"text": 5, "captions": 7, "conversations": 10, "documents": 6}


@dataclass(frozen=True)
class TaskShare:
    """Every `count`-th unit of a source from `index` on: what one of several tasks makes."""

    index: int
    count: int


@dataclass(frozen=True)
class Job:
    """What all shards of a source have in common; `tokenizer` is the digest of its canonical file,
    `begin_of_text` the token that its examples begin with. `by_command`: `midstream prepare` asks,
    so that messages may advise its options. `copies`: pictures are kept in the source.

    Names of files under the folder `root` are kept relative to it. With a `share`, what is made
    goes to `units`, where a job without one takes it from.
    """

    section: Section
    out: Path
    options: ReadOptions
    root: str
    tokenizer_file: Path
    tokenizer: str
    validation_fraction: float
    begin_of_text: int | None = None
    by_command: bool = False
    copies: bool = False
    share: TaskShare | None = None

    @property
    def shards(self) -> Path:
        """Where the shards lie."""
        return self.out / "shards"

    @property
    def units(self) -> Path:
        """Where tasks publish the shards that they have made, each by its `Todo.key`."""
        return self.out / "units"

    def short(self, name: str) -> str:
        """A local file's name, or a place in it, without the folder that all names start from."""
        return name.removeprefix(self.root.rstrip("/") + "/") if self.root else name

    def folder(self, number: int) -> Path:
        """Where a shard lies."""
        return self.shards / f"{number:06d}"

    def place(self, item: "Todo") -> Path:
        """Where a shard appears once it is made."""
        return self.folder(item.number) if self.share is None else self.units / item.key


@dataclass(frozen=True)
class Todo:
    """A shard that is wanted: its number, its unit, and what its bytes follow from."""

    number: int
    unit: Unit
    made_from: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size of the unit's files."""
        return sum(int(stamp[0] or 0) for stamp in self.made_from["stamps"] if stamp)

    @property
    def key(self) -> str:
        """A name that no shard of other bytes has."""
        return hashlib.sha256(_key(self.made_from).encode()).hexdigest()[:32]


def wanted_shards(job: Job, units: Sequence[Unit]) -> list[Todo]:
    """All shards of a source, or those of the job's share, from its files as they are now."""
    share = job.share or TaskShare(0, 1)
    mine = list(enumerate(units))[share.index :: share.count]
    files = sorted({file for _, unit in mine for file in unit.files})
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        found = pool.map(stamp_of, files)
        stamps = dict(zip(files, found, strict=True))
    common: dict[str, Any] = {
        "preparation": PREPARATION[job.section],
        "format": FORMAT,
        "section": job.section,
        "options": job.options.noted(),
        "root": job.root,
        "tokenizer": job.tokenizer,
        "validation_fraction": job.validation_fraction,
    }
    if job.begin_of_text is not None:
        common["begin_of_text"] = job.begin_of_text
    if job.copies:
        common["copies"] = True
    todo = []
    for number, unit in mine:
        own = {"unit": asdict(unit), "stamps": [stamps[file] for file in unit.files]}
        # As it reads back from a file.
        todo.append(Todo(number, unit, json.loads(json.dumps(common | own))))
    return todo


def local_stamp(path: str) -> Stamp:
    """Size and time of the last change (ns) of a local file; empty where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def settle(job: Job, wanted: Sequence[Todo]) -> list[Todo]:
    """Put the shards that stay in their places, remove the others; returns those to be made.

    A shard stays that was made from what is wanted, picture files included, wherever it stood;
    those that tasks have published are taken. Raises ValueError if something that is no shard lies
    among them. As soon as a shard is moved or removed, `source.json` is gone.
    """
    have = _finished(job)
    kept = {item.number: have.pop(key) for item in wanted if (key := _key(item.made_from)) in have}
    stray = [path for path in _folders(job.shards) if path not in kept.values()]
    moved = {number: path for number, path in kept.items() if path != job.folder(number)}
    todo = [item for item in wanted if item.number not in kept]
    if stray or moved or todo:
        (job.out / INDEX).unlink(missing_ok=True)
    for path in stray:
        remove_folder(path)
    between = {number: job.shards / f"moved-{uuid.uuid4().hex}" for number, path in moved.items()}
    for number, path in moved.items():
        path.rename(between[number])
    for number, path in between.items():
        path.rename(job.folder(number))
    return todo


def lacking(job: Job, wanted: Sequence[Todo]) -> list[Todo]:
    """Those of the wanted shards that nobody has finished; nothing is touched."""
    have = _finished(job)
    return [item for item in wanted if _key(item.made_from) not in have]


def is_made(job: Job, item: Todo) -> bool:
    """Whether this shard is finished: published by a task, or in its place."""
    places = (job.units / item.key, job.folder(item.number))
    return any(_made_from(path) == _key(item.made_from) for path in places)


def set_aside(job: Job, item: Todo) -> None:
    """Make room for a shard where a task has published one whose pictures have changed since.

    Another task may do the same: what it has published meanwhile stays.
    """
    place = job.units / item.key
    old = place.with_name(f".{place.name}.{uuid.uuid4().hex}.old")
    try:
        place.rename(old)
    except FileNotFoundError:
        return
    # Looked at where nobody else moves it.
    if _made_from(old) == _key(item.made_from):
        with suppress(OSError):  # there is one again
            old.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def drop_units(job: Job) -> None:
    """Remove what tasks have published; one that still writes there finds its folder gone."""
    if job.units.is_dir():
        old = job.units.rename(job.out / f".{job.units.name}.{uuid.uuid4().hex}.old")
        # A file that is open on a shared disk may stay, for the next run to remove.
        shutil.rmtree(old, ignore_errors=True)


def _finished(job: Job) -> dict[str, Path]:
    """The whole shards that lie there, by what they were made from; in their places before others
    of equal bytes."""
    folders = (*_folders(job.units), *_folders(job.shards))
    # Servers of pictures are asked about many at once.
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        found = dict(zip(folders, pool.map(_made_from, folders), strict=True))
    return {made: path for path, made in found.items() if made is not None}


def _made_from(path: Path) -> str | None:
    """What a shard was made from; None where it is not whole, or its pictures have changed."""
    if not (path / MADE_FROM).is_file():
        return None
    try:
        made = read_json(path / MADE_FROM)
        pictures = made.pop(PICTURES, None)
        if pictures is None or not is_whole(path):
            return None
    except FileNotFoundError:  # another task is setting it aside
        return None
    same = all(stamp_of(file) == old for file, old in pictures.items())
    return _key(made) if same else None


def _folders(place: Path) -> list[Path]:
    folders = sorted(path for path in place.glob("*") if not path.name.startswith("."))
    for path in folders:
        if not any((path / name).is_file() for name in (SHARD_INDEX, MANIFEST, MADE_FROM)):
            raise ValueError(
                f"{path} is no shard of a prepared source; give another folder to prepare into, "
                "or move it away"
            )
    return folders


def is_whole(path: Path) -> bool:
    """Whether all files of a shard are there, by their sizes."""
    if not (path / MANIFEST).is_file():
        return False
    sizes = {path / name: entry["bytes"] for name, entry in read_json(path / MANIFEST).items()}
    return path / SHARD_INDEX in sizes and all(
        local_stamp(str(file))[:1] == [size] for file, size in sizes.items()
    )


def _key(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def stamp_of(path: str) -> Stamp:
    """What changes when a file does, local or at a URL: its size, and its time or version; empty
    where there is none."""
    if not is_url(path):
        return local_stamp(path)
    try:
        return stamp_of_url(path)
    except FileNotFoundError:
        return []


# How many broken or unread files are listed, and how many rejects of each reason.
NUM_LISTED, NUM_EXAMPLES = 20, 3
# What is to be done about a reason: by `midstream prepare`, and in a study's world.
_ROOT = "names start from the folder of their list"
_REMEDIES: dict[str, tuple[str, str]] = {
    "missing picture": (f"{_ROOT}, or from --images", f"{_ROOT}; put the pictures there"),
    "picture outside the folder": (
        f"{_ROOT}, or from --images; write them from there, and fetch what is a URL",
        f"{_ROOT}; write them from there, and fetch what is a URL",
    ),
    "no text": ("name the field with --text-key", "name the field under `text` in world.json"),
    "no caption": (
        "name the field with --text-key, or take the pictures without one out",
        "it stands under text or caption; take the pictures without one out",
    ),
    "no synthetic caption": ("leave --require out", ""),
    "two captions": ("say which with --text-key (txt or caption)", "take one of them out"),
    "too many tokens": ("raise --max-tokens", ""),
} | {
    reason: (remedy, remedy)
    for reason, remedy in {
        read_captions.DOTTED: "a sample is what stands before the first dot; rename the members",
        "picture cannot be decoded": "fetch them again, or take them out",
        "no picture": "join these records with their pictures, or take them out",
        "no conversation": "give turns with a role and a text under conversations or messages",
        "unknown role": "call them user, assistant, system or tool",
        "roles do not alternate": "give each question one reply",
        "more than one reply": "keep the one to be learnt",
        "options beside a question": "write them into its text, and take their key out",
        "preference pair": "keep the reply to be learnt as the last turn, and take the other out",
        **dict.fromkeys(("reply judged bad", "empty caption"), "take these records out"),
        "several conversations": "write a record for each",
        "weight other than 0 and 1": "give replies a weight of 0 or 1, or none",
        "video or sound": "only texts and pictures are read; take these records out",
        "not a picture name": "give a name, base64 or {bytes, path}",
        "picture under another key": "call it image, or images for a list; or take it out",
        NOT_FETCHED: "img2dataset has not got these pictures; fetch them again",
        "zero-byte picture": "fetch them again, or take them out",
        "more than one picture": "a record shows one; take the others out",
        "picture without <image>": "put <image> into the question that it is for",
        "marks and pictures disagree": "put one <image> for each picture into the questions",
        "picture outside a question": "only questions show pictures; put its mark into one",
        "<image> without a picture": "name the picture under image, or take the mark out",
        "pictures without a text": "a document needs a text beside its pictures; take these out",
        **dict.fromkeys(("not UTF-8", "caption not UTF-8"), "write the file in UTF-8"),
        "not a JSON object": "write an object a line, or one list of objects",
        "wrong number of columns": "quote fields that hold commas",
        "unsafe member name": "pack the files themselves, not links to them (tar --dereference)",
        "member there twice": "give each member once, and those of a sample together",
        "token id outside the vocabulary": "take the tokenizer that made the ids",
    }.items()
}


def refuse_rejects(
    job: Job, stopped: Sequence[Reject], *, records: int, max_reject_fraction: float
) -> None:
    """Write all rejects to `rejects.jsonl`: those of the shards and of shards that were stopped.

    Raises ValueError with both numbers and, by reason, how many there are, what is to be done and
    the first of them, if they are more than `max_reject_fraction` of the `records` read, or all.
    """
    shards = sorted(path for path in job.shards.iterdir() if not path.name.startswith("."))
    counts = Counter(reject.reason for reject in stopped)
    for shard in shards:
        counts.update(read_json(shard / SHARD_INDEX)["rejects"])
    path = job.out / REJECTS
    _write(path, shards, stopped)
    nothing = counts.total() >= max(records, 1)
    num_rejects = counts.total() if nothing else num_counted(counts)
    if num_rejects <= max_reject_fraction * records and not nothing:
        return
    under = f" (names start from {job.root})" if job.root else ""
    limit = "--max-rejects" if job.by_command else "max_reject_fraction of the world"
    raise ValueError(
        f"{num_rejects:,} of {records:,} records read for {job.out} are rejects, "
        f"{num_rejects / records:.3%}; the limit is {max_reject_fraction:.3%}, "
        f"{int(max_reject_fraction * records):,} records{under}\n"
        + "\n".join(_grouped(counts, path, job))
        + f"\nall of them: {path}\n"
        f"finished shards stay: mend the data, or raise the limit ({limit}), and run the same again"
    )


def num_counted(rejects: Mapping[str, int]) -> int:
    """How many of these rejects, counted by reason, the limit is held against."""
    return sum(times for reason, times in rejects.items() if reason != NOT_FETCHED)


def _grouped(counts: Counter[str], path: Path, job: Job) -> Iterator[str]:
    """Each reason once, the most frequent first: its number, its remedy, its first rejects."""
    first: dict[str, list[Reject]] = {reason: [] for reason in counts}
    missing = sum(min(times, NUM_EXAMPLES) for times in counts.values())
    with path.open(encoding="utf-8") as lines:
        while missing and (line := next(lines, "")):
            reject = Reject(**json.loads(line))
            if len(first[reject.reason]) < NUM_EXAMPLES:
                first[reject.reason].append(reject)
                missing -= 1
    for reason, times in counts.most_common():
        remedy = _REMEDIES.get(reason, ("", ""))[not job.by_command]
        yield f"  {times:,} x {reason}" + (f": {remedy}" if remedy else "")
        for reject in first[reason]:
            yield f"    {reject}"


def _write(path: Path, shards: Sequence[Path], stopped: Sequence[Reject]) -> None:
    # Copied file by file: a list of a billion records' rejects need not fit in memory.
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        for shard in shards:
            with (shard / REJECTS).open("rb") as part:
                shutil.copyfileobj(part, stream)
        for reject in stopped:
            line = json.dumps(asdict(reject), ensure_ascii=False) + "\n"
            stream.write(line.encode("utf-8", errors="backslashreplace"))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


READ: dict[Section, tuple[str, ...]] = {
    "text": tuple(f"*{end}" for ends in TEXT_SUFFIXES.values() for end in ends),
    "captions": tuple(name for names in read_captions.NAMES.values() for name in names),
    "conversations": conversations.NAMES,
    "documents": (*(f"*{end}" for end in read_documents.SUFFIXES), "*.jsonl.zip"),
}
# Pictures of others than texts are read by the records that name them.
_DOCUMENTS = TEXT_SUFFIXES["txt"]


def unread_files(section: Section, sources: Sequence[str], units: Sequence[Unit]) -> list[str]:
    """The files in the folders and patterns `sources` that are not in `units`, notes last.

    Hidden files, pictures of records and notes are left out; notes that would be documents by
    their suffix (LICENSE.txt in a folder of texts) are not.
    """
    files = [file for unit in units for file in unit.files]
    # A member of an archive (zip://a.jsonl::a.zip) stands for the archive.
    read = {*files, *(file.rpartition("::")[2] for file in files)}
    tokenised = any(unit.format == "tokens" for unit in units)
    unread = {
        file
        for source in sources
        for file in shown_files(source, read)
        if file not in read and _is_asked(section, base_name(file), tokenised)
    }
    return sorted(unread, key=lambda file: (is_note(base_name(file)), file))


def _is_asked(section: Section, name: str, tokenised: bool) -> bool:
    if section != "text":
        return not is_note(name) and not is_picture(name)
    if is_note(name):
        return name.endswith(_DOCUMENTS)
    return not (tokenised and name == TOKENS_MANIFEST)


def notes_on(section: Section, unread: Sequence[str], read: Sequence[str]) -> Iterator[str]:
    """A line on the files that are not read, and one on splits of a data set read together.

    Both take names as they are to be shown.
    """
    if unread:
        number = counted(len(unread), "file is", "files are")
        known = f"{', '.join(READ[section])}, also compressed ({', '.join(PACKED)})"
        yield f"{number} not read: {name_some(unread, 10)}; files of {section} are {known}"
    whole = [name for name in read if plain_name(base_name(name)).endswith(_DOCUMENTS)]
    if section == "text" and 0 < len(whole) < len(read):
        yield (
            f"beside lines and rows, files are read as one document each: {name_some(whole, 5)}; "
            "give only the others if these are none"
        )
    words = (word for name in read for word in SPLIT_WORD.findall(name.lower()))
    splits = {SPLIT_NAMES.get(word, word) for word in words}
    if len(splits) > 1:
        yield (
            f"files of the splits {', '.join(sorted(splits))} are read as one source; to keep one "
            "for evaluation, give only the others"
        )
