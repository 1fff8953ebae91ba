"""Runs on a real Slurm of several nodes on this machine that go through the failures of a cluster, in random order, until they are finished.

Each run must end as one that suffered nothing: every row, every tensor of its checkpoints and its place in the data to the last bit. Measured are the
seconds from a failure to the next step, and the steps that were done again. Needs root, and: apt-get install slurm-wlm munge

    python benchmarks/cluster_failures.py                          # every failure three times, four a run: some 20 minutes on two cores
    python benchmarks/cluster_failures.py --rounds 1 --failures 'rank killed' 'power cut of the head node'
    python benchmarks/cluster_failures.py --folder /tmp/failures   # keep the runs there
"""

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / "tests" / room) for room in ("layouts", "recovery", "slurm"))

from slurm_proofs.campaign import main

if __name__ == "__main__":
    main(__doc__ or "")
