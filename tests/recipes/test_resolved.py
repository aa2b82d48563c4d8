"""What every recipe of the package resolves to, pinned as text that a person reads.

A difference is either meant, and then `python tests/recipes/test_resolved.py` writes the files anew
and the commit says why, or it is not. A line "identities" that changes alone names stages anew.
"""

from pathlib import Path

import pytest
from resolved import resolved

from midstream.cli.catalogue import catalogue, find_study

GOLDEN = Path(__file__).parents[1] / "golden" / "recipes"
ROOMS = ("interleaved.", "paper.", "pocket.", "pools.", "published.", "onset.", "noise.")
PINNED = sorted(name for name in catalogue() if name.startswith(ROOMS))


@pytest.mark.parametrize("name", PINNED)
def test_a_recipe_resolves_to_what_is_pinned(name: str) -> None:
    assert resolved(name, find_study(name, [])) == (GOLDEN / f"{name}.txt").read_text()


def test_nothing_is_pinned_that_no_recipe_makes() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == PINNED


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name in PINNED:
        (GOLDEN / f"{name}.txt").write_text(resolved(name, find_study(name, [])))
