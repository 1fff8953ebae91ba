"""Every kernel on the GPU of this machine: right first, then how fast, beside the ceilings of the machine and its rivals in the same run.

    python benchmarks/gpu.py                        # all rooms, at most 10 minutes
    python benchmarks/gpu.py --only ada_scan        # one room
    python benchmarks/gpu.py --dry                  # on the CPU: tiny shapes and references only, to see that everything fits together

Needs torch, triton and numpy; runs from a bare clone. A room is a file benchmarks/kernels/<room>.py with two functions that return lists of dictionaries:

    cases(device, dry)      what is timed, at the shapes that matter        checks(device, dry)     the same at small shapes in three dtypes: only compared

    name        what the row is called, with its shape
    make        seed -> tuple of inputs; called several times, so that inputs rotate
    kernel      inputs -> tensor or tensors: what is timed
    reference   inputs -> what the kernel must return (None: too large to compute; then `checks` alone answer for it)
    rivals      {name: inputs -> anything}: timed beside it; one that raises is recorded with its message
    bytes, flops    the least that must move and be multiplied: the floor is max(bytes / copy bandwidth, flops / matmul rate), both measured here
    tolerance   allowed relative error, norm of the difference over norm of the reference (default: by the coarsest dtype of inputs and outputs)
    tokens      optional: tokens that a call handles, for tokens a second
    copies      optional: sets of inputs that take turns, 1 where they are too large for two
    graph       optional: time kernel and rivals as CUDA graphs too, however long they take: a step of many launches
    conclude    optional: (row, inputs, ceilings) -> more fields of the row, from what was measured: `models` (name, tokens a second, MFU or share of the
                floor, how it ran) and `goals` (value, goal, reached), which are printed below it

Rooms run in processes of their own: a kernel that breaks the device's context, or never ends, takes its own room with it and no other. What is known is on disk
after every few seconds.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_timing import attempt, ceilings, l2_bytes, message, run_case

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("grove_gemm", "edge_spline", "ada_scan", "grove_route", "model")
"""In the order of their run; whole models last, which take what time the kernels leave."""
GRACE_SECONDS = 20  # a child ends by itself when its time is over; a kernel that hangs does not
_VERDICTS = {True: "right", False: "WRONG", None: "not compared"}
_CLAIM = (
    "Each kernel reaches 0.6 of its floor on this machine, and is ahead of what it replaces; kan_1b trains at 0.7 of the MFU of its dense twin of equal total "
    "parameters, 6.2 times as fast where the FLOPs allow, and decodes 2.86 times as fast at batch 1, elsewhere at 0.7 of its byte roofline"
)


def main() -> int:
    options = arguments()
    if options.child:
        _make_importable()
        _run_room(options)
        return 0
    started = time.monotonic()
    record = environment(options.dry)
    output = options.output or (ROOT / ".cache" if options.dry else ROOT / "benchmarks" / "results")
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{record['date'][:10]}-{record['device']['slug']}-{'dry-' if options.dry else ''}kernels.json"
    record |= {"claim": _CLAIM, "config": {"only": options.only, "dry": options.dry, "seconds": options.seconds}, "sections": {}, "rows": []}
    try:
        record["ceilings_measured"] = ceilings(_device(options.dry), options.dry)
    except Exception as error:  # rooms can still be checked and timed, without floors
        record["ceilings_measured"], record["sections"]["ceilings"] = {}, {"status": "failed", "message": message(error)}
    write(path, record)
    print(json.dumps({key: record[key] for key in ("device", "versions", "ceilings_measured")}, indent=1))
    rooms = options.only or list(ROOMS)
    for number, room in enumerate(rooms):
        left = options.seconds - (time.monotonic() - started)
        record["sections"][room] = supervise(room, left / (len(rooms) - number), options, record, path)
        write(path, record)
        print("\n".join(table(record, room)), flush=True)
    print(f"written: {path}")
    wrong = [row["name"] for row in record["rows"] if row.get("passed") is False or "failed" in row]
    failed = [name for name, section in record["sections"].items() if section["status"] == "failed"]
    for name in wrong + failed:
        print(f"FAILED: {name}")
    return 1 if wrong or failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROOM", help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny shapes")
    parser.add_argument("--seconds", type=float, default=600, help="time for everything; what does not fit is left out, and recorded so")
    parser.add_argument("--output", type=Path, help="folder of the record (default: benchmarks/results; dry: .cache)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "kernels", help="where the rooms' files lie")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", type=json.loads, default={}, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the record ---------------------------------------------------------------------------------------------------------------------------------------------


def environment(dry: bool) -> dict[str, Any]:
    """Where and with what: device, versions, commit, digests of the sources of kernels and model (which hold also where git is not), date."""
    return {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "commit": _commit(),
        "kernels_sha256": _digest("kernels"),
        "model_sha256": _digest("kan_train/model"),
        "device": _device_facts(dry),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "triton", "numpy", "fla-core")}},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _device_facts(dry: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"os": platform.platform(), "cores": os.cpu_count(), "slug": "cpu"}
    if _device(dry).type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(l2_bytes() / 2**20, 1),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver_and_clocks": _ask("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"),
            "slug": re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-"),
        }
    return facts


def _commit() -> str:
    commit = _ask("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _ask("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", "kernels", "benchmarks", "kan_train")
    return f"{commit} and changes" if commit and changed else commit or "unknown"


def _ask(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _digest(folder: str) -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a visit that is cut off leaves the record of a few seconds ago."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(record, indent=1, default=str) + "\n")
    fresh.replace(path)


def table(record: dict[str, Any], room: str) -> Iterator[str]:
    """A room's rows as text: milliseconds, share of the floor, and each rival's time over the kernel's (above 1: the kernel is ahead)."""
    section = record["sections"][room]
    yield f"\n{room}: {section['status']} {section.get('message', '')}"
    for row in (row for row in record["rows"] if row["room"] == room):
        if "failed" in row:
            yield f"  {row['name']}: FAILED {row['failed']}"
            continue
        line = f"  {row['name']}: {_VERDICTS[row.get('passed')]}"
        if isinstance(row.get("error"), float):
            line += f" (error {row['error']:.1e})"
        if "median_ms" in row:
            low, high = row["quartiles_ms"]
            line += f"  {row['median_ms']:.4f} ms [{low:.4f}, {high:.4f}]"
        if "median_ms" in row.get("graph", {}):
            line += f", as a graph {row['graph']['median_ms']:.4f}"
        if row.get("share"):
            line += f"  {100 * row['share']:.0f}% of the {row['bound']} floor"
        for name, rival in row.get("rivals", {}).items():
            line += f"  | {name} " + (f"x{rival['ratio']:.2f}" if "ratio" in rival else f"failed: {rival['failed'][:60]}")
        yield line
        yield from _model_lines(row)


