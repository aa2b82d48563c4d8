"""A store that somebody else owns is refused with both users and the remedy."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from midstream.core.storage import require_writable

NOBODY = 65534


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder that everybody sees and only we may write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_our_own_folder_and_one_that_is_not_there_are_fine(tmp_path: Path) -> None:
    require_writable(tmp_path)
    require_writable(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_another_users_folder_is_refused(foreign: Path) -> None:
    reads, writes = os.pipe()
    if not (child := os.fork()):
        # This process is that user from here on; it says what it was told, and is gone.
        os.setuid(NOBODY)
        try:
            require_writable(foreign)
        except PermissionError as error:
            os.write(writes, str(error).encode())
        os._exit(0)
    os.close(writes)
    os.waitpid(child, 0)
    with os.fdopen(reads) as stream:
        told = stream.read()
    assert told.startswith(f"{foreign} belongs to user root, and user nobody may not write there")
    assert f"chmod -R a+rwX {foreign}" in told
