"""What tests of the readers share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest


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
