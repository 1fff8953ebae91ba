"""The campaign: all rows, each in processes of its own here, or in those that torchrun started; its table and its record."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from common import write_result

from layout_matrix.compare import BF16, FP32, Comparison, compare
from layout_matrix.faults import FAULTS
from layout_matrix.pool import Pool, Run, read_ranks
from layout_matrix.reference import Reference, references
from layout_matrix.rows import LENGTH, SEQUENCES, STEPS, Row, find

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "layouts.md"
MARK = "<!-- the table below is written by benchmarks/layouts.py -->"
CLAIM = "every layout trains the same model as one process: loss and global gradient norm within 1e-5 in fp32, step by step"


def main(description: str) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="these rows only")
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4, 8], help="rows of these numbers of processes only")
    parser.add_argument("--here", action="store_true", help="under torchrun: run in these processes, the rows of as many")
    keeps = "keep what the rows leave here, and go on where a campaign stopped; with --here on several nodes a folder that all share"
    parser.add_argument("--folder", type=Path, help=keeps)
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    arguments = parser.parse_args()
    rows = [row for row in find(arguments.rows) if arguments.rows or row.world in arguments.world]
    if arguments.list:
        print("\n".join(row.name for row in rows))
    elif arguments.here:
        run_here([row for row in rows if row.world == int(os.environ["WORLD_SIZE"])], arguments.folder)
    else:
        with folder_of(arguments.folder) as folder:
            whole = not arguments.rows and len(arguments.world) == 3
            results, faults = run_forked(rows, folder, list(FAULTS) if whole else [])
            report(results, write="layouts" if whole else None, faults=faults)


def run_forked(rows: list[Row], folder: Path, faults: list[str]) -> tuple[list[tuple[Row, Comparison]], dict[str, Comparison]]:
    """Each row in processes of its own, one row after the other; then three steps of a row with each of `faults` planted.

    Rows that agreed leave their figures in `folder`, and are not run again there: a campaign that was stopped goes on.
    """
    torch.set_num_threads(1)
    with Pool() as pool:
        kept = dict(references(rows, folder))
        results = []
        for row in rows:
            started, reference, done = time.perf_counter(), kept[row.model_key], folder / f"{row.name}.json"
            if done.exists():
                found = Comparison(**json.loads(done.read_text()))
            else:
                run = pool.run(row, folder / row.name, choices=reference / "tensors.safetensors")
                found = compare(row, run, Reference.load(reference))
                if not found.failures:
                    done.write_text(json.dumps(vars(found)))
            results.append((row, found))
            show(row, found, time.perf_counter() - started)
        broken = {}
        for name in faults:
            (row,), started = find([FAULTS[name].row]), time.perf_counter()
            reference = kept[row.model_key]
            run = pool.run(row, folder / name, choices=reference / "tensors.safetensors", fault=name, steps=3)
            broken[name] = compare(row, run, Reference.load(reference))
            print(f"fault {name}: {'found' if broken[name].failures else 'NOT FOUND'}", end=", ")
            show(row, broken[name], time.perf_counter() - started)
        print(f"imports, once instead of in every process: {pool.import_seconds:.1f} s")
    return results, broken


def run_here(rows: list[Row], folder: Path | None) -> None:
    """All rows in the processes that torchrun started, on their devices; rank 0 has the reference and the report."""
    from kan_train.parallel.runtime import runtime
    from layout_matrix.member import train_row

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not rows:
        raise SystemExit(f"no row has {os.environ['WORLD_SIZE']} processes; start 2, 4 or 8")
    with runtime(rows[0].config(device=device, minutes=30)) as process, folder_of(folder, share=True) as shared:
        kept = dict(references(rows, shared)) if process.is_first else {}
        process.barrier()
        results = []
        for row in rows:
            choices, own = shared / row.model_key / "tensors.safetensors", shared / row.name
            own.mkdir(exist_ok=True)
            started = time.perf_counter()
            train_row(row, process, own, config=row.config(device=device, minutes=30), choices=choices)
            process.barrier()
            if process.is_first:
                results.append((row, compare(row, Run(own, read_ranks(row, own)), Reference.load(kept[row.model_key]))))
                show(*results[-1], time.perf_counter() - started)
        if process.is_first:
            report(results, write=f"layouts-{process.world_size}" if device == "cuda" else None, faults={})


@contextmanager
def folder_of(given: Path | None, share: bool = False) -> Iterator[Path]:
    """The folder that was given, or one that is removed afterwards; share: rank 0's, known to all processes of this machine."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    if not share:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    with tempfile.TemporaryDirectory() as made:
        names = [made]
        dist.broadcast_object_list(names, src=0)
        yield Path(names[0])
        dist.barrier()


