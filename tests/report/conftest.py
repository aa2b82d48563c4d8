"""Pages without their drawings, for tests of what the pages say."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from made_studies import write_report
from made_whole import fill, make_study
from PIL import Image, ImageDraw

from midstream.report.curves import curve_figure
from midstream.study.store import Ledger
from midstream.study.studies import Study

DRAWING = ("panel_figure", "grid_figure", "rates_figure", "curve_figure")
EMPTY = {"svg": b"<svg/>", "png": b"\x89PNG", "pdf": b"%PDF"}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is an empty one, to save the seconds that drawing takes."""

    def nothing(*args: Any, **kwargs: Any) -> dict[str, bytes]:
        return EMPTY

    for name in DRAWING:
        monkeypatch.setattr(f"midstream.report.page.{name}", nothing)
    monkeypatch.setattr("midstream.report.page.small_figure", lambda *args: EMPTY["svg"])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty store."""
    return Ledger(tmp_path)


@pytest.fixture(scope="session")
def study() -> Study:
    """A study of 12 lines and two baselines; `finished` holds its store."""
    return make_study()


@pytest.fixture(scope="session")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store with its report, which the first worker to ask for it makes; read only."""
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "report"
    with FileLock(root.with_suffix(".lock")):
        if not (root / "whole").exists():
            make_whole(study, root)
            (root / "whole").touch()
    return root / "store"


def make_whole(study: Study, root: Path) -> None:
    (root / "pictures").mkdir(parents=True)
    for index in range(12):
        size = 48 if index % 2 else 320
        image = Image.new("RGB", (size, size * 3 // 4), "#dfe8ee")
        draw = ImageDraw.Draw(image)
        draw.rectangle((size // 8, size // 8, size // 2, size // 2), fill=(200, 20 * index, 40))
        image.save(root / "pictures" / f"{index}.png")
    fill(Ledger(root / "store"), study, root / "pictures")
    # One real drawing stands for the curves of all stages, to save the time of 28.
    steps = range(1, 401)
    lines = [{"tokens_seen": 1000 * s, "loss": 2 + (s % 7) / s, "rate": 1 / s} for s in steps]
    drawn = curve_figure(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midstream.report.page.curve_figure", lambda _: drawn)
        write_report(study, Ledger(root / "store"))


@pytest.fixture
def store(finished: Path, tmp_path: Path, undrawn: None) -> Ledger:
    """A copy of the finished store that the test may change; it has no report yet."""
    shutil.copytree(finished, tmp_path / "store", ignore=shutil.ignore_patterns("reports"))
    return Ledger(tmp_path / "store")
