"""The campaign of failures: rounds of journeys in random order, their table and their record."""

import argparse
import asyncio
import random
import statistics
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from common import write_result
from recovery_proofs.corpus import prepare

from slurm_proofs.cluster import CREDENTIAL_SECONDS, DOWN_SECONDS, GRACE_SECONDS, Cluster
from slurm_proofs.failures import FAILURES
from slurm_proofs.journeys import AT_ONCE, NODES, Journey, all_of, judge, travel, undisturbed
from slurm_proofs.runs import EVERY, SETTINGS, VALIDATE_EVERY, Run

FAILURES_A_RUN = 4

STEPS = 500
"""Of a run: it must be under way still when Slurm, which looks every 30 s, finds its time limit near."""

CLAIM = (
    "a run of two nodes that `kan launch slurm` submitted goes on by itself after each failure of the cluster, and ends as the run that suffered nothing: "
    "rows, checkpoints and place in the data to the last bit, no sample lost; where the trainers are told no step is repeated, else at most two checkpoint "
    "intervals"
)


def main(description: str) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each failure is suffered")
    parser.add_argument("--failures", nargs="+", choices=FAILURES, default=[*FAILURES], metavar="NAME", help=f"some of: {', '.join(FAILURES)}")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the cluster's logs and the runs here; it must not exist")
    parser.add_argument("--no-result", action="store_true", help="print alone")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = (arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "failures").absolute()
        journeys, wrong = run_all(folder, routes(arguments.failures, arguments.rounds, arguments.seed), arguments.steps)
    rows = [_summary(name, journeys) for name in (*arguments.failures, "all")]
    print(_table(rows))
    print("\n".join(wrong) or "no failure of the launcher")
    if not arguments.no_result:
        config = {"rounds": arguments.rounds, "seed": arguments.seed, "steps": arguments.steps, "checkpoint_every": EVERY, "validate_every": VALIDATE_EVERY}
        config |= {"settings": SETTINGS, "runs_at_once": AT_ONCE, "nodes": NODES, "slurm": _slurm_version()}
        config |= {"cred_expire_s": CREDENTIAL_SECONDS, "slurmd_timeout_s": DOWN_SECONDS, "grace_s": GRACE_SECONDS}
        suffered = [one.as_row() for journey in journeys for one in journey.suffered]
        write_result("cluster-failures", claim=CLAIM, config=config, rows=rows, failures=wrong, suffered=suffered)
    if wrong:
        raise SystemExit(1)


def routes(names: list[str], rounds: int, seed: int) -> list[list[str]]:
    """The failures of every run: each of `names` once a round, in random order."""
    order = random.Random(seed)
    found: list[list[str]] = []
    for _ in range(rounds):
        shuffled = order.sample(names, len(names))
        found += [shuffled[first : first + FAILURES_A_RUN] for first in range(0, len(shuffled), FAILURES_A_RUN)]
    return found


def run_all(folder: Path, wanted: list[list[str]], steps: int) -> tuple[list[Journey], list[str]]:
    """Make all journeys in `folder`; returns them, and a line for everything that was not as it must be."""
    corpora = prepare(folder / "corpora")
    folder.chmod(0o755)  # munge's socket must be reachable
    with Cluster(folder / "cluster", NODES) as cluster:
        scenes: dict[str, Any] = {"undisturbed": partial(undisturbed, Run(cluster, corpora, folder / "undisturbed", steps=steps))}
        for number, names in enumerate(wanted):
            scenes[f"run {number}"] = partial(_told, number, Run(cluster, corpora, folder / f"run-{number}", steps=steps), names)
        results = asyncio.run(all_of(scenes))
    whole = results.pop("undisturbed")
    if isinstance(whole, Exception):
        raise whole
    broken = [f"{name}: {''.join(traceback.format_exception(error))}" for name, error in results.items() if isinstance(error, Exception)]
    journeys = {name: journey for name, journey in results.items() if isinstance(journey, Journey)}
    return [*journeys.values()], broken + [f"{name}: {text}" for name, journey in journeys.items() for text in judge(journey, whole)]


async def _told(number: int, run: Run, names: list[str]) -> Journey:
    journey = await travel(run, names)
    seconds = ", ".join(f"{one.failure} {one.seconds_to_next_step} s" for one in journey.suffered)
    print(f"run {number}: {seconds}" + "".join(f"\n  {text}" for text in journey.failures), flush=True)
    return journey


def _summary(name: str, journeys: list[Journey]) -> dict[str, Any]:
    """Counts and times of one failure, or of all."""
    found = [one for journey in journeys for one in journey.suffered if name in (one.failure, "all")]
    seconds = [one.seconds_to_next_step for one in found]
    return {
        "name": name,
        "times": len(found),
        "to_next_step_s_median": statistics.median(seconds) if seconds else None,
        "to_next_step_s_most": max(seconds, default=None),
        "repeated_steps_median": statistics.median([one.repeated_steps for one in found]) if found else None,
        "repeated_steps_most": max((one.repeated_steps for one in found), default=None),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    heads = [name for name in rows[0] if name != "name"]
    return "\n".join([f"{'':32s} " + "  ".join(head.replace("_", " ") for head in heads), *_lines(rows, heads)])


def _lines(rows: list[dict[str, Any]], heads: list[str]) -> Iterator[str]:
    for row in rows:
        cells = [f"{row[head]:.1f}" if isinstance(row[head], float) else str(row[head]) for head in heads]
        yield f"{row['name']:32s} " + "  ".join(f"{cell:>{len(head)}s}" for cell, head in zip(cells, heads, strict=True))


def _slurm_version() -> str:
    return subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip()
