"""A store that somebody else owns is refused with both users and the remedy."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from midstream.storage import require_writable

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
    # In a process of that user, which sees of this package but the one file.
    source = Path(require_writable.__code__.co_filename).read_text()
    program = source + "\nimport sys\nrequire_writable(Path(sys.argv[1]))\n"
    ended = subprocess.run(
        [sys.executable, "-I", "-", str(foreign)],
        input=program,
        capture_output=True,
        text=True,
        user=NOBODY,
        cwd="/",
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"PermissionError: {foreign} belongs to user root, and user nobody may")
    assert f"chmod -R a+rwX {foreign}" in last
