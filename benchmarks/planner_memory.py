"""Peak memory of a training step, planned and measured, on every layout of tests/planner/footprint_rows.py: the planner claims 5%.

Measured is the fullest rank of a real training after warm-up: on a CPU the live bytes of all tensors, storage by storage (tests/planner/live_bytes.py); on GPUs
torch.cuda.max_memory_allocated, with a device a process: layouts that need more devices than there are left out, and printed.

    python benchmarks/planner_memory.py                         # on the CPU, up to 4 processes with gloo: under 10 minutes on 2 cores
    python benchmarks/planner_memory.py --device cuda           # what the formulas of the kernels' path are worth (not run yet)
    python benchmarks/planner_memory.py --cases NAME ..         # these alone; no result is written
    python benchmarks/planner_memory.py --list
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write_result

TESTS = Path(__file__).parents[1] / "tests"
FOLDERS = [str(TESTS / "planner"), str(TESTS / "layouts"), str(TESTS)]
sys.path[:0] = FOLDERS

import torch  # noqa: E402
from footprint_rows import Case, named  # noqa: E402

from kan_train.parallel.layout import layout_of  # noqa: E402
from kan_train.planner.footprint import footprint_of  # noqa: E402

CLAIM = "planned memory is within 5% of the peak live tensor bytes of the fullest rank, on every layout"
TOLERANCE = 0.05


def measure(folder: Path, cases: list[Case], device: str) -> None:
    """Train on every layout, all from one process that has imported everything once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*FOLDERS, *(path for path in sys.path if path)])}
    command = [sys.executable, FOLDERS[0] + "/footprint_ranks.py", str(folder), device, *(case.name for case in cases)]
    with (folder / "output").open("w+") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=output).returncode
        output.seek(0)
        if code:
            raise SystemExit(output.read()[-4000:])


def judge(folder: Path, case: Case, device: str) -> dict[str, Any]:
    """A row of the result."""
    config = case.config(device)
    plan = footprint_of(config, layout_of(config, case.row.world))
    ranks = [json.loads((folder / f"{case.name}-rank-{rank}.json").read_text())["peak"] for rank in range(case.row.world)]
    error = plan.total / max(ranks) - 1
    print(f"{case.name:64} planned {plan.total / 1e6:8.2f} MB   measured {max(ranks) / 1e6:8.2f} MB   {error:+.2%}", flush=True)
    return {
        "name": case.name,
        "layout": str(layout_of(config, case.row.world)),
        "planned_bytes": plan.total,
        "measured_bytes": max(ranks),
        "measured_bytes_by_rank": ranks,
        "relative_error": round(error, 5),
        "within_tolerance": abs(error) <= TOLERANCE,
        "moment": plan.moment,
        "stage": plan.stage,
        "parts_bytes": plan.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=None, metavar="NAME", help="these layouts only; no result is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--list", action="store_true", help="print the names of the layouts")
    arguments = parser.parse_args()
    cases = named(arguments.cases)
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return
    if arguments.device == "cuda":
        there = torch.cuda.device_count()
        for case in [case for case in cases if case.row.world > there]:
            print(f"{case.name}: left out, {case.row.world} devices are needed and {there} are there")
        cases = [case for case in cases if case.row.world <= there]
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), cases, arguments.device)
        rows = [judge(Path(folder), case, arguments.device) for case in cases]
    worst = max(rows, key=lambda row: abs(row["relative_error"]))
    print(f"{len(rows)} layouts, worst {worst['relative_error']:+.2%} ({worst['name']})")
    if arguments.cases is None:
        config = {"tolerance": TOLERANCE, "warm_up_steps": 2, "worst_relative_error": worst["relative_error"]}
        how = "live bytes of all tensor storages (dispatch-mode tally)" if arguments.device == "cpu" else "torch.cuda.max_memory_allocated"
        write_result("planner-memory", claim=CLAIM, config=config, rows=rows, measured=how)
    raise SystemExit(0 if all(row["within_tolerance"] for row in rows) else 1)


if __name__ == "__main__":
    main()
