"""Small inputs of several rooms' tests: pictures, archives, JSON lines, a tokenizer, commands."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

from midstream.cli.app import app

Members = Mapping[str, bytes] | Iterable[tuple[str, bytes]]


def png(number: int, size: tuple[int, int] = (6, 4)) -> bytes:
    """A picture of its own for every number."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def tar(members: Members, form: int = tarfile.DEFAULT_FORMAT) -> bytes:
    """An archive of these names and bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def byte_tokenizer(folder: Path, *special: str) -> Path:
    """The file of a tokenizer of the 256 bytes and of special tokens."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def midstream(*arguments: object) -> Result:
    """A command as it is typed."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
