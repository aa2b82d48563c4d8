"""Every experiment of the paper, one function each, at any scale of `scales.py` (docs/studies.md).

Figures 9 to 13 are Figures 4 to 8 by benchmark, and part of their reports.
"""

from midstream.recipes.paper.figure_studies import figure_4 as figure_4
from midstream.recipes.paper.figure_studies import figure_5 as figure_5
from midstream.recipes.paper.figure_studies import figure_6 as figure_6
from midstream.recipes.paper.figure_studies import figure_7 as figure_7
from midstream.recipes.paper.figure_studies import figure_8 as figure_8
from midstream.recipes.paper.figure_studies import figure_14 as figure_14
from midstream.recipes.paper.suites import authors_runs as authors_runs
from midstream.recipes.paper.suites import figures as figures
from midstream.recipes.paper.suites import sections as sections
from midstream.recipes.paper.suites import slice_of_four_axes as slice_of_four_axes
from midstream.recipes.paper.suites import suite as suite
from midstream.recipes.paper.table_studies import table_3 as table_3
from midstream.recipes.paper.table_studies import table_4 as table_4
from midstream.recipes.paper.table_studies import table_5 as table_5
from midstream.recipes.paper.table_studies import table_6 as table_6
from midstream.recipes.paper.table_studies import table_7 as table_7
from midstream.recipes.paper.table_studies import table_8 as table_8
