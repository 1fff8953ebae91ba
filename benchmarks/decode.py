"""Decoding speed of KAN models against their dense twins of equal total size with a key-value cache, beside the ratio of the bytes that a step must read.

Both models stand in this one process and step in turn, so that the noise of the machine meets both alike. Weights are random, of the shipped sizes; states and
caches are filled with random numbers in the place of a context that was read: a step does the same work whatever they hold, which is measured once here.

    python benchmarks/decode.py                                   # on a machine that does nothing else
    python benchmarks/decode.py --models kan_tiny --contexts 512 16384 --threads 2
    python benchmarks/decode.py --small                           # a try
"""

import argparse
import statistics
import time
from typing import Any

import torch
from common import write_result
from decode_cases import Case, Contestant, product_bandwidth, read_bandwidth

TWINS = {"kan_tiny": "dense_tiny_total", "kan_125m": "dense_125m_total"}
GOAL = 2.86


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TWINS), choices=list(TWINS))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048], help="tokens, for the time to the first one given")
    parser.add_argument("--dial", type=int, nargs="+", default=[1, 2], help="active groves, at the first context")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="rounds that are timed, after one that is not")
    parser.add_argument("--round-seconds", type=float, default=0.3, help="steps of a model in a round take about as long, at least two of them")
    parser.add_argument("--cache-gib", type=float, default=4.0, help="memory for a cache; where it would be larger, the layers share one layer's")
    parser.add_argument("--small", action="store_true", help="kan_tiny, short contexts, three rounds: a try, not written")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.models, arguments.batches, arguments.contexts, arguments.prompts, arguments.rounds = ["kan_tiny"], [1, 4], [64, 512], [128], 3
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        ceilings = {"read_bytes_per_second": read_bandwidth(1 << 29), "product_bytes_per_second": product_bandwidth(1 << 16, 512)}
        print(f"memory: {ceilings['read_bytes_per_second'] / 1e9:.1f} GB/s read, {ceilings['product_bytes_per_second'] / 1e9:.1f} GB/s by a product")
        rows: list[dict[str, Any]] = []
        for name in arguments.models:
            for dtype in arguments.dtypes:
                pair = [Contestant(name, dtype), Contestant(TWINS[name], dtype)]
                rows += _decoding(pair, arguments, ceilings)
                rows += _dial(pair[0], arguments, ceilings)
                rows += [_first_token(pair, length, arguments) for length in arguments.prompts]
                rows.append(_values(pair, arguments))
    print(_table(rows))
    if not arguments.small:
        claim = f"KAN decodes at least {GOAL} times the tokens a second of its dense twin of equal total parameters at batch 1, whatever the context"
        write_result("decode", claim=claim, config=vars(arguments), rows=rows, ceilings_measured=ceilings)


