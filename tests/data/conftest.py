"""What tests of the readers, and those of features, share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from made import make_source
from made_features import NUM_PICTURES

from midstream.data.sources import Source


@pytest.fixture(params=["local", "memory"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str, bytes], str]]:
    """Writes a file into a folder, local or of a URL, and returns its path ("": the folder's)."""
    memory, root = fsspec.filesystem("memory"), f"/put-{tmp_path.name}"

    def write(name: str, data: bytes) -> str:
        if request.param == "memory":
            if name:
                memory.pipe(f"{root}/{name}", data)
            return f"memory://{root}/{name}".rstrip("/")
        path = tmp_path / "put" / name
        if name:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return str(path)

    yield write
    if memory.exists(root):
        memory.rm(root, recursive=True)


@pytest.fixture(scope="module")
def shown() -> list[int | None]:
    """Which picture each conversation shows, some none, many the same."""
    random = np.random.default_rng(0)
    order = [*range(NUM_PICTURES), *random.integers(0, NUM_PICTURES, 20).tolist()]
    return [None if x % 5 == 3 and at >= NUM_PICTURES else x for at, x in enumerate(order)]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory, shown: list[int | None]) -> Source:
    """Conversations about shared pictures, in three shards."""
    base = tmp_path_factory.mktemp("talks")
    return make_source(base, "talks", "instruct", [3] * len(shown), pictures=shown, shards=3)
