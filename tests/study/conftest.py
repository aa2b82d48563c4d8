"""A small study with shared stages, for tests of this folder."""

from small_studies import make_study as make_study
from small_studies import study as study
