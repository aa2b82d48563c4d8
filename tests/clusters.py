"""A Slurm to submit to: the stand-in, and the real one where it can be started."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from one_node_slurm import OneNodeSlurm, Unavailable, clean
from stand_in_slurm import StandInSlurm

REAL = pytest.param("real", marks=pytest.mark.slurm)


@pytest.fixture(params=["stand-in", REAL], scope="module")
def slurm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A running Slurm whose commands are on the PATH; skips where there is none."""
    pytest.importorskip("submitit")
    kind, folder = request.param, tmp_path_factory.mktemp("slurm")
    try:
        running = StandInSlurm(folder) if kind == "stand-in" else OneNodeSlurm(folder)
    except Unavailable as reason:
        pytest.skip(str(reason))
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(clean(os.environ)):
            patch.delenv(name)
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running
        running.close()
