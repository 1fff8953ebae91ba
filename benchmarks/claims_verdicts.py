"""Verdicts on the paper's claims, each from the figures of a result file by the rule that stands beside it on the page."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from claims_arms import SCALES, composed
from claims_learning import BUDGETS

from kan_train.planner.paper import build_table

HOLDS, FAILS, OPEN, UNMEASURED = "holds here", "**does not hold here**", "undecided here", "not measured"
GOAL_COST, GOAL_THROUGHPUT, GOAL_DECODE = 9.0, 6.2, 2.86
"""The paper's ratios."""
Row = dict[str, Any]
_TABLE = "[the 340B table](cost-table.md): "
_PORTABILITY = (
    "everything runs on a CPU, where all tests pass; Triton kernels compile for NVIDIA sm_80, sm_90 and AMD gfx942 and agree with their references in the "
    "interpreter ([kernels.md](kernels.md)), but none was timed on a GPU"
)


def verdict_rows(measured: dict[str, Row | None], results: Path) -> list[tuple[str, str, str, str]]:
    """(claim, judged by, measured here, verdict) of every claim. measured: result files by name; results: the folder that the 340B table reads."""
    speed, learning, decode = measured["claims-speed-tiny"], measured["claims-learning-tiny"], measured["decode"]
    of_the_table = {claim.name: claim.verdict for claim in build_table(results=results).claims}
    return [
        ("Training costs $230k instead of $2.1M, 9x less", f"{_TABLE}{of_the_table['cost']}; here: 9 times the price of one loss", *_cost(learning)),
        ("6.2 times the training throughput", f"{_TABLE}{of_the_table['throughput']}; here: at every context, or at none", *_throughput(speed)),
        ("94% sparsity", _TABLE + of_the_table["sparsity"], *_sparsity(learning)),
        ("891 against 312 tokens/s in decoding, 2.86 times", f"{_TABLE}{of_the_table['inference']}; here: in every case, or in none", *_decode_verdict(decode)),
        ("MMLU 83.1 against 82.3", _TABLE + of_the_table["quality"], _mmlu(), OPEN),
        ("Attention in O(n d)", "at the longest context as many tokens/s as at the shortest, within a fifth", *_linear(speed)),
        ("Sparse gradients", "share of groves with a gradient below a tenth at 256 tokens", *_gradients(speed)),
        ("Finer granularity is better", "interval of the difference from the KAN lies below 0", *_difference(learning, "finer")),
        ("Initialisation costs less", "a tenth fewer seconds a parameter than the dense model; fails with a tenth more", *_initialisation(speed)),
        ("More is learnt for the same dollars", "interval of every rival's difference lies above 0; fails where one lies below", *_more_for_dollars(learning)),
        ("Edge activations help", "interval of the difference without them lies above 0", *_difference(learning, "no_edges", worse=True)),
        ("Norm routing helps", "interval of the difference without it lies above 0", *_difference(learning, "no_norm_routing", worse=True)),
        ("ADA learns as well as softmax attention", "interval of the difference without it lies above 0", *_difference(learning, "no_ada", worse=True)),
        ("ADA as the paper writes it suffices", "interval of the difference lies below 0; fails where it lies above", *_literal(learning)),
        ("Portability", "the same tests on the same code; figures of each device in a result file", _PORTABILITY, OPEN),
    ]


def _row(result: Row | None, **wanted: Any) -> Row | None:
    return next((row for row in result["rows"] if all(row.get(name) == value for name, value in wanted.items())), None) if result else None


def with_interval(row: Row) -> str:
    """An arm's difference from the KAN with its 95% interval, nats."""
    return f"{row['difference_from_kan']:+.3f} ± {row['difference_interval_95']:.3f}"


def _cost(learning: Row | None) -> tuple[str, str]:
    """What the loss that both reach from equal tokens costs the dense model of equal total parameters, times what it costs the KAN."""
    kan, dense = _row(learning, arm="kan", budget="tokens"), _row(learning, arm="dense_total", budget="tokens")
    if learning is None or kan is None or dense is None or not learning["config"].get("speeds"):
        return UNMEASURED, UNMEASURED
    target = max(kan["mean"], dense["mean"])
    own, rival = (seconds_to_reach(learning, arm, target) for arm in ("kan", "dense_total"))
    if own is None or rival is None:
        return f"a loss of {target:.2f} was not reached by both", OPEN
    return f"a loss of {target:.2f} costs the dense model {rival / own:.1f} times as much", HOLDS if rival / own >= GOAL_COST else FAILS


def annealed_ends(learning: Row, arm: str) -> list[tuple[int, float]]:
    """(tokens, loss) at the end of an arm's runs of every length, where each one's learning rate has come down."""
    return sorted({row["tokens"]: row["mean"] for row in learning["rows"] if row["arm"] == arm}.items())


def seconds_to_reach(learning: Row, arm: str, target: float) -> float | None:
    """Device-seconds in which an arm comes down to a loss, between its `annealed_ends`, at the speed it has alone; None where it never does."""
    speed = learning["config"].get("speeds", {}).get(arm)
    tokens = tokens_to_reach(annealed_ends(learning, arm), target)
    return tokens / speed if speed and tokens is not None else None


