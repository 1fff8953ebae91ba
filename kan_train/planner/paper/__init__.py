"""The paper's table of a 340B model as a sheet of cells: what is cited, assumed, derived and measured, and what follows for each claim.

The cells, the claims and the page are data in conf/table/*.yaml; nothing there is a result. A derived cell has a formula, and its value is that formula's,
computed from other cells. docs/cost-table.md and docs/cost-table.json are what `kan cost table --write docs` makes of them.
"""

from kan_train.planner.paper.claims import Judged
from kan_train.planner.paper.sheet import Cell
from kan_train.planner.paper.table import Table, build_table, table_files

__all__ = ["Cell", "Judged", "Table", "build_table", "table_files"]
