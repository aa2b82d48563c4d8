"""The public formats, record by record: jsonl.zst, tar shards, LLaVA JSON (see `docs/data.md`).

Every reader yields where a record stands, for messages, and raises ValueError or
FileNotFoundError that names the file and the record for what is missing or malformed.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from midstream.data.examples import conversation_turns
from midstream.storage import read_json

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def read_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of each document in the .jsonl and .jsonl.zst files of a folder."""
    files = sorted([*folder.glob("*.jsonl.zst"), *folder.glob("*.jsonl")])
    if not files:
        raise FileNotFoundError(f"{folder} holds no .jsonl.zst or .jsonl file")
    for path in files:
        for number, line in enumerate(read_lines(path), start=1):
            where = f"{path}, line {number}"
            try:
                text = json.loads(line.decode("utf-8-sig"))["text"]
            except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"{where}: not a JSON object with the key 'text' in UTF-8"
                ) from None
            if not isinstance(text, str) or not text:
                raise ValueError(f"{where}: 'text' is empty or no text")
            yield where, check_characters(text, where)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a plain or zstd-compressed file; ValueError names a file that is cut short."""
    if path.suffix != ".zst":
        with path.open("rb") as plain:
            yield from plain
        return
    # pyarrow and not zstandard, whose reader takes the end of a cut file for the end of the data.
    with pyarrow.input_stream(str(path), compression="zstd") as raw:
        try:
            if not path.stat().st_size:
                raise OSError("it is empty")
            yield from io.BufferedReader(raw)
        except OSError as error:
            raise ValueError(f"{path} is not a whole zstd file ({error}); fetch it again") from None


def read_captions(folder: Path) -> Iterator[tuple[str, str, tuple[Path, int, bytes]]]:
    """(where, caption, (shard, offset, picture bytes)) of each sample in the tar shards."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise FileNotFoundError(f"{folder} holds no .tar shard")
    for path in shards:
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    # The key ends at the first dot of the file's own name (WebDataset).
                    folder_name, slash, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    stream = shard.extractfile(member)
                    if stream is not None:
                        parts = samples.setdefault(f"{folder_name}{slash}{stem}", {})
                        if f".{suffix}" in parts:
                            raise ValueError(f"{path}: {member.name} is there twice; remove one")
                        parts[f".{suffix}"] = (member.offset_data, stream.read())
                check_tar_end(path, shard.offset)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not a whole tar file ({error}); fetch it again") from None
        for key, parts in samples.items():
            where = f"{path}, sample {key}"
            pictures = [parts[suffix] for suffix in PICTURES if suffix in parts]
            if len(pictures) != 1 or ".txt" not in parts:
                raise ValueError(f"{where}: needs one picture and one .txt, has {sorted(parts)}")
            try:
                caption = parts[".txt"][1].decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: the caption is no UTF-8 ({error})") from None
            if not caption:
                raise ValueError(f"{where}: the caption is empty")
            yield where, caption, (path, *pictures[0])


def check_tar_end(path: Path, offset: int) -> None:
    """Raises tarfile.ReadError unless zeros, one block at least, are all there is from `offset` on.

    `tarfile` takes a file that was cut between two members, and any damaged header, for its end.
    """
    with path.open("rb") as stream:
        stream.seek(offset)
        if len(stream.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without the mark of its end")
        stream.seek(offset)
        while block := stream.read(2**20):
            if any(block):
                raise tarfile.ReadError(f"damaged or further data behind byte {offset:,}")


def check_characters(text: str, where: str) -> str:
    """`text` itself; ValueError names `where` if half a surrogate pair stands in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text is no valid Unicode ({error})") from None
    return text


def read_conversations(folder: Path) -> Iterator[tuple[str, list[tuple[str, str]], Path | None]]:
    """(where, turns, picture) of each record in a folder's `llava.json`."""
    path = folder / "llava.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of records")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {number}: not a JSON object")
        where = f"{path}, record {record.get('id', number)!r}"
        turns, has_image = conversation_turns(record, where)
        for turn in turns:
            check_characters("".join(turn), where)
        picture = None
        if has_image:
            picture = folder / record["image"]
            if not picture.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{where}: image {record['image']!r} lies outside {folder}")
            if not picture.is_file():
                raise FileNotFoundError(
                    f"{where}: picture {picture} is missing; add it or remove the record"
                )
        yield where, turns, picture
