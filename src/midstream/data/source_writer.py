"""Writing a prepared source: one folder a shard, then the index that completes it."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from midstream.core.identity import Kind
from midstream.core.storage import MANIFEST, read_json, remove_folder, write_bytes, write_json
from midstream.core.tokens import shown_name
from midstream.data.columns import (
    COLUMNS,
    MOST_SEPARATE,
    OWN_PICTURES,
    SHARD_INDEX,
    Shard,
    join_columns,
)
from midstream.data.examples import Example
from midstream.data.lengths import caption_facts, length_facts
from midstream.data.sources import FORMAT, INDEX, content_hash

T = TypeVar("T")
REJECTS = "rejects.jsonl"
# A longer text is stored in parts of this many tokens, each an example: what is shuffled, and what
# a plan reads at once, stays small beside a row's block.
MAX_TEXT_TOKENS = 8192


@dataclass(frozen=True)
class Reject:
    """A record that is left out: `where` it stands, the `reason` it is counted under, `detail`."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class RejectedError(Exception):
    """What a record says, or names, cannot be used: the `reason` and `detail` of its `Reject`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})")
        self.reason, self.detail = reason, detail

    def at(self, where: str) -> Reject:
        """The reject of the record that stands there."""
        return Reject(where, self.reason, self.detail)


def or_reject(where: str, make: Callable[..., T], *arguments: Any) -> T | Reject:
    """What `make` returns for the record that stands there, or the reject that it raises."""
    try:
        return make(*arguments)
    except RejectedError as error:
        return error.at(where)


@dataclass(frozen=True)
class Image:
    """Where a picture's bytes lie: file (under the source's root, or a URL), offset and size.

    No file: nowhere but in its record; the shard keeps them in `OWN_PICTURES`.
    """

    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shown:
    """A picture of an example: the token it stands before, where its bytes lie, and these."""

    place: int
    image: Image
    data: bytes


@dataclass(frozen=True)
class _Added:
    input_ids: np.ndarray
    supervised: np.ndarray
    name: str
    # Token, image and hash of each.
    pictures: tuple[tuple[int, Image, bytes], ...]
    hash: bytes
    synthetic: tuple[Example, ...]


class ShardWriter:
    """Collects the examples of one shard in `folder`, which must not exist; `close` completes it.

    Use it inside `storage.new_folder`, so that the folder appears whole under its name.
    `validation_fraction` of the examples, chosen by their content hash, go to the validation
    split: all captions of a picture, and equal texts, go the same way. `head` tokens begin each
    example: before a picture that stands first.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: Kind,
        dtype: str,
        input_name: str,
        validation_fraction: float = 0.0,
        head: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.kind, self.dtype = folder, kind, np.dtype(dtype)
        self.input_name, self.head = input_name, head
        # A hash is below this with the asked probability.
        self._validation_below = int(validation_fraction * 2**64)
        self._validation: list[_Added] = []
        self._lengths: list[int] = []
        self._num_images: list[int] = []
        # File, offset, bytes and token of each picture, and its hash.
        self._pictures: list[tuple[int, int, int, int]] = []
        self._picture_hashes: list[bytes] = []
        # Whether an example shows other than one picture at most, behind its head.
        self._several = kind == "interleaved"
        self._hashes: list[bytes] = []
        self._files: dict[str, int] = {}
        # By hash, where the bytes of pictures without a file stand in the shard's own.
        self._own: dict[bytes, int] = {}
        self._own_bytes = 0
        self._rejects: list[Reject] = []
        self._records = self._left_out = 0
        self._dropped_turns = Counter[str]()
        self._longest: dict[str, dict[str, Any]] = {}
        self._synthetic: list[tuple[Example, ...]] = []
        self._tokens = (folder / "tokens.bin").open("wb")
        self._supervised = None if kind == "text" else (folder / "supervised.bin").open("wb")
        names = folder / "names.txt"
        self._names = (
            None if kind == "text" else names.open("w", encoding="utf-8", errors="backslashreplace")
        )

    def add(
        self,
        input_ids: np.ndarray,
        supervised: np.ndarray,
        *,
        name: str,
        content: bytes,
        image: Image | None = None,
        pictures: Sequence[Shown] = (),
        synthetic: Sequence[Example] = (),
        left_out: int = 0,
    ) -> None:
        """One example; `content` is its picture's bytes, or its text's where it has none, or
        whatever else says in which split it is.

        `image` is its only picture, behind what begins the example; `pictures` are all of others.
        Texts of more than MAX_TEXT_TOKENS become several examples. A picture with `synthetic`
        captions may have none of its own (no `input_ids`); `left_out` counts those of its captions
        that cannot be used. Raises ValueError with the name for places that are no ascending
        numbers of tokens.
        """
        hashed = content_hash(content)
        if image is not None:
            pictures = [Shown(self.head, image, content)]
        places = [shown.place for shown in pictures]
        # A picture may have synthetic captions alone.
        most = max(len(ids) for ids in (input_ids, *(one.input_ids for one in synthetic)))
        if image is None and (
            sorted(places) != places or any(not 0 <= place < most for place in places)
        ):
            raise ValueError(
                f"{name}: its pictures stand before the tokens {places}, it has "
                f"{most:,}; give places in ascending order, each before a token"
            )
        kept = tuple(map(self._keep, pictures))
        is_plain = places == [self.head] and kept[0][2] == hashed
        self._several |= bool(kept) and not is_plain
        self._records += 1
        self._left_out += left_out
        size = MAX_TEXT_TOKENS if self.kind == "text" else max(len(input_ids), 1)
        for low in range(0, max(len(input_ids), bool(synthetic)), size):
            part = slice(low, low + size)
            added = _Added(input_ids[part], supervised[part], name, kept, hashed, tuple(synthetic))
            if int.from_bytes(hashed[:8], "big") < self._validation_below:
                self._validation.append(added)
            else:
                self._write(added)

    def _keep(self, shown: Shown) -> tuple[int, Image, bytes]:
        """Write a picture without a file to the shard's own, unless it stands there."""
        hashed = content_hash(shown.data)
        if shown.image.file:
            return shown.place, shown.image, hashed
        if hashed not in self._own:
            with (self.folder / OWN_PICTURES).open("ab") as stream:
                stream.write(shown.data)
            self._own[hashed], self._own_bytes = self._own_bytes, self._own_bytes + len(shown.data)
        return shown.place, Image(OWN_PICTURES, self._own[hashed], len(shown.data)), hashed

    def reject(self, reject: Reject) -> None:
        """Leave a record out, counted and named."""
        self._rejects.append(reject)

    def drop_turns(self, reasons: Iterable[str]) -> None:
        """Count the turns that a conversation does without: why each of them is left out."""
        self._dropped_turns.update(reasons)

    def _write(self, added: _Added) -> None:
        self._write_tokens(added.input_ids, added.supervised)
        self._synthetic.append(added.synthetic)
        if self._names is not None:
            self._names.write(added.name.replace("\n", " ").replace("\r", " ") + "\n")
        shown = shown_name(len(added.pictures))
        if len(added.input_ids) > self._longest.get(shown, {"tokens": 0})["tokens"]:
            self._longest[shown] = {"tokens": len(added.input_ids), "where": added.name}
        self._lengths.append(len(added.input_ids))
        self._hashes.append(added.hash)
        self._num_images.append(len(added.pictures))
        for place, image, hashed in added.pictures:
            file = self._files.setdefault(image.file, len(self._files))
            self._pictures.append((file, image.offset, image.size, place))
            self._picture_hashes.append(hashed)

    def _write_tokens(self, input_ids: np.ndarray, supervised: np.ndarray) -> None:
        self._tokens.write(input_ids.astype(self.dtype).tobytes())
        if self._supervised is not None:
            self._supervised.write(supervised.astype(np.uint8).tobytes())

    def _write_synthetic(self) -> np.ndarray:
        """All first synthetic captions, then all second ones, ...; lengths [captions, examples]."""
        most = max((len(captions) for captions in self._synthetic), default=0)
        lengths = np.zeros((most, len(self._synthetic)), dtype=np.int64)
        for number in range(most):
            for example, captions in enumerate(self._synthetic):
                if number < len(captions):
                    self._write_tokens(captions[number].input_ids, captions[number].supervised)
                    lengths[number, example] = len(captions[number].input_ids)
        return lengths

    def _counts(self) -> np.ndarray:
        return np.array([len(self._lengths), sum(self._lengths), len(self._pictures)])

    def _image_columns(self) -> dict[str, np.ndarray]:
        """Pictures before each example; and all pictures, or one row an example."""
        numbers = np.array(self._num_images, dtype=np.int64)
        rows = np.array(self._pictures, np.int64).reshape(-1, 4)
        if self._several:
            hashes = np.frombuffer(b"".join(self._picture_hashes), np.int64).reshape(-1, 2)
            return {"num_images": _sums(numbers), "pictures": np.hstack([rows, hashes])}
        images = np.tile(np.array([-1, 0, 0]), (len(numbers), 1))
        images[numbers > 0] = rows[:, :3]
        return {"images": images, "num_images": _sums(numbers)}

    def close(self) -> dict[str, Any]:
        """Write the columns and `shard.json`; returns what that says."""
        train = self._counts()
        for added in self._validation:
            self._write(added)
        both = self._counts()
        synthetic = self._write_synthetic()
        for stream in (self._tokens, self._supervised, self._names):
            if stream is not None:
                stream.close()
        lengths = np.array(self._lengths, dtype=np.int64)
        columns = {
            "offsets": _offsets(lengths, synthetic) if len(synthetic) else _sums(lengths),
            "hashes": np.frombuffer(b"".join(self._hashes), np.uint8).reshape(-1, 16),
        }
        if self.kind != "text":
            columns |= self._image_columns()
        for name, column in columns.items():
            np.save(self.folder / f"{name}.npy", column)
        lines = [json.dumps(asdict(reject), ensure_ascii=False) for reject in self._rejects]
        text = "".join(f"{line}\n" for line in lines)
        # Names inside archives may be bytes that are no UTF-8.
        write_bytes(self.folder / REJECTS, text.encode("utf-8", errors="backslashreplace"))
        index = {
            "kind": self.kind,
            "dtype": self.dtype.str,
            "input": self.input_name,
            "records": self._records + len(self._rejects),
            "rejects": dict(Counter(reject.reason for reject in self._rejects)),
            "train": _named(train),
            "validation": _named(both - train),
            "longest": self._longest,
            "distinct_images": len(set(self._picture_hashes)),
            "files": list(self._files),
        }
        if len(synthetic):
            index["synthetic"] = _about(lengths, synthetic, int(train[0]), self._left_out)
        if self._several:
            index["most_images"] = max(self._num_images, default=0)
        if self._dropped_turns:
            index["dropped_turns"] = dict(self._dropped_turns)
        write_json(self.folder / SHARD_INDEX, index)
        return index


