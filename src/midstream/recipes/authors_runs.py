"""The fine-tuned 1.4B models that the authors' scripts name."""

from typing import Any

AUTHORS_RUNS: tuple[Any, ...] = ()
