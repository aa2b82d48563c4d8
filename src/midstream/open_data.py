"""The data of a study's stages as it lies in a store, once its stages are done."""

from collections.abc import Iterable
from pathlib import Path

from midstream.config import PublicFolder
from midstream.data.examples import TextCodec
from midstream.data.prepare import open_codec, open_source
from midstream.data.sources import Source
from midstream.study.ledger import Ledger
from midstream.study.stage import Prepare, PrepareSource, PrepareTokenizer


def world_root(data: Prepare | PrepareSource | PrepareTokenizer, ledger: Ledger) -> Path:
    """Where a world's public files lie: the user's folder, or that of the stage that wrote them."""
    if isinstance(data.world, PublicFolder):
        return data.world.root
    return ledger.folder(data.laid_out[0]) / "world"


def open_tokenizer(data: Prepare, ledger: Ledger) -> TextCodec:
    """The tokenizer of a world's sources."""
    return open_codec(ledger.folder(data.vocabulary))


def open_sources(data: Prepare, names: Iterable[str], ledger: Ledger) -> dict[str, Source]:
    """Prepared sources by name, in the order of their names."""
    root = world_root(data, ledger)
    return {
        name: open_source(root, name, ledger.folder(data.source(name)))
        for name in sorted(set(names))
    }