def finish_source(
    folder: Path,
    *,
    tokenizer_digest: str,
    vocab_size: int,
    root: str,
    begin_of_text: int | None = None,
) -> dict[str, Any]:
    """Write `source.json` over the shards that lie under `folder/shards`; returns what it says.

    `root` is where relative picture files lie, `begin_of_text` is the codec's. The fingerprint
    stands for every byte of the shards.
    """
    shards, hashes = [], hashlib.sha256()
    rejects, dropped = Counter[str](), Counter[str]()
    records, distinct, longest = 0, 0, dict[str, dict[str, Any]]()
    left_out = 0
    for path in sorted((folder / "shards").iterdir()):
        index = read_json(path / SHARD_INDEX)
        manifest = read_json(path / MANIFEST) if (path / MANIFEST).exists() else index
        hashes.update(json.dumps([path.name, manifest], sort_keys=True).encode())
        rejects.update(index["rejects"])
        dropped.update(index.get("dropped_turns", {}))
        shards.append(_entry(path.name, index))
        left_out += index.get("synthetic", {}).get("left_out", 0)
        kind, dtype = index["kind"], index["dtype"]
        records += index["records"]
        distinct += index["distinct_images"]
        for shown, found in index["longest"].items():
            longest[shown] = max(longest.get(shown, found), found, key=lambda x: int(x["tokens"]))
    if not shards:
        raise ValueError(f"{folder} has no shard; prepare the data again")
    summary = {
        "format": FORMAT,
        "kind": kind,
        "dtype": dtype,
        "tokenizer": {"digest": tokenizer_digest, "vocab_size": vocab_size},
        "fingerprint": hashes.hexdigest()[:16],
        "root": root,
        "records": records,
        "rejects": dict(rejects),
        "dropped_turns": dict(dropped),
        "longest": longest,
        # Pictures that stand in several shards count once in each.
        "distinct_images": distinct,
    }
    if begin_of_text is not None:
        summary["begin_of_text"] = begin_of_text
    for split in ("train", "validation"):
        keys = ("examples", "tokens", "images")
        summary[split] = {key: sum(shard[split][key] for shard in shards) for key in keys}
    # One after the other: what each of them maps goes with it.
    folders = [folder / "shards" / shard["name"] for shard in shards]
    summary |= length_facts(map(Shard, folders)) | caption_facts(map(Shard, folders))
    summary["captions"]["left_out"] = left_out
    remove_folder(folder / COLUMNS)
    if len(shards) > MOST_SEPARATE:
        join_columns(folder, shards, int(begin_of_text is not None))
        summary["joined_columns"] = True
    write_json(folder / INDEX, summary | {"shards": shards})
    return summary


