"""What tests of more than one room share: a store in which tiny stages are done."""

import pytest
from hypothesis import settings

import tiny
from midstream.study.ledger import Ledger

# How long an example takes says nothing on shared cores.
settings.register_profile("midstream", deadline=None)
settings.load_profile("midstream")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="also the long tests of faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults"):
        return
    left = [item for item in items if item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def tiny_ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A store with the tiny world, prepared, its encoder and text run; read it, never change it."""
    ledger = Ledger(tmp_path_factory.mktemp("tiny-store"))
    tiny.run_missing(ledger, tiny.DATA, tiny.ENCODER_STAGE, tiny.TEXT)
    return ledger
