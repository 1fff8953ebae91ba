"""Seconds from the command to the first finished optimizer step, on prepared data.

    python benchmarks/startup.py            # needs a prepared corpus: kan data prepare
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import write_result

CASES = {
    "one process": [sys.executable, "-m", "kan_train", "train"],
    "one process, ZeRO-1": [sys.executable, "-m", "kan_train", "train", "parallel.zero_stage=1"],
    "two processes, ZeRO-2": [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kan_train", "train", "parallel.zero_stage=2",
        "train.micro_batch_size=4",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=Path("corpora"), help="folder of prepared corpora")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = [{"name": name, "seconds": sorted(_seconds(command, arguments.corpora) for _ in range(arguments.repeats))} for name, command in CASES.items()]
    for row in rows:
        row["median_seconds"] = row["seconds"][len(row["seconds"]) // 2]
        print(f"{row['name']:24s} {row['median_seconds']:.1f} s")
    write_result("startup", claim="from `kan train` to the first finished step on prepared data: under 15 s", config={"model": "kan_tiny"}, rows=rows)


def _seconds(command: list[str], corpora: Path) -> float:
    """Wall time until the first row of metrics.jsonl stands in the run directory."""
    shutil.rmtree("runs/startup", ignore_errors=True)
    metrics = Path("runs/startup/metrics.jsonl")
    settings = ["run.name=startup", "train.steps=2000", f"data.root={corpora}", "train.validate_every=0", "logging.progress=false"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with status {process.returncode} before its first step")
            time.sleep(0.02)
        elapsed = time.perf_counter() - start
        first = json.loads(metrics.read_text().splitlines()[0])
        assert first["step"] == 1, first
        return round(elapsed, 2)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree("runs/startup", ignore_errors=True)


if __name__ == "__main__":
    main()
