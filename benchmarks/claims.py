"""The paper's claims, put to the test: training speed, learning and decoding of the KAN against three rivals, and what each of its parts is worth.

    python benchmarks/claims.py                     # all of it at a CPU's size: about 80 minutes on two cores; what is there is not done again
    python benchmarks/claims.py speed               # one part: speed, learning or page
    python benchmarks/claims.py --scale 125m        # on a GPU: kan_125m and its twins; 1b: kan_1b
    python benchmarks/claims.py page                # docs/claims.md from the newest result files, nothing else

Arms, sweep and seeds are those of claims_arms.py, the same for every arm. Equal dollars are equal device-time at equal price, so the
part `learning` takes the speeds of the newest result of the part `speed`. Decoding is measured by benchmarks/decode.py.
"""

import argparse
from pathlib import Path

import torch
from claims_arms import SCALES, Scale
from claims_learning import BUDGETS, learning_rows
from claims_page import newest_result, write_page
from claims_speed import gradient_rows, initialisation_rows, speed_rows, training_speeds, workload_rows
from common import write_result

PARTS = ("speed", "learning", "page")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="tiny: a CPU; 125m and 1b: a GPU")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="of the arms in `learning`")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of `speed`, after one that warms up: 2 or more")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads in `speed`; `learning` trains with one a run")
    parser.add_argument("--jobs", type=int, help="runs at a time in `learning` (default: 2 on a CPU, 1 on a GPU)")
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"), help="where the runs of `learning` are kept")
    parser.add_argument("--corpora", type=Path, default=Path("corpora"), help="folder of prepared corpora (kan data prepare)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more, for quartiles; use --rounds 4")
    if arguments.jobs is None:
        arguments.jobs = 1 if torch.cuda.is_available() else 2
    scale = SCALES[arguments.scale]
    if "speed" in arguments.parts:
        _speed(scale, arguments)
    if "learning" in arguments.parts:
        _learning(scale, arguments)
    if "page" in arguments.parts:
        print(f"written: {write_page()}")


def _speed(scale: Scale, arguments: argparse.Namespace) -> None:
    rows = [
        *speed_rows(scale, corpora=arguments.corpora, rounds=arguments.rounds, threads=arguments.threads),
        *workload_rows(scale, corpora=arguments.corpora, rounds=arguments.rounds, threads=arguments.threads),
        *gradient_rows(scale, corpora=arguments.corpora),
        *initialisation_rows(scale, rounds=arguments.rounds),
    ]
    claim = "The KAN trains 6.2 times as fast as the dense model of equal total parameters, linearly in the context, and its gradients are sparse"
    write_result(f"claims-speed-{scale.name}", claim=claim, config=_config(scale) | {"rounds": arguments.rounds, "threads": arguments.threads}, rows=rows)


def _learning(scale: Scale, arguments: argparse.Namespace) -> None:
    measured = newest_result(f"claims-speed-{scale.name}") if "dollars" in arguments.budgets else None
    if "dollars" in arguments.budgets and measured is None:
        command = f"python benchmarks/claims.py speed --scale {scale.name}"
        raise SystemExit(f"equal dollars need the speeds of the arms: run `{command}` first, or --budgets tokens half flops")
    speeds = training_speeds(measured["rows"]) if measured else {}
    folder = arguments.folder / scale.name
    rows, versions = learning_rows(scale, arguments.budgets, speeds, folder=folder, corpora=arguments.corpora, jobs=arguments.jobs)
    for row in rows:
        print(f"{row['name']:32s} {row['steps']:5d} steps, lr {row['learning_rate']:g}: {row['mean']:.4f} +- {row['interval_95']:.4f} nats")
    claim = "The KAN learns as well as the dense model of equal total parameters from equal tokens, and better with equal FLOPs and equal dollars"
    config = _config(scale) | {"budgets": arguments.budgets, "speeds": speeds, "code_versions": versions}
    write_result(f"claims-learning-{scale.name}", claim=claim, config=config, rows=rows)


def _config(scale: Scale) -> dict[str, object]:
    return {
        "scale": scale.name,
        "sequence_length": scale.sequence_length,
        "sequences_a_step": scale.sequences,
        "steps": scale.steps,
        "tokens": scale.steps * scale.tokens_a_step,
        "learning_rates": scale.learning_rates,
        "seeds": scale.seeds,
    }


if __name__ == "__main__":
    main()