def _model_lines(row: dict[str, Any]) -> Iterator[str]:
    """Below the row of a whole model: what each of its models reached, the ideal ratio, and the goals."""
    for model in row.get("models", []):
        line = f"      {model['name']}: {model['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in model:
            line += ", MFU " + ", ".join(f"{mfu:.3f} ({counting})" for counting, mfu in model["mfu"].items()) + f" of {model['peak']}"
        if "share" in model:
            line += f", {100 * model['share']:.0f}% of the byte floor"
        yield f"{line}, {model['how']}"
    if row.get("achieved_ratio") and "ideal_flop_ratio" in row:
        ideal = ", ".join(f"{ratio:.2f} ({counting})" for counting, ratio in row["ideal_flop_ratio"].items())
        yield f"      tokens a second x{row['achieved_ratio']:.2f}, FLOP ratio {ideal}"
    if row.get("achieved_ratio") and "ideal_byte_ratio" in row:
        yield f"      tokens a second x{row['achieved_ratio']:.2f}, byte ratio {row['ideal_byte_ratio']:.2f}"
    for name, goal in row.get("goals", {}).items():
        yield f"      goal: {name} {goal['value']:.2f} of {goal['goal']}: {'reached' if goal['reached'] else 'NOT reached'}"


# --- rooms, each in a process of its own ----------------------------------------------------------------------------------------------------------------------


def supervise(room: str, seconds: float, options: argparse.Namespace, record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run a room for its share of the time; its rows enter the record as they come."""
    if seconds < 1:
        return {"status": "out of time"}
    started, before = time.monotonic(), list(record["rows"])
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        command = [sys.executable, __file__, "--child", room, "--rows", str(rows), "--seconds", str(seconds), "--folder", str(options.folder)]
        command += ["--ceilings", json.dumps(record["ceilings_measured"]), *(["--dry"] if options.dry else [])]
        with (Path(folder) / "errors").open("w+") as errors:
            process = subprocess.Popen(command, stderr=errors)
            try:
                while process.poll() is None and time.monotonic() - started < seconds + GRACE_SECONDS:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(2)
                    record["rows"] = before + [row for row in _read_rows(rows, room) if "end" not in row]
                    record["sections"][room] = {"status": "running"}
                    write(path, record)
            finally:  # also where this process is interrupted
                killed = process.poll() is None
                if killed:
                    process.kill()
                    process.wait()
            errors.seek(0)
            said = errors.read().strip()
        found = _read_rows(rows, room)
        if said:
            print(said, file=sys.stderr)
    ended = bool(found) and found[-1].get("end")
    record["rows"] = before + [row for row in found if "end" not in row]
    section: dict[str, Any] = {"status": found[-1]["end"] if ended else "failed", "seconds": round(time.monotonic() - started, 1)}
    if killed:
        section["message"] = f"did not end within {seconds + GRACE_SECONDS:.0f} s"
    elif not ended:
        section["message"] = f"exit status {process.returncode}: {said.splitlines()[-1] if said else 'no message'}"
    return section


def _read_rows(path: Path, room: str) -> list[dict[str, Any]]:
    # The last line may be half written by a process that was killed.
    return [{"room": room, **json.loads(line)} for line in path.read_text().split("\n")[:-1]]


def _run_room(options: argparse.Namespace) -> None:
    """The child: checks, then cases, each row on disk when it is known."""
    deadline = time.monotonic() + options.seconds
    device = _device(options.dry)
    spec = importlib.util.spec_from_file_location(f"benchmark_{options.child}", options.folder / f"{options.child}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A room without small shapes of its own is checked at those of its dry run, which on a GPU run its kernels.
    small = module.checks(device, options.dry) if hasattr(module, "checks") else module.cases(device, True)
    cases = module.cases(device, options.dry)
    with options.rows.open("a") as file:
        for timed, case in [(False, case) for case in small] + [(True, case) for case in cases]:
            if time.monotonic() > deadline:
                print(json.dumps({"end": "out of time"}), file=file)
                return
            row = {"name": case["name"]} | attempt(lambda case=case, timed=timed: run_case(case, device, options.ceilings, timed=timed))
            print(json.dumps(row), file=file, flush=True)
        print(json.dumps({"end": "done"}), file=file)


def _make_importable() -> None:
    """This clone's kan_train, whatever is installed; and kernels/ inside it, which in a clone stands beside it."""
    sys.path.insert(0, str(ROOT))
    import kan_train

    if importlib.util.find_spec("kan_train.kernels") is None:
        kan_train.__path__.append(str(ROOT))


def _device(dry: bool) -> torch.device:
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a GPU that torch can use; without one there is --dry")
    return torch.device("cuda")


if __name__ == "__main__":
    sys.exit(main())
