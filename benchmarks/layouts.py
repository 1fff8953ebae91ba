"""The matrix of layouts: every row trains 20 steps on its layout, and is held against one process of plain PyTorch in float64.

Printed and written to docs/layouts.md: worst relative difference of the loss, of the global gradient norm, of a parameter's first gradient; choices of
groves that fell the other way (and the widest margin of one in the reference); tokens a second of the row itself.

    python benchmarks/layouts.py                                        # all rows here, on CPU with gloo, up to 8 processes
    python benchmarks/layouts.py --list                                 # names of the rows
    python benchmarks/layouts.py --rows kan-dp4-zero1-acc2              # one row (no table is written)
    torchrun --nproc-per-node 8 benchmarks/layouts.py --here            # on your own devices with NCCL: the rows of 8 processes
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "layouts"))

from layout_matrix.campaign import main

if __name__ == "__main__":
    main(__doc__ or "")
