"""All pairs of the layouts, their table and their record."""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import write_result
from layout_matrix.compare import FP32
from layout_matrix.pool import Pool

from recovery_proofs.corpus import prepare
from recovery_proofs.layouts import LAYOUTS, SAVED, STEPS, Pair
from recovery_proofs.pairs import Pairs

CLAIM = (
    "what a layout saved, any other goes on with: saved again at once it is the same bit for bit, the next steps are those of one process that was never "
    "stopped (losses and norms to 1e-5), with the same samples; the same layout goes on bit for bit"
)


def main(description: str) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS], metavar="NAME", help=f"some of: {', '.join(LAYOUTS)}")
    parser.add_argument("--no-result", action="store_true", help="print alone")
    arguments = parser.parse_args()
    names = arguments.layouts
    wanted = [Pair(saving, loading) for saving in names for loading in names if LAYOUTS[saving].kind == LAYOUTS[loading].kind]
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made, Pool() as pool:
        pairs = Pairs(pool, prepare(Path(made) / "corpora"), Path(made))
        for number, pair in enumerate(wanted, start=1):
            started = time.perf_counter()
            found = pairs.judge(pair)
            rows.append({"name": str(pair), "saving": pair.saving, "loading": pair.loading, **vars(found)})
            print(
                f"{number:4d} of {len(wanted)} {'ok  ' if not found.failures else 'FAIL'} {pair!s:44s} {found.tensors} tensors loss {found.loss:.1e} "
                f"norm {found.norm:.1e} weight {found.weight:.1e} flips {found.flips} {time.perf_counter() - started:.1f} s",
                *(f"\n     {failure}" for failure in found.failures),
                flush=True,
            )
    failed = [row["name"] for row in rows if row["failures"]]
    print(f"\n{_table(names, rows)}\n{len(rows) - len(failed)} of {len(rows)} pairs hold")
    if not arguments.no_result:
        config = {"steps_before": SAVED, "steps": STEPS, "bounds": vars(FP32), "layouts": {name: vars(LAYOUTS[name]) for name in names}}
        write_result("reshard", claim=CLAIM, config=config, rows=rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _table(names: list[str], rows: list[dict[str, Any]]) -> str:
    """Saving layouts down, loading ones across (by number): the larger difference of losses and norms, or what failed."""
    cells = {(row["saving"], row["loading"]): "FAIL" if row["failures"] else f"{max(row['loss'], row['norm']):.0e}" for row in rows}
    lines = [" " * 25 + "".join(f"{number:>7d}" for number in range(1, len(names) + 1))]
    for number, saving in enumerate(names, start=1):
        lines.append(f"{number:3d} {saving:21s}" + "".join(f"{cells.get((saving, loading), ''):>7s}" for loading in names))
    return "\n".join(lines)
