"""A small study with shared stages, a world of one's own, and an empty store."""

import shutil
from pathlib import Path

import pytest

import own_world
from clusters import slurm as slurm
from midstream.launch import checks
from midstream.study.store import Ledger
from small_studies import make_study as make_study


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_world.write_world(tmp_path_factory.mktemp("own") / "world")


@pytest.fixture
def mine(world: Path, tmp_path: Path) -> Path:
    """A copy of the world, to be changed."""
    return shutil.copytree(world, tmp_path / "mine")


@pytest.fixture
def empty(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "store")


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are read in tests of their own."""
    monkeypatch.setattr(
        checks, "_read", lambda requests: [{"error": None, "size": None} for _ in requests]
    )
