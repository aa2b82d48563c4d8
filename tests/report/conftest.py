"""Pages without their drawings, for tests of what the pages say."""

from pathlib import Path
from typing import Any

import pytest

from midstream.study.store import Ledger

DRAWING = ("panel_figure", "grid_figure", "rates_figure", "curve_figure")
EMPTY = {"svg": b"<svg/>", "png": b"\x89PNG", "pdf": b"%PDF"}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is an empty one, to save the seconds that drawing takes."""

    def nothing(*args: Any, **kwargs: Any) -> dict[str, bytes]:
        return EMPTY

    for name in DRAWING:
        monkeypatch.setattr(f"midstream.report.page.{name}", nothing)
    for module in ("page",):
        monkeypatch.setattr(f"midstream.report.{module}.small_figure", lambda *args: EMPTY["svg"])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty store."""
    return Ledger(tmp_path)
