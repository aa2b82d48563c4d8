"""The work of `midstream prepare`: one source. What it has finished stays where it is stopped."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midstream.config import OWN_RULE, begin_of_text_named
from midstream.core.storage import write_bytes
from midstream.data.examples import TextCodec
from midstream.data.formats.files import is_url
from midstream.data.formats.records import ReadOptions, Section
from midstream.data.prepare_source import canonical_tokenizer, prepare_source
from midstream.data.tokenise import open_tokenizer
from midstream.work.protocol import Channel, Request


class PrepareRequest(Request):
    """The arguments of `midstream prepare`."""

    section: Section
    sources: tuple[str, ...]
    out: Path
    tokenizer: str
    options: ReadOptions
    max_rejects: float
    validation: float
    workers: int
    begin_of_text: str = OWN_RULE


def prepare(request: PrepareRequest, channel: Channel) -> dict[str, Any]:
    """Prepare the source; returns its counts (see `prepare_source` for them and the errors)."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_file = Path(folder) / "tokenizer.json"
        opened = open_tokenizer(request.tokenizer)
        begins = begin_of_text_named(opened, request.begin_of_text, request.tokenizer)
        codec = TextCodec(opened).beginning_with(begins)
        write_bytes(tokenizer_file, canonical_tokenizer(codec))
        return prepare_source(
            request.section,
            request.sources,
            request.out,
            tokenizer_file=tokenizer_file,
            options=request.options,
            root=common_folder(request.sources),
            workers=request.workers,
            max_reject_fraction=request.max_rejects,
            validation_fraction=request.validation,
            progress=lambda done, note: channel.progress("preparing", done, note),
            notice=print,
        )


def common_folder(sources: Sequence[str]) -> str:
    """The deepest folder that holds all local sources; empty where there is none."""
    folders = []
    for source in sources:
        if not is_url(source):
            path = os.path.abspath(source)
            folders.append(path if os.path.isdir(path) else os.path.dirname(path))
    return os.path.commonpath(folders) if folders else ""
