"""A tiny fine-tuned model, opened, and pictures that it has not seen."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from midstream.study.store import Ledger
from midstream.work.open_model import OpenedModel, open_model

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def chat_ledger(tiny_line: Ledger) -> Ledger:
    """A store with the text run, the image run and the fine-tuning; read it, never change it."""
    return tiny_line


@pytest.fixture(scope="session")
def opened(chat_ledger: Ledger) -> OpenedModel:
    """The fine-tuned model."""
    return open_model(chat_ledger.folder(tiny.CHAT), CPU)


@pytest.fixture(scope="session")
def opened_text(chat_ledger: Ledger) -> OpenedModel:
    """The text run at 40 %."""
    return open_model(chat_ledger.folder(tiny.TEXT) / "milestones" / "40", CPU)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures: red, blue, and half of each."""
    folder = tmp_path_factory.mktemp("pictures")
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    both = red.copy()
    both.paste(blue.crop((0, 0, 20, 30)), (0, 0))
    paths = [folder / f"{name}.png" for name in ("red", "blue", "both")]
    for path, picture in zip(paths, (red, blue, both), strict=True):
        picture.save(path)
    return paths
