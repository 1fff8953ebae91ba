"""Runs of `kan train` that are killed again and again: kill -9 of a random rank at a random moment, and the same command until the run is finished.

Checked at every start and at the end: what it resumed from, what it read, how much it did again, that its figures and checkpoints are bit for bit those
of a run that nobody killed, and that nothing is left over. A third of the kills aim at a save; how many hit one is counted.

    python benchmarks/kills.py                                     # 100 kills in 8 layouts of 1 to 4 processes, and 10 under torchrun
    python benchmarks/kills.py --kills 20 --layouts dp3-zero3 --torchrun 0 --seed 7
    python benchmarks/kills.py --folder /tmp/kills                 # stopped, it goes on there when it is called again
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "layouts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "recovery"))

from recovery_proofs.kills import main

if __name__ == "__main__":
    main(__doc__ or "")
