"""Every experiment of the paper, one function each, at any scale of `scales.py`.

Each takes `scale`, `seeds` (the scale's own without it) and the settings that all of them share
(`scales.Settings`: inputs, text, rows, caption, text_mixture). Where the paper states one number of
fine-tuning epochs, `epochs` may hold several: each is a curve of its own. Figures 9 to 13 are
Figures 4 to 8 by benchmark, and part of their reports. Numbers that the paper prints stand beside
ours in the tables.
"""

from midstream.recipes.paper.figure_studies import (
    figure_4,
    figure_5,
    figure_6,
    figure_7,
    figure_8,
    figure_14,
)
from midstream.recipes.paper.suites import (
    authors_runs,
    figures,
    sections,
    slice_of_four_axes,
    suite,
)
from midstream.recipes.paper.table_studies import (
    table_3,
    table_4,
    table_5,
    table_6,
    table_7,
    table_8,
)

__all__ = [
    "authors_runs",
    "figure_4",
    "figure_5",
    "figure_6",
    "figure_7",
    "figure_8",
    "figure_14",
    "figures",
    "sections",
    "slice_of_four_axes",
    "suite",
    "table_3",
    "table_4",
    "table_5",
    "table_6",
    "table_7",
    "table_8",
]