def _decoding(pair: list[Contestant], arguments: argparse.Namespace, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for batch in arguments.batches:
        for context in arguments.contexts:
            kan, twin = cases = [Case(each, batch, context, int(arguments.cache_gib * 2**30)) for each in pair]
            _in_turn(cases, arguments)
            figures = [_figures(case, ceilings) for case in cases]
            row = {"kind": "decode", "name": f"{pair[0].name} {pair[0].dtype} batch {batch} context {context}", "dtype": pair[0].dtype}
            row |= {"batch": batch, "context": context, "threads": arguments.threads, "kan": figures[0], "twin": figures[1]}
            row["ratio"] = _seconds(twin) / _seconds(kan)
            row |= {"bytes_ratio": figures[1]["bytes"] / figures[0]["bytes"], "flops_ratio": figures[1]["flops"] / figures[0]["flops"]}
            row["ratio_over_bytes_ratio"] = row["ratio"] / row["bytes_ratio"]
            rows.append(row)
            speeds = " against ".join(f"{each['tokens_per_second']:,.0f}" for each in figures)
            print(f"{row['name']}: {speeds} tokens/s, {row['ratio']:.2f} times", flush=True)
    return rows


def _in_turn(cases: list[Case], arguments: argparse.Namespace) -> None:
    """Fill the cases' seconds: a round of one, a round of the next, over and over."""
    steps = []
    for case in cases:
        case.run(2)
        steps.append(max(2, min(64, round(arguments.round_seconds / case.seconds[-1]))))
        case.seconds.clear()
    for number in range(arguments.rounds + 1):
        for case, count in zip(cases, steps, strict=True):
            case.run(count)
            if number == 0:
                case.seconds.clear()


def _seconds(case: Case) -> float:
    return statistics.median(case.seconds)


def _figures(case: Case, ceilings: dict[str, float]) -> dict[str, Any]:
    facts, seconds = case.facts(), _seconds(case)
    return {
        "name": case.contestant.name, "tokens_per_second": case.batch / seconds, "step_seconds_quartiles": statistics.quantiles(case.seconds, n=4),
        "steps": len(case.seconds), **facts, "bytes_per_second": facts["bytes"] / seconds, "flops_per_second": facts["flops"] / seconds,
        "roofline_share": facts["bytes"] / ceilings["read_bytes_per_second"] / seconds,
    }  # fmt: skip


def _dial(kan: Contestant, arguments: argparse.Namespace, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """The same weights with fewer or more groves a token."""
    rows = []
    for batch in arguments.batches:
        seconds: dict[int, list[float]] = {active: [] for active in arguments.dial}
        case, figures = Case(kan, batch, arguments.contexts[0], 0), {}
        for number in range(arguments.rounds + 1):
            for active in arguments.dial:
                kan.ready(active)
                case.seconds.clear()
                case.run(16)
                seconds[active] += case.seconds if number else []
        for active in arguments.dial:
            kan.ready(active)
            case.seconds = seconds[active]
            figures[active] = _figures(case, ceilings)
        kan.ready()
        rows.append({"kind": "dial", "name": f"{kan.name} {kan.dtype} batch {batch}", "threads": arguments.threads, "active_groves": figures})
    return rows


def _first_token(pair: list[Contestant], length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    seconds: list[list[float]] = [[], []]
    for number in range(max(3, arguments.rounds // 2) + 1):
        for each, found in zip(pair, seconds, strict=True):
            taken = each.first_token_seconds(length)
            found += [taken] if number else []
    kan, twin = map(statistics.median, seconds)
    row = {"kind": "first token", "name": f"{pair[0].name} {pair[0].dtype} prompt {length}", "prompt": length, "threads": arguments.threads}
    return row | {"kan_seconds": kan, "twin_seconds": twin, "seconds": seconds, "ratio": twin / kan}


def _values(pair: list[Contestant], arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps after a context that was read, against steps after random numbers: the quotient of their times, of each model, batch 1."""
    quotients = {}
    for each in pair:
        context = min(arguments.contexts)
        case, read = Case(each, 1, context, 2**30), Case(each, 1, context, 2**30)
        _, state = each.model.prefill(each.tokens(1, context), each.model.init_state(1))
        for layer, kept in zip(read.state(), state, strict=True):
            if hasattr(layer, "room"):
                layer.keys.copy_(kept.keys)
                layer.values.copy_(kept.values)
        own = read.state
        read.state = lambda own=own, state=state: [  # type: ignore[method-assign]
            layer if hasattr(layer, "room") else type(kept)(*(value.clone() for value in vars(kept).values())) for layer, kept in zip(own(), state, strict=True)
        ]
        _in_turn([case, read], arguments)
        quotients[each.name] = _seconds(read) / _seconds(case)
    return {"kind": "values", "name": f"{pair[0].name} {pair[0].dtype}", "context": context, "seconds_after_a_read_context_over_random_numbers": quotients}


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown, for docs/inference.md."""
    lines = ["", "| model, dtype | batch | context | tokens/s | twin | times | bytes say | MB a step | twin | share of bandwidth | twin |", "|---" * 11 + "|"]
    for row in rows:
        if row["kind"] == "decode":
            kan, twin = row["kan"], row["twin"]
            lines.append(
                f"| {kan['name']}, {row['dtype']} | {row['batch']} | {row['context']} | {kan['tokens_per_second']:,.0f} | {twin['tokens_per_second']:,.0f} "
                f"| {row['ratio']:.2f} | {row['bytes_ratio']:.2f} | {kan['bytes'] / 1e6:,.1f} | {twin['bytes'] / 1e6:,.1f} "
                f"| {kan['roofline_share']:.2f} | {twin['roofline_share']:.2f} |"
            )
    lines += ["", "| model, dtype | prompt | first token after | twin | times |", "|---" * 5 + "|"]
    for row in rows:
        if row["kind"] == "first token":
            times = " | ".join(f"{1e3 * row[f'{each}_seconds']:.0f} ms" for each in ("kan", "twin"))
            lines.append(f"| {row['name'].rsplit(' prompt', 1)[0]} | {row['prompt']} | {times} | {row['ratio']:.2f} |")
    lines += ["", "| model, dtype, batch | active groves | tokens/s | groves read a layer |", "|---" * 4 + "|"]
    for row in rows:
        for active, figures in row["active_groves"].items() if row["kind"] == "dial" else ():
            lines.append(f"| {row['name']} | {active} | {figures['tokens_per_second']:,.0f} | {figures['groves_touched']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
