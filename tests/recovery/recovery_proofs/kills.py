"""The campaign of kills: episodes until enough processes were killed, their table and their record."""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import write_result
from layout_matrix.pool import Pool

from recovery_proofs.corpus import prepare
from recovery_proofs.episode import AIMS, CASES, EVERY, SETTINGS, Whole, run_killed, run_whole
from recovery_proofs.jobs import Forked, Launcher, Torchrun

KILLS_A_RUN = 12
"""A run is killed so many times at most, and then left to finish."""

CLAIM = (
    "after kill -9 of a random rank at a random moment, saves and start-up included, the same command resumes from the newest valid checkpoint and gives "
    "the uninterrupted run bit for bit, samples included; at most one checkpoint interval is repeated (with background saves at most one more, the one in "
    "flight); nothing is left over; the next step is finished in under 30 s"
)


def main(description: str) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of processes that are forked without imports")
    parser.add_argument("--torchrun", type=int, default=10, metavar="KILLS", help="of processes of the torchrun command, besides")
    parser.add_argument("--layouts", nargs="+", choices=CASES, default=[*CASES], metavar="NAME", help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on where a campaign stopped")
    parser.add_argument("--no-result", action="store_true", help="print alone")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = (arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        records = run_all(folder, arguments.layouts, arguments.seed, arguments.kills, arguments.torchrun)
    rows = [_summary(launcher, name, records) for launcher in ("forked", "torchrun") for name in (*arguments.layouts, "all")]
    rows = [row for row in rows if row["kills"]]
    print(_table(rows))
    failures = [f"{record['launcher']} {record['case']} {record['number']}: {text}" for record in records for text in record["failures"]]
    print("\n".join(failures) or "no failure")
    if not arguments.no_result:
        config = {"kills": arguments.kills, "torchrun": arguments.torchrun, "seed": arguments.seed, "aims": AIMS, "kills_a_run": KILLS_A_RUN}
        config |= {"checkpoint_every": EVERY, "settings": SETTINGS, "layouts": {name: vars(CASES[name]) for name in arguments.layouts}}
        write_result("kills", claim=CLAIM, config=config, rows=rows, failures=failures, episodes=records)
    if failures:
        raise SystemExit(1)


def run_all(folder: Path, layouts: list[str], seed: int, kills: int, torchrun: int) -> list[dict[str, Any]]:
    """Episodes of `layouts` in turn until there were as many kills; those that `folder` has from before count. Returns the episodes' records."""
    corpora = folder / "corpora"
    if not (corpora / "prepared").exists():
        prepare(corpora)
        (corpora / "prepared").touch()
    done = folder / "episodes.jsonl"
    records: list[dict[str, Any]] = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    with ExitStack() as stack:
        for name, wanted in ((Forked.name, kills), (Torchrun.name, torchrun)):
            if _kills(records, name) >= wanted:
                continue
            launcher: Launcher = Forked(stack.enter_context(Pool("recovery_proofs.entry"))) if name == Forked.name else Torchrun()
            advance = stack.enter_context(_progress(f"kills, {name}", wanted, _kills(records, name)))
            for record in _episodes(launcher, folder, corpora, layouts, seed, wanted, records):
                with done.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                records.append(record)
                advance(_kills(records, name), len([text for each in records for text in each["failures"]]))
    return records


def _episodes(
    launcher: Launcher, folder: Path, corpora: Path, layouts: list[str], seed: int, wanted: int, records: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    wholes: dict[str, Whole] = {}
    while (missing := wanted - _kills(records, launcher.name)) > 0:
        number = len([record for record in records if record["launcher"] == launcher.name])
        name = layouts[number % len(layouts)]
        if name not in wholes:
            wholes[name] = run_whole(CASES[name], launcher, corpora, _fresh(folder / launcher.name / name / "whole"))
        own = _fresh(folder / launcher.name / name / f"episode-{number}")
        # Few are spread over the layouts; many are as many a run as it takes.
        several = min(missing, KILLS_A_RUN, max(1, -(-wanted // len(layouts))))
        aims = random.Random(f"aims {seed} {number}").choices([*AIMS], [*AIMS.values()], k=several)
        found = run_killed(CASES[name], launcher, corpora, own, wholes[name], aims=aims, seed=f"{seed} {number}")
        yield {"case": name, "launcher": launcher.name, "number": number, **asdict(found)}


def _fresh(folder: Path) -> Path:
    """A folder that is not there yet: one that a campaign left half-way is put aside."""
    number = 0
    while (found := folder.with_name(f"{folder.name}{f'-{number}' if number else ''}")).exists():
        number += 1
    return found


def _kills(records: list[dict[str, Any]], launcher: str) -> int:
    return sum(len(record["kills"]) for record in records if record["launcher"] == launcher)


def _summary(launcher: str, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and restart times of a layout's episodes, or of all."""
    chosen = [record for record in records if record["launcher"] == launcher and name in (record["case"], "all")]
    kills = [kill for record in chosen for kill in record["kills"]]
    restarts = [kill["restart_seconds"] for kill in [*kills, *chosen] if kill["restart_seconds"] is not None]
    return {
        "name": f"{name}, {launcher}",
        "runs": len(chosen),
        "kills": len(kills),
        "in_start_up": len([kill for kill in kills if kill["hit"] == "start-up"]),
        "in_a_save": len([kill for kill in kills if kill["hit"] == "save"]),
        "in_a_step": len([kill for kill in kills if kill["hit"] == "step"]),
        "origins_checked": len([kill for kill in kills if kill["origin"]]) + len(chosen),
        "most_repeated_steps": max((kill["repeated"] for kill in kills), default=0),
        "restart_s_median": statistics.median(restarts) if restarts else None,
        "restart_s_most": max(restarts, default=None),
        "failures": len([text for record in chosen for text in record["failures"]]),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    heads = [name for name in rows[0] if name != "name"] if rows else []
    lines = [f"{'':30s} " + "  ".join(head.replace("_", " ") for head in heads)]
    for row in rows:
        cells = [f"{row[head]:.1f}" if isinstance(row[head], float) else str(row[head]) for head in heads]
        lines.append(f"{row['name']:30s} " + "  ".join(f"{cell:>{len(head)}s}" for cell, head in zip(cells, heads, strict=True)))
    return "\n".join(lines)


@contextmanager
def _progress(title: str, total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told how many are done, and how many failures there were."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("failures {task.fields[failures]}"))
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total, completed=done, failures=0)
        yield lambda completed, failures: bar.update(task, completed=completed, failures=failures)
