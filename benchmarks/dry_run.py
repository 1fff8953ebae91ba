"""A dry run of kan_340b on 1,024 ranks, in a process of its own: seconds and peak memory of describing one rank.

    python benchmarks/dry_run.py                                     # ranks 0, 37 and 1023 of tensor 8, pipeline 8, expert 16, ZeRO-2, bf16
    python benchmarks/dry_run.py --ranks 5 --repeats 3 parallel.context_parallel=2

Settings at the end are added to those of the layout. Wall-clock seconds are those from the start of the interpreter to its end, imports included.
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import time

from common import write_result

CLAIM = "the dry run of kan_340b on 1,024 ranks prints in under 60 s and 4 GiB"
SECONDS, BYTES = 60, 4 * 2**30
SETTINGS = [
    "model=kan_340b", "train.precision=bf16", "train.global_batch_size=1024", "train.micro_batch_size=1", "parallel.tensor_parallel=8",
    "parallel.pipeline_parallel=8", "parallel.expert_parallel=16", "parallel.zero_stage=2", "run.dry_run=true", "run.world_size=1024",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 37, 1023])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("settings", nargs="*", default=[], metavar="setting=value")
    arguments = parser.parse_args()
    settings = [*SETTINGS, *arguments.settings]
    rows = [measure(rank, settings, arguments.repeats) for rank in arguments.ranks]
    for row in rows:
        print(f"rank {row['rank']:5d}: {row['median_seconds']:.1f} s, {row['peak_bytes'] / 2**20:.0f} MiB, {row['parameters']:,} parameters")
    holds = all(row["median_seconds"] < SECONDS and row["peak_bytes"] < BYTES for row in rows)
    config = {"settings": settings, "repeats": arguments.repeats}
    write_result("dry-run", claim=CLAIM, config=config, rows=rows, ceilings={"seconds": SECONDS, "bytes": BYTES}, holds=holds)
    if not holds:
        raise SystemExit("the claim does not hold here")


def measure(rank: int, settings: list[str], repeats: int) -> dict:
    """Figures of one rank's dry run."""
    command = [sys.executable, "-m", "kan_train", "train", *settings, f"run.rank={rank}"]
    seconds, processor = [], []
    for _ in range(repeats):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        text = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(time.perf_counter() - started)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    parameters = re.search(r"together +([\d,]+)", text)
    assert parameters is not None, text
    return {
        "name": f"rank {rank}",
        "rank": rank,
        "median_seconds": statistics.median(seconds),
        "seconds": sorted(seconds),
        "processor_seconds": sorted(processor),
        # The largest of all children so far: each rank's own is at most this.
        "peak_bytes": after.ru_maxrss * 1024,
        "parameters": int(parameters[1].replace(",", "")),
    }


if __name__ == "__main__":
    main()
