"""docs/claims.md: every claim of the paper, what was measured, and a verdict that follows from the figures by the rule that stands beside it.

Figures come from the newest files in benchmarks/results, the verdicts on the 340B table from `kan cost table`; what no file holds reads "not measured".
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from claims_learning import BUDGETS
from claims_verdicts import UNMEASURED, annealed_ends, seconds_to_reach, verdict_rows, with_interval
from common import RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "claims.md"
SCALES = ("tiny", "125m", "1b")
Row = dict[str, Any]


def newest_result(name: str, results: Path = RESULTS) -> Row | None:
    """The newest benchmarks/results/<date>-<device>-<name>.json with its `file` name; None where there is none."""
    found = sorted(results.glob(f"????-??-??-*-{name}.json"))
    return json.loads(found[-1].read_text()) | {"file": found[-1].name} if found else None


def write_page() -> Path:
    """Write docs/claims.md and return its path."""
    PAGE.write_text(page())
    return PAGE


def page(results: Path = RESULTS) -> str:
    """The whole page, in Markdown."""
    measured = {name: newest_result(name, results) for name in ("decode", *(f"claims-{part}-{scale}" for part in ("speed", "learning") for scale in SCALES))}
    lines = [_INTRODUCTION, *_table(("claim", "judged by", "measured here", "verdict"), verdict_rows(measured, results))]
    for scale in SCALES:
        lines += [*_training(scale, measured[f"claims-speed-{scale}"]), *_learning(scale, measured[f"claims-learning-{scale}"])]
    return "\n".join([*lines, *_decoding(measured["decode"]), *_small_parts(measured["claims-speed-tiny"]), _METHOD])


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def _source(result: Row) -> str:
    device = result["device"].get("gpu") or f"{result['device']['cpu']}, {result['device']['cores']} cores"
    return f"`{result['command']}`, {result['date'][:10]}, {device}, commit {result['commit']} ([result](../benchmarks/results/{result['file']}))"


def _training(scale: str, result: Row | None) -> list[str]:
    if result is None:
        return _unmeasured(f"Training speed, kan_{scale}", f"python benchmarks/claims.py speed --scale {scale}")
    rows = [row for row in result["rows"] if row["part"] == "training"]
    contexts = sorted({row["context"] for row in rows})

    def cells(arm: str) -> Iterable[str]:
        own = {row["context"]: row for row in rows if row["arm"] == arm}
        return (f"{own[each]['tokens_per_second']:,.0f}, {own[each]['speed_against_dense_total']:.2f}x, {own[each]['mfu_causal']:.0%}" for each in contexts)

    arms = dict.fromkeys(row["arm"] for row in rows)
    told = "Tokens a second, times those of `dense_total`, and MFU, at each context."
    table = _table(("arm", *(f"{context:,}" for context in contexts)), ((f"`{arm}`", *cells(arm)) for arm in arms))
    return [f"## Training speed, kan_{scale}", "", f"{told}  \n{_source(result)}", "", *table]


def _learning(scale: str, result: Row | None) -> list[str]:
    if result is None:
        return _unmeasured(f"Learning, kan_{scale}", f"python benchmarks/claims.py learning --scale {scale}")
    config = result["config"]
    told = (
        f"{config['tokens']:,} tokens of the KAN, sequences of {config['sequence_length']}, {len(config['learning_rates'])} learning rates and "
        f"{len(config['seeds'])} seeds for every arm. Held-out loss in nats a token at the best rate, 95% intervals; the difference from the KAN is taken "
        "seed by seed."
    )
    head = ("with", "arm", "parameters, active", "steps", "MFLOPs a token", "learning rate", "loss", "from the KAN", "load CV")
    return [f"## Learning, kan_{scale}", "", f"{told}  \n{_source(result)}", "", *_table(head, map(_learned, result["rows"])), *_prices(result)]


def _prices(result: Row) -> list[str]:
    """What a loss costs the arms that had equal dollars, in device-seconds: dollars at one price of the device."""
    arms = [row["arm"] for row in result["rows"] if row["budget"] == "dollars"]
    kan = annealed_ends(result, "kan")
    if not arms:
        return []
    targets = sorted({loss for _, loss in kan} | {loss for arm in arms for tokens, loss in annealed_ends(result, arm) if tokens == kan[-1][0]}, reverse=True)
    told = (
        "What a loss costs, in seconds of the device, and how many times the KAN's: dollars are in the same ratio on devices of one price. Read off\n"
        "straight lines between the ends of an arm's runs; ≤ where its shortest run is already below."
    )
    return [told, "", *_table(("arm", *(f"{target:.3f} nats" for target in targets)), ([f"`{arm}`", *_priced(result, arm, targets)] for arm in arms))]


def _priced(result: Row, arm: str, targets: Sequence[float]) -> Iterable[str]:
    shortest = annealed_ends(result, arm)[0][1]
    for target in targets:
        own, kan = (seconds_to_reach(result, name, target) for name in (arm, "kan"))
        ratio = "" if own is None or kan is None else f", {own / kan:.2f}x"
        yield "not reached" if own is None else f"{'≤ ' if shortest < target else ''}{own:.1f}{ratio}"


def _learned(row: Row) -> Sequence[str]:
    rate = f"{row['learning_rate']:g}{' (edge of the sweep)' if row['rate_at_the_edge'] else ''}"
    return (
        BUDGETS[row["budget"]],
        f"{row['title']} (`{row['arm']}`)",
        f"{row['parameters_total'] / 1e6:.1f}M, {row['parameters_active'] / 1e6:.1f}M",
        str(row["steps"]),
        f"{row['training_flops_per_token'] / 1e6:.1f}",
        rate,
        f"{row['mean']:.3f} ± {row['interval_95']:.3f}",
        "" if row["arm"] == "kan" else with_interval(row),
        "" if row["load_cv"] is None else f"{row['load_cv']:.2f}",
    )


def _decoding(result: Row | None) -> list[str]:
    if result is None:
        return _unmeasured("Decoding", "python benchmarks/decode.py")
    told = "Against the dense twin of equal total parameters with a key-value cache; beside it what the bytes that a step reads would allow."
    rows = (
        (
            f"{row['kan']['name']}, {row['dtype']}", row["batch"], f"{row['context']:,}", f"{row['kan']['tokens_per_second']:,.1f}",
            f"{row['twin']['tokens_per_second']:,.1f}", f"{row['ratio']:.2f}", f"{row['bytes_ratio']:.2f}",
        )
        for row in result["rows"]
        if row["kind"] == "decode"
    )  # fmt: skip
    return ["## Decoding", "", f"{told}  \n{_source(result)}", "", *_table(("model", "batch", "context", "tokens/s", "twin", "times", "bytes allow"), rows)]


def _small_parts(speed: Row | None) -> list[str]:
    if speed is None:
        return []
    reached = [row for row in speed["rows"] if row["part"] == "gradients"]
    made = [row for row in speed["rows"] if row["part"] == "initialisation"]
    rows = ((row["tokens"], f"{row['share']:.1%}", f"{row['share_if_uniform']:.1%}") for row in reached)
    weights = ((f"`{row['arm']}`", f"{row['seconds']:.3f}", f"{row['parameters_a_second'] / 1e6:.0f}M") for row in made)
    return [
        "## Gradients and initial weights, kan_tiny", "", *_table(("tokens of a micro-batch", "groves with a gradient", "if routing were uniform"), rows),
        *_table(("arm", "seconds to make its weights", "parameters a second"), weights),
    ]  # fmt: skip


def _unmeasured(title: str, command: str) -> list[str]:
    return [f"## {title}", "", f"{UNMEASURED.capitalize()}: `{command}`.", ""]


_INTRODUCTION = """\
# The paper's claims, put to the test