def tokens_to_reach(curve: Iterable[tuple[int, float]], target: float) -> float | None:
    """Tokens at which a curve of (tokens, loss) first comes down to `target`, linear between its points; None where it never does.

    Where the first point is below already, its tokens: the true ones are fewer.
    """
    before: tuple[int, float] | None = None
    for tokens, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(tokens)
            return before[0] + (tokens - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (tokens, loss)
    return None


def _throughput(speed: Row | None) -> tuple[str, str]:
    rows = [row for row in speed["rows"] if row.get("arm") == "kan" and row.get("part") == "training"] if speed else []
    if not rows:
        return UNMEASURED, UNMEASURED
    told = ", ".join(f"{row['speed_against_dense_total']:.1f} ({row['ideal_against_dense_total']:.1f}) at {row['context']:,}" for row in rows)
    reached = [row["speed_against_dense_total"] >= GOAL_THROUGHPUT for row in rows]
    return f"times the dense model's tokens/s (FLOPs allow), by context: {told}", HOLDS if all(reached) else (OPEN if any(reached) else FAILS)


def _sparsity(learning: Row | None) -> tuple[str, str]:
    kan = _row(learning, arm="kan", budget="tokens")
    if kan is None:
        return UNMEASURED, UNMEASURED
    asleep = 1 - kan["parameters_active"] / kan["parameters_total"]
    grove = composed(SCALES["tiny"], kan["settings"]).model.grove
    groves = 1 - grove.active_groves / grove.num_groves
    told = f"kan_tiny: {groves:.2%} of the groves, {asleep:.1%} of all parameters, {1 - kan['executed_flops_share']:.1%} of the forward FLOPs"
    return told, "as a share of groves"


def _decode_verdict(decode: Row | None) -> tuple[str, str]:
    rows = [row for row in decode["rows"] if row["kind"] == "decode" and row["batch"] == 1] if decode else []
    if not rows:
        return UNMEASURED, UNMEASURED
    told = ", ".join(f"{row['ratio']:.1f} ({row['name'].removesuffix(' batch 1 context ' + str(row['context']))}, {row['context']:,})" for row in rows)
    reached = [row["ratio"] >= GOAL_DECODE for row in rows]
    return f"batch 1, times the dense twin with a cache: {told}", HOLDS if all(reached) else (OPEN if any(reached) else FAILS)


def _mmlu() -> str:
    return "no model of a size that could answer; `kan evaluate tasks=[mmlu]` asks the real questions ([evaluation.md](evaluation.md))"


def _linear(speed: Row | None) -> tuple[str, str]:
    of = {arm: [row for row in speed["rows"] if row.get("arm") == arm and row.get("part") == "training"] if speed else [] for arm in ("kan", "no_ada")}
    if not of["kan"]:
        return UNMEASURED, UNMEASURED
    shares = {arm: rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"] for arm, rows in of.items()}
    contexts = f"{of['kan'][0]['context']:,} to {of['kan'][-1]['context']:,}"
    told = f"from {contexts} tokens the KAN keeps {shares['kan']:.0%} of its speed, with softmax attention {shares['no_ada']:.0%}"
    return told, HOLDS if shares["kan"] >= 0.8 else FAILS


def _gradients(speed: Row | None) -> tuple[str, str]:
    rows = [row for row in speed["rows"] if row["part"] == "gradients"] if speed else []
    if not rows:
        return UNMEASURED, UNMEASURED
    told = ", ".join(f"{row['share']:.0%} of {row['tokens']}" for row in rows)
    return f"groves that a gradient reaches, by tokens of a micro-batch: {told}", HOLDS if rows[-1]["share"] < 0.1 else FAILS


def _difference(learning: Row | None, arm: str, *, worse: bool = False) -> tuple[str, str]:
    row = _row(learning, arm=arm, budget="tokens")
    if row is None:
        return UNMEASURED, UNMEASURED
    return f"{with_interval(row)} nats with {BUDGETS['tokens']}", _sign(row, worse=worse)


def _more_for_dollars(learning: Row | None) -> tuple[str, str]:
    """Against all three rivals: the paper names the dense model of equal total parameters alone, which is the easiest to beat."""
    rivals = [row for row in learning["rows"] if row["budget"] == "dollars" and row["arm"] != "kan"] if learning else []
    if not rivals:
        return UNMEASURED, UNMEASURED
    told = ", ".join(f"{with_interval(row)} ({row['arm']})" for row in rivals)
    signs = {_sign(row, worse=True) for row in rivals}
    return f"nats with {BUDGETS['dollars']}: {told}", FAILS if FAILS in signs else (OPEN if OPEN in signs else HOLDS)


def _sign(row: Row, *, worse: bool) -> str:
    """Whether the arm is worse (or better) than the KAN beyond its interval; one that diverged has an infinite loss and is worse."""
    mean, half = row["difference_from_kan"] * (1 if worse else -1), row["difference_interval_95"]
    if math.isinf(mean):
        return HOLDS if mean > 0 else FAILS
    return HOLDS if mean - half > 0 else (FAILS if mean + half < 0 else OPEN)


def _literal(learning: Row | None) -> tuple[str, str]:
    figures, verdict = _difference(learning, "literal_ada", worse=True)
    return figures, {HOLDS: FAILS, FAILS: HOLDS}.get(verdict, verdict)


def _initialisation(speed: Row | None) -> tuple[str, str]:
    kan, dense = (_row(speed, part="initialisation", arm=arm) for arm in ("kan", "dense_total"))
    if kan is None or dense is None:
        return UNMEASURED, UNMEASURED
    ratio = dense["parameters_a_second"] / kan["parameters_a_second"]
    told = f"{ratio:.2f} times the dense model's seconds a parameter ({kan['seconds']:.2f} s, {dense['seconds']:.2f} s)"
    return told, HOLDS if ratio <= 0.9 else (FAILS if ratio > 1.1 else OPEN)
