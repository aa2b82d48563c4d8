"""Small inputs for the preparation of one source, and short ways to prepare them."""

import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from inputs import png, tar
from midstream.data.formats.records import ReadOptions, Section
from midstream.data.prepare_source import plan_source, prepare_source
from midstream.data.shards import READERS, units_of
from midstream.data.sources import Source

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
OPTIONS = ReadOptions()
Put = Callable[[str, bytes], str]


def shared(name: str) -> str:
    """A file or folder of the real data; skips the test where it is not on this machine."""
    if not (SHARED / name).exists():
        pytest.skip(f"the real data {name} is not on this machine; docs/real-data.md lists it")
    return str(SHARED / name)


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def as_lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_parquet(rows: Sequence[Any] | pyarrow.Table, **options: Any) -> bytes:
    """A table, or one of such rows."""
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(list(rows))
    stream = io.BytesIO()
    parquet.write_table(table, stream, **options)
    return stream.getvalue()


def read_all(section: Section, *sources: str, options: ReadOptions = OPTIONS) -> list[Any]:
    """What the readers make of some sources."""
    units = units_of(section, sources, options)
    return [item for unit in units for item in READERS[section](unit, options)]


def captioned(first: int, count: int = 4) -> bytes:
    """A tar of pictures with captions."""
    numbers = range(first, first + count)
    members = [((f"{n:04d}.png", png(n)), (f"{n:04d}.txt", b"caption %d" % n)) for n in numbers]
    return tar([member for both in members for member in both])


@cache
def tokenizer_file(num_merges: int = 0) -> Path:
    """A tokenizer of the 256 bytes; every merge joins two more letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "aeiou" for b in "nrst"][:num_merges]
    vocab = {token: n for n, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = Path(mkdtemp()) / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_texts(folder: Path, num_files: int, num_lines: int, *, bad: Sequence[int] = ()) -> Path:
    """`part-N.jsonl` files of lines; lines numbered `bad`, from 0 through all files, lack text."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(num_files):
        numbers = range(file * num_lines, (file + 1) * num_lines)
        lines = [{"id": n} if n in bad else {"text": f"Text {n} is here."} for n in numbers]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"part-{file}.jsonl").write_text(text)
    return folder


def write_pictures(folder: Path, count: int) -> Path:
    """A Hugging Face imagefolder: `metadata.jsonl` beside pictures of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))
    lines = [{"file_name": name, "text": f"picture {name}"} for name in names]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def run(section: Section, sources: Path | Sequence[str], out: Path, **changes: Any) -> Any:
    """Prepare with one worker, no rejects allowed and names from the input's own folder."""
    given: dict[str, Any] = {
        "tokenizer_file": tokenizer_file(),
        "options": ReadOptions(),
        "root": str(sources.parent) if isinstance(sources, Path) else "",
        "validation_fraction": 0.0,
        "by_command": "notice" in changes,
    }
    how: dict[str, Any] = {
        "workers": 1,
        "max_reject_fraction": 0.0,
        "progress": lambda done, note: None,
        "notice": None,
    }
    given |= {name: value for name, value in changes.items() if name not in how}
    how |= {name: value for name, value in changes.items() if name in how}
    names = [str(sources)] if isinstance(sources, Path) else list(sources)
    return prepare_source(plan_source(section, names, out, **given), **how)


def contents(out: Path) -> dict[str, bytes]:
    """Every file that a source is made of, by name; not when and from where it was made."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("made_from.json", "prepare.lock", "source.json")
    }


def times(out: Path) -> dict[str, int]:
    """When each file was last written, in ns."""
    return {
        path.relative_to(out).as_posix(): path.stat().st_mtime_ns
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("rejects.jsonl", "prepare.lock")
    }


def changed_shards(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """The shards whose files were written anew, are new or gone."""
    files = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {name.split("/")[1] for name in files if name.startswith("shards/")}


def texts_of(source: Source) -> list[str]:
    """What the byte tokenizer's tokens say, special tokens left out."""
    decoder = {n: c for c, n in Tokenizer.from_file(str(tokenizer_file())).get_vocab().items()}
    found = []
    for example in range(len(source)):
        ids = [n for n in source.input_ids(example).tolist() if n < 256]
        found.append("".join(decoder[n] for n in ids).replace("Ġ", " "))
    return found
