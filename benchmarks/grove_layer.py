"""Speed of a KalmaGrove layer, forward and backward, against dense SwiGLU layers, beside the ratio of their FLOPs.

The `total` twin has the hidden width N * M (equal parameters), the `active` twin K * M (equal parameters a token). The layers take turns on the same input,
so that the noise of the machine meets all alike; a layer's time is the median over the rounds.

    python benchmarks/grove_layer.py                                  # the layer of kan_tiny, 1 and 2 threads
    python benchmarks/grove_layer.py --kinds gated reuse --groves 64 --active 4 --width 64
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import write_result
from torch import Tensor, nn

from kan_train.config import EdgeConfig, GroveConfig, ModelConfig
from kan_train.model.ffn import SwiGLU
from kan_train.model.grove import KalmaGrove
from kan_train.model.init import materialise

_BACKWARD = 3  # forward and backward cost three forwards: each product has two gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["gated"], choices=["gated", "silu", "reuse", "edge"], help="silu: gated with plain silu")
    parser.add_argument("--model-width", type=int, default=128, help="D")
    parser.add_argument("--groves", type=int, default=32, help="N")
    parser.add_argument("--active", type=int, default=2, help="K")
    parser.add_argument("--width", type=int, default=192, help="M")
    parser.add_argument("--rank", type=int, default=8, help="r")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for tokens in arguments.tokens:
            rows += _compare(arguments, tokens, threads)
    write_result("grove-layer", claim="A KalmaGrove layer reaches 0.6 of the speed-up that its FLOPs allow", config=vars(arguments), rows=rows)


def _compare(arguments: argparse.Namespace, tokens: int, threads: int) -> list[dict]:
    layers = {kind: materialise(KalmaGrove(_config(arguments, kind), 0), seed=0) for kind in arguments.kinds}
    for name, groves in (("total", arguments.groves), ("active", arguments.active)):
        config = ModelConfig(width=arguments.model_width, ffn="swiglu", ffn_width=groves * arguments.width)
        layers[name] = materialise(SwiGLU(config, 0), seed=0)
    x = torch.randn(tokens // 512, 512, arguments.model_width)
    seconds = _take_turns({name: _step(layer, x) for name, layer in layers.items()}, arguments.rounds)
    flops = {name: tokens * _flops_per_token(arguments, name) for name in layers}
    rows = []
    for kind in arguments.kinds:
        for twin in ("total", "active"):
            achieved, ideal = seconds[twin] / seconds[kind], flops[twin] / flops[kind]
            print(
                f"{threads} threads, {tokens} tokens: {kind} {1e3 * seconds[kind]:.2f} ms, {twin} twin {1e3 * seconds[twin]:.2f} ms: "
                f"achieved {achieved:.2f}, ideal {ideal:.2f}, achieved/ideal {achieved / ideal:.2f}"
            )
            rows.append(
                {
                    "name": f"{kind} against {twin} twin, {tokens} tokens, {threads} threads",
                    "median_ms": 1e3 * seconds[kind],
                    "twin_median_ms": 1e3 * seconds[twin],
                    "gflops": flops[kind] / seconds[kind] / 1e9,
                    "twin_gflops": flops[twin] / seconds[twin] / 1e9,
                    "achieved_ratio": achieved,
                    "ideal_flop_ratio": ideal,
                    "achieved_over_ideal": achieved / ideal,
                }
            )
    return rows


def _config(arguments: argparse.Namespace, kind: str) -> ModelConfig:
    edge = EdgeConfig(kind="silu" if kind == "silu" else "bspline", sharing="per_edge" if kind == "edge" else "grouped")
    grove = GroveConfig(
        num_groves=arguments.groves,
        active_groves=arguments.active,
        width=arguments.width,
        score_rank=arguments.rank,
        kind="gated" if kind == "silu" else kind,
        edge=edge,
    )
    config = ModelConfig(width=arguments.model_width, grove=grove)
    config.validate()
    return config


def _flops_per_token(arguments: argparse.Namespace, name: str) -> int:
    """Multiply-adds count two; elementwise work and the choice itself are not counted, as everywhere."""
    width, hidden, rank = arguments.model_width, arguments.width, arguments.rank
    routing = 2 * arguments.groves * width * (rank + 1)
    a_grove = {
        "gated": 6 * width * hidden,
        "silu": 6 * width * hidden,
        "reuse": 2 * rank * hidden + 4 * width * hidden,
        "edge": 2 * rank * 9 * hidden + 2 * width * hidden,
    }
    forward = {"total": 6 * width * hidden * arguments.groves, "active": 6 * width * hidden * arguments.active}
    return _BACKWARD * (forward[name] if name in forward else routing + arguments.active * a_grove[name])


def _step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    gradient = torch.randn_like(x)

    def run() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(gradient)

    return run


def _take_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
