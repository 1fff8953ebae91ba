"""Verdicts on the paper's claims, each from the figures of a result file by the rule that stands beside it on the page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kan_train.planner.paper import build_table

HOLDS, FAILS, OPEN, UNMEASURED = "holds here", "**does not hold here**", "undecided here", "not measured"
GOAL_THROUGHPUT, GOAL_DECODE = 6.2, 2.86
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
        ("Training costs $230k instead of $2.1M, 9x less", _TABLE + of_the_table["cost"], *_equal_dollars(learning)),
        ("6.2 times the training throughput", _TABLE + of_the_table["throughput"], *_throughput(speed)),
        ("94% sparsity", _TABLE + of_the_table["sparsity"], *_sparsity(learning)),
        ("891 against 312 tokens/s in decoding, 2.86 times", _TABLE + of_the_table["inference"], *_decode_verdict(decode)),
        ("MMLU 83.1 against 82.3", _TABLE + of_the_table["quality"], _mmlu(), OPEN),
        ("Attention in O(n d)", "at the longest context as many tokens/s as at the shortest, within a fifth", *_linear(speed)),
        ("Sparse gradients", "share of groves with a gradient below a tenth at 256 tokens", *_gradients(speed)),
        ("Finer granularity is better", "interval of the difference from the KAN lies below 0", *_difference(learning, "finer")),
        ("Initialisation costs less", "seconds a parameter at most those of the dense model, within a tenth", *_initialisation(speed)),
        ("Edge activations help", "interval of the difference without them lies above 0", *_difference(learning, "no_edges", worse=True)),
        ("Norm routing helps", "interval of the difference without it lies above 0", *_difference(learning, "no_norm_routing", worse=True)),
        ("ADA learns as well as softmax attention", "interval of the difference without it lies above 0", *_difference(learning, "no_ada", worse=True)),
        ("ADA as the paper writes it suffices", "interval of the difference does not lie above 0", *_literal(learning)),
        ("Portability", "the same tests on the same code; figures of each device in a result file", _PORTABILITY, OPEN),
    ]


def _row(result: Row | None, **wanted: Any) -> Row | None:
    return next((row for row in result["rows"] if all(row.get(name) == value for name, value in wanted.items())), None) if result else None


def with_interval(row: Row) -> str:
    """An arm's difference from the KAN with its 95% interval, nats."""
    return f"{row['difference_from_kan']:+.3f} ± {row['difference_interval_95']:.3f}"


def _equal_dollars(learning: Row | None) -> tuple[str, str]:
    rival = _row(learning, arm="dense_total", budget="dollars")
    if rival is None:
        return UNMEASURED, UNMEASURED
    told = f"from equal dollars the dense model of equal total parameters ends {with_interval(rival)} nats from the KAN"
    reach = _dollars_to_reach(learning)
    return f"{told}; {reach}" if reach else told, _sign(rival, worse=True)


def _dollars_to_reach(learning: Row | None) -> str:
    """How much more the dense model pays for the loss that each of the two reaches from equal tokens."""
    kan, dense = _row(learning, arm="kan", budget="tokens"), _row(learning, arm="dense_total", budget="tokens")
    if learning is None or kan is None or dense is None:
        return ""
    target = max(kan["curve"][-1][1], dense["curve"][-1][1])
    own, rival = (seconds_to_reach(learning, arm, target) for arm in ("kan", "dense_total"))
    return f"a loss of {target:.2f} costs the dense model {rival / own:.1f} times as much" if own and rival else ""


def seconds_to_reach(learning: Row, arm: str, target: float) -> float | None:
    """Device-seconds in which an arm comes down to a loss in the cheapest of its budgets, at the speed measured alone; None where it never does."""
    speed = learning["config"].get("speeds", {}).get(arm)
    tokens = [tokens_to_reach(row["curve"], target) for row in learning["rows"] if row["arm"] == arm]
    return min((count / speed for count in tokens if count is not None), default=None) if speed else None


def tokens_to_reach(curve: Iterable[tuple[int, float]], target: float) -> float | None:
    """Tokens at which a curve of (tokens, loss) first comes down to `target`, linear between its points; None where it never does."""
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
    return f"kan_tiny: 93.75% of the groves, {asleep:.1%} of all parameters, {1 - kan['executed_flops_share']:.1%} of the forward FLOPs", "as a share of groves"


def _decode_verdict(decode: Row | None) -> tuple[str, str]:
    rows = [row for row in decode["rows"] if row["kind"] == "decode" and row["batch"] == 1] if decode else []
    if not rows:
        return UNMEASURED, UNMEASURED
    told = ", ".join(f"{row['ratio']:.1f} ({row['name'].removesuffix(' batch 1 context ' + str(row['context']))}, {row['context']:,})" for row in rows)
    reached = [row["ratio"] >= GOAL_DECODE for row in rows]
    return f"batch 1, times the dense twin with a cache: {told}", HOLDS if all(reached) else (OPEN if any(reached) else FAILS)


def _mmlu() -> str:
    return "no model of a size that could answer; `kan evaluate tasks=[mmlu]` runs all 14,042 questions ([evaluation.md](evaluation.md))"


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
    return f"{with_interval(row)} nats from equal tokens", _sign(row, worse=worse)


def _sign(row: Row, *, worse: bool) -> str:
    """Whether the arm is worse (or better) than the KAN beyond its interval."""
    mean, half = row["difference_from_kan"] * (1 if worse else -1), row["difference_interval_95"]
    return HOLDS if mean - half > 0 else (FAILS if mean + half < 0 else OPEN)


def _literal(learning: Row | None) -> tuple[str, str]:
    figures, verdict = _difference(learning, "literal_ada", worse=True)
    return figures, {HOLDS: FAILS, FAILS: HOLDS}.get(verdict, verdict)


def _initialisation(speed: Row | None) -> tuple[str, str]:
    kan, dense = (_row(speed, part="initialisation", arm=arm) for arm in ("kan", "dense_total"))
    if kan is None or dense is None:
        return UNMEASURED, UNMEASURED
    ratio = dense["parameters_a_second"] / kan["parameters_a_second"]
    return f"{ratio:.2f} times the dense model's seconds a parameter ({kan['seconds']:.2f} s, {dense['seconds']:.2f} s)", HOLDS if ratio <= 1.1 else FAILS
