"""What a checkpoint costs: how long training waits, how fast the bytes are written and read, and the memory beside them.

Side by side, in fresh processes one after the other, over and over: this project's save in the background and in the foreground, torch.save,
torch.distributed.checkpoint (dcp.save, dcp.async_save), all of the same state of a model in training. The ceilings are measured among them: a plain copy
in memory, and a plain write (fsync included) and read of the same bytes on the same disk. Files are dropped from the page cache before they are read; the
share of them that stayed there is in the result.

    python benchmarks/saving.py                                          # 1 GB of parameters and optimizer state, 1 and 2 processes
    python benchmarks/saving.py --small --rounds 1 --no-result           # 0.13 GB, to try it
    python benchmarks/saving.py --folder /mnt/disk --processes 1
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "layouts"))

from layout_matrix.pool import Pool

MODELS = {"1 GB": ("model=kan_125m", "model.num_layers=7"), "small": ("model=kan_tiny",)}
SETTINGS = (
    "model.sequence_length=128", "train.global_batch_size=2", "train.micro_batch_size=1", "train.validate_every=0", "optimizer.schedule.warmup_steps=2",
    "run.name=saving", "run.device=cpu",
)  # fmt: skip
METHODS = ("plain", "kan, background", "kan", "torch.save", "dcp.save", "dcp.async_save", "restart")
"""In the order of a round. plain: the ceilings. restart: from a process with its imports to the first step after a load."""

CLAIM = (
    "a save in the background makes training wait for the copy in memory alone; checkpoints are written and read at 70% or more of a plain write and read; "
    "one copy of what a rank writes is held beside the training state; a restart takes under 30 s"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="kan_tiny: 0.13 GB")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME", help=f"some of: {', '.join(METHODS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; unset: the temporary folder")
    parser.add_argument("--no-result", action="store_true", help="print alone")
    arguments = parser.parse_args()
    overrides = [*MODELS["small" if arguments.small else "1 GB"], *SETTINGS]
    seen: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made, Pool("kan_train.config.compose", "torch.distributed.checkpoint", "saving_rank") as pool:
        for number in range(arguments.rounds):
            for processes in arguments.processes:
                for method in arguments.methods:
                    figures = _measure(pool, Path(made), method, processes, overrides)
                    seen.setdefault((processes, method), []).append(figures)
                    print(f"round {number + 1} of {arguments.rounds}, {processes} processes, {method:16s} {_line(figures)}", flush=True)
        imports = pool.import_seconds
    rows = _rows(seen, arguments.processes)
    print(f"\n{rows[0]['bytes'] / 1e9:.2f} GB, medians:")
    for row in rows:
        print(f"{row['name']:32s} {_line(row)}")
    if not arguments.no_result:
        config = {"overrides": overrides, "rounds": arguments.rounds, "processes": arguments.processes, "import_seconds": imports}
        write_result("saving", claim=CLAIM, config=config, rows=rows)


def _measure(pool: Pool, made: Path, method: str, processes: int, overrides: list[str]) -> dict[str, Any]:
    """The figures of one method in fresh processes: sizes and rates of all together, the longest wait, the most memory a byte."""
    folder = made / "run"
    folder.mkdir()
    job = pool.start("saving_rank:measure", processes, folder, {"method": method, "overrides": overrides}, seconds=900)
    if any(job.wait()):
        raise SystemExit("\n".join(path.read_text() for path in sorted(folder.glob("output-*"))))
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    shutil.rmtree(folder)
    figures: dict[str, Any] = {"bytes": sum(rank["bytes"] for rank in ranks)}
    for name in ranks[0]:
        if name != "bytes":
            figures[name] = max(rank[name] for rank in ranks)
    for name in [name for name in figures if name.endswith("_io_seconds")]:
        figures[name.removesuffix("_io_seconds") + "_gb_per_second"] = figures["bytes"] / 1e9 / figures.pop(name)
    return figures


def _rows(seen: dict[tuple[int, str], list[dict[str, Any]]], processes: list[int]) -> list[dict[str, Any]]:
    """Medians over the rounds, and beside the ceilings of as many processes."""
    rows = []
    for (count, method), rounds in sorted(seen.items(), key=lambda item: (processes.index(item[0][0]), METHODS.index(item[0][1]))):
        row: dict[str, Any] = {"name": f"{method}, {count} processes", "processes": count, "method": method, "rounds": len(rounds)}
        row |= {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
        plain = next((other for other in rows if other["method"] == "plain" and other["processes"] == count), None)
        if "stall_seconds" in row:
            gigabytes = row["bytes"] / count / 1e9
            row["stall_ms_per_gb_of_a_rank"] = 1e3 * row["stall_seconds"] / gigabytes
            row["stall_steps"] = row["stall_seconds"] / row["step_seconds"]
            row["lost_steps"] = (row["stall_seconds"] + row["slowed_seconds"]) / row["step_seconds"]
            if plain:
                row["stall_over_plain_copy"] = row["stall_seconds"] / plain["copy_seconds"]
        for name in ("write_gb_per_second", "read_gb_per_second"):
            if plain and name in row and row is not plain:
                row[f"{name.partition('_')[0]}_share_of_plain"] = row[name] / plain[name]
        rows.append(row)
    return rows


COLUMNS = {
    "stall_seconds": "stall s", "stall_ms_per_gb_of_a_rank": "stall ms/GB", "stall_over_plain_copy": "of a copy", "stall_steps": "stall steps",
    "lost_steps": "lost steps", "write_gb_per_second": "write GB/s", "write_share_of_plain": "of plain", "read_gb_per_second": "read GB/s",
    "read_share_of_plain": "of plain", "memory_per_byte": "memory/byte", "left_in_page_cache": "in cache", "copy_seconds": "copy s",
    "sha256_gb_per_second": "SHA-256 GB/s", "restart_seconds": "restart s",
}  # fmt: skip


def _line(figures: dict[str, Any]) -> str:
    return ", ".join(f"{title} {figures[name]:.3g}" for name, title in COLUMNS.items() if name in figures)


if __name__ == "__main__":
    main()