<!-- Made by `python benchmarks/claims.py page` from benchmarks/results; a change by hand would be overwritten, and a test compares. -->

What a CPU with two cores can say in an hour about claims on a model of 340 billion parameters: whether the mechanism works, not whether the numbers hold. A
verdict here is about kan_tiny (of decoding also kan_125m) and the budgets in the tables below. "holds here" and "does not hold here" mean that the rule
beside the claim decided; "undecided here" that the interval spans both sides, that cases differ, or that no such test was possible.
"""

_METHOD = """\
## How

- **Arms** (`benchmarks/claims_arms.py`) share layers, width, heads, vocabulary, data and order of data. Sweep and seeds are the same for every arm, and every
  loss of every rate and seed is in the result file. They were fixed before the first run, but for the highest rate at kan_tiny: four arms, the KAN among
  them, were best at the edge of a first sweep up to 0.012, so 0.024 was added for all and everything run anew. An arm is judged at its best rate on the same
  held-out documents that the table shows, alike for all.
- **Equal tokens**: as many steps as the KAN; **half the tokens**: half as many. **Equal FLOPs**: as many as the KAN's training FLOPs buy. **Equal dollars**: as
  many as the KAN's time buys, by the speeds measured with these batches and documents, on one device at one price. Every budget has runs of its own length, so
  that every learning rate comes down by the end.
- **Speed**: all arms of a context step in turns in one process, as many tokens a step at every context, in micro-batches alike as far as one sequence allows;
  documents are not kept apart there. MFU counts of softmax attention what a causal mask leaves; on a CPU the peak is what a large matrix product reached in
  the same process.
- Budgets of a hundred thousand tokens rank arms by how fast they begin to learn. Rankings at such lengths can mislead ([experiments.md](experiments.md));
  `--scale 125m` and `--scale 1b` are the same study for a GPU.
"""
