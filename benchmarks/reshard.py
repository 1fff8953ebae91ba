"""Every layout goes on with what every other one saved: all pairs of the layouts of tests/recovery, of one kind of model each.

    python benchmarks/reshard.py                                     # all pairs, 13 layouts of 1 to 4 processes and 4 of the dense model
    python benchmarks/reshard.py --layouts plain ep4-zero3           # these alone
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "layouts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "recovery"))

from recovery_proofs.all_pairs import main

if __name__ == "__main__":
    main(__doc__ or "")