def _entry(name: str, index: dict[str, Any]) -> dict[str, Any]:
    """What `source.json` says of a shard."""
    longest = max((found["tokens"] for found in index["longest"].values()), default=0)
    keys = ("train", "validation", "input", "synthetic", "most_images")
    return {"name": name, "longest": longest} | {key: index[key] for key in keys if key in index}


def _about(
    lengths: np.ndarray, synthetic: np.ndarray, num_training: int, left_out: int
) -> dict[str, Any]:
    """What `shard.json` says of synthetic captions; `each`: how many every picture has, else 0."""
    found: dict[str, Any] = {}
    numbers = np.count_nonzero(synthetic, axis=0)
    for split, mine in (("train", slice(num_training)), ("validation", slice(num_training, None))):
        part, number = synthetic[:, mine], numbers[mine]
        means = part.sum(axis=0)[number > 0] / number[number > 0]
        found[split] = {
            "examples": len(number),
            "originals": int(np.count_nonzero(lengths[mine])),
            "pictures": int(np.count_nonzero(number)),
            "tokens": part.sum(axis=1).tolist(),
            "mean_tokens": round(float(means.sum())),
        }
    even = len(synthetic) if (numbers == len(synthetic)).all() else 0
    return found | {"each": even, "longest": int(synthetic.max()), "left_out": left_out}


def _offsets(lengths: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """int64 [1 + captions, examples + 1]: where each begins; a row ends where the next begins."""
    rows = np.vstack([lengths, synthetic])
    ends = np.cumsum(rows).reshape(rows.shape)
    return np.hstack([ends[:, -1:] - rows.sum(axis=1, keepdims=True), ends]).astype(np.int64)


def _sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)


def _named(counts: np.ndarray) -> dict[str, int]:
    return dict(zip(("examples", "tokens", "images"), counts.tolist(), strict=True))