def show(row: Row, found: Comparison, seconds: float) -> None:
    """One line while the campaign runs, and the failures of a row that fails."""
    print(
        f"{'ok  ' if not found.failures else 'FAIL'} {row.name:44s} loss {found.loss:.1e} norm {found.norm:.1e} gradient {found.gradient:.1e} "
        f"weight {found.weight:.1e} flips {found.flips} ({found.margin:.0e}) {found.tokens_per_second:6.0f} tokens/s {seconds:.1f} s",
        *(f"\n     {failure}" for failure in found.failures),
        flush=True,
    )


HEADER = """
| layout | processes | dense copies | grove copies | loss | norm | gradient | flips | margin | tokens/s |
|---|---|---|---|---|---|---|---|---|---|
"""


def line(row: Row, found: Comparison) -> str:
    """A row of the table."""
    copies = f"| {row.world} | {row.dense_copies} | {'-' if row.kind == 'dense' else row.grove_copies} "
    figures = f"| {found.loss:.1e} | {found.norm:.1e} | {found.gradient:.1e} | {found.flips} | {found.margin:.0e} | {found.tokens_per_second:,.0f} |"
    return f"| {row.name} {copies}{figures}{' FAILED' if found.failures else ''}"


FAULTS_HEADER = """
Planted faults, three steps each; every one must break a bound:

| fault | planted in | loss | norm | gradient |
|---|---|---|---|---|
"""


def fault_line(name: str, found: Comparison) -> str:
    """A row of the table of planted faults."""
    missed = "" if found.failures else " NOT FOUND"
    return f"| {name.replace('_', ' ')} | {FAULTS[name].row} | {found.loss:.1e} | {found.norm:.1e} | {found.gradient:.1e} |{missed}"


def report(results: list[tuple[Row, Comparison]], write: str | None, faults: dict[str, Comparison]) -> None:
    """Print the tables; write: name of the result file, and the document; the exit code says whether every row agreed and every fault was found."""
    table = HEADER.lstrip() + "\n".join(line(*result) for result in results) + "\n"
    if faults:
        table += FAULTS_HEADER + "\n".join(fault_line(*fault) for fault in faults.items()) + "\n"
    failed = [row.name for row, found in results if found.failures]
    missed = [name for name, found in faults.items() if not found.failures]
    print(f"\n{table}\n{len(results) - len(failed)} of {len(results)} rows agree")
    if write:
        config = {"steps": STEPS, "sequences": SEQUENCES, "sequence_length": LENGTH, "bounds": {"fp32": vars(FP32), "bf16": vars(BF16)}}
        facts = [{"name": row.name, "world": row.world, "dense_copies": row.dense_copies, "grove_copies": row.grove_copies} for row, _ in results]
        path = write_result(
            write,
            claim=CLAIM,
            config=config,
            rows=[fact | vars(found) for fact, (_, found) in zip(facts, results, strict=True)],
            planted_faults={name: vars(found) for name, found in faults.items()},
        )
        if write == "layouts":
            head = DOCUMENT.read_text().split(MARK)[0]
            DOCUMENT.write_text(f"{head}{MARK}\n\n{len(results) - len(failed)} of {len(results)} rows agree (`{path.relative_to(ROOT)}`).\n\n{table}")
    if failed or missed:
        raise SystemExit(f"failed: {', '.join(failed) or 'no row'}; faults not found: {', '.join(missed) or 'none'}")
