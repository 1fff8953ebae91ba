"""Seconds that `kan cost plan` takes for kan_340b on 1,024 devices, on one core, beside the work it does.

    python benchmarks/planner_speed.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from common import write_result

CEILING = 10.0
"""Seconds of planning, the imports apart."""
COMMAND = ["cost", "plan", "model=kan_340b", "cluster=h100_slurm", "tokens=2T", "--devices", "1024", "--price", "assumed", "--json", "--top", "1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    seconds, whole, tree = [], [], {}
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "kan_train", *COMMAND], capture_output=True, text=True, check=True, env=environment)
        whole.append(time.perf_counter() - started)
        tree = json.loads(done.stdout)
        seconds.append(tree["seconds"])
        print(f"planned in {seconds[-1]:.1f} s, {whole[-1]:.1f} s with imports and composing")
    (found,) = tree["devices"]
    row = {"name": "kan_340b on 1,024 devices", "median_seconds": statistics.median(seconds), "seconds": seconds, "whole_seconds": whole}
    row |= {name: found[name] for name in ("looked_at", "timed", "weighed", "fitting")}
    holds = row["median_seconds"] < CEILING
    print(f"median {row['median_seconds']:.1f} s, ceiling {CEILING} s: {'holds' if holds else 'DOES NOT HOLD'}")
    claim = "kan_340b on 1,024 devices is planned in under 10 s on one core"
    write_result("planner-speed", claim=claim, config={"command": COMMAND, **vars(arguments)}, ceiling_seconds=CEILING, holds=holds, rows=[row])


if __name__ == "__main__":
    main()
