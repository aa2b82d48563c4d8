"""What tests of more than one room share: a store in which tiny stages are done."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings
from jaxtyping import install_import_hook

# The process that hands the tests out loads this file and runs none: torch is left to the others.
if TYPE_CHECKING:
    from midstream.study.store import Ledger

# How long an example takes says nothing on shared cores.
settings.register_profile("midstream", deadline=None)
settings.load_profile("midstream")

# Calls are checked where signatures have shapes; mypy has read all the others.
SOURCES = Path(__file__).parents[1] / "src"
FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
install_import_hook(
    [
        ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        for path in SOURCES.rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ],
    "beartype.beartype",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="also the long tests of faults")
    parser.addoption(
        "--gpu-stand-in", action="store_true", help="tests marked gpu compute on the CPU instead"
    )


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What has been imported stays: it is not looked through at each collection of garbage."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not item.config.getoption("--gpu-stand-in"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--faults"):
        left = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    # Files that take long first, so that none is left to one worker at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def cheap_processes() -> Iterator[None]:
    """No waiting for disks, and one server to fork from, which has imported all that any needs.

    What is killed in a test is a process, not the machine: the order of writes is what counts,
    and that stays.
    """
    import lives
    import warm

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(os, "fsync", lambda descriptor: None)
        lives.server()
        # It starts when first asked for; whoever that is would have it import its own only.
        patch.setattr(BaseContext, "set_forkserver_preload", lambda self, names: None)
        if hasattr(os, "pidfd_open"):
            patch.setattr(sys, "executable", warm.executable(Path(folder), FAKE_WORKER))
        yield


@pytest.fixture(scope="session")
def tiny_ledger(tmp_path_factory: pytest.TempPathFactory) -> "Ledger":
    """A store with the tiny world, prepared, its encoder and text run; read it, never change it.

    A copy of one that the first worker to ask for it makes.
    """
    import tiny

    with shared_store(tmp_path_factory, "tiny") as (made, own):
        return tiny.begun(made, own)


@pytest.fixture(scope="session")
def tiny_line(tiny_ledger: "Ledger", tmp_path_factory: pytest.TempPathFactory) -> "Ledger":
    """The same with the image run, its fine-tuning and the evaluation of that."""
    import tiny

    with shared_store(tmp_path_factory, "line") as (made, own):
        if not made.is_done(tiny.RESULT):
            tiny.run_missing(tiny.begun(tiny_ledger, made.store), tiny.RESULT)
        return tiny.begun(made, own, tiny.SEEN, tiny.CHAT, tiny.RESULT)


@contextmanager
def shared_store(factory: pytest.TempPathFactory, name: str) -> "Iterator[tuple[Ledger, Path]]":
    """A store of all workers, held meanwhile, and the place of one's own copy of it."""
    from midstream.study.store import Ledger

    own = factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(shared / f"{name}.lock"):
        yield Ledger(shared / name), own / f"{name}-store"
