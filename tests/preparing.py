"""The data stages of a whole world, done in one folder without a store."""

from pathlib import Path
from typing import Any

from midstream.config import PublicFolder
from midstream.core.identity import source_folders
from midstream.data.prepare import (
    open_source,
    prepare_tokenizer,
    prepare_world,
    prepare_world_source,
    tokenizer_path,
)
from midstream.data.shard_workers import Progress
from midstream.data.sources import Source
from midstream.study.stages import Prepare


def quiet(done: float, what: str) -> None:
    """Progress that nobody asks for."""


def root_of(world: Any, out: Path) -> Path:
    return world.root if isinstance(world, PublicFolder) else out / "world"


def prepare(world: Any, tokenizer: Any, out: Path, progress: Progress = quiet) -> dict[str, Any]:
    """What the data stages of all sources do, in one folder; the tokenizer's results, and under
    "sources" those of each source."""
    root = root_of(world, out)
    if not isinstance(world, PublicFolder):
        prepare_world(world, out)
    trained_on = Prepare(world=world, tokenizer=tokenizer).vocabulary.trained_on
    results = prepare_tokenizer(tokenizer, world, root, trained_on, out)
    found: dict[str, Any] = {
        name: prepare_world_source(
            world,
            root,
            name,
            tokenizer_path(out),
            out / "sources" / name,
            workers=1,
            progress=progress,
        )
        for name in source_folders(root)
    }
    return {**results, "sources": found}


def open_sources(world: Any, out: Path) -> dict[str, Source]:
    """The sources that `prepare` left in `out`, by name."""
    root = root_of(world, out)
    names = sorted(source_folders(root))
    return {name: open_source(root, name, out / "sources" / name) for name in names}
