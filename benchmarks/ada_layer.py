"""One ADA layer on a CPU: a training step against its matrix products alone, memory kept for the backward pass, and decode.

The floor is what the same products take when nothing else is done, measured in the same rounds at the shapes that the layer uses: five
projections, forward and backward, and the products of the scan. A softmax attention layer of the same width runs beside it.

    python benchmarks/ada_layer.py                         # the shapes of kan_tiny
    python benchmarks/ada_layer.py --batch 2 16 --length 2048
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import write_result
from torch import Tensor, nn

from kan_train.config import AdaConfig, AttentionConfig, ModelConfig
from kan_train.model.ada import Ada
from kan_train.model.attention import SoftmaxAttention
from kan_train.model.init import materialise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--chunk", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 1024, 4096], help="tokens read before a decode step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [_training(arguments, batch, chunk) for batch in arguments.batch for chunk in arguments.chunk]
    rows += [_decode(arguments, context) for context in arguments.contexts]
    claim = "goal: matrix products are half of an ADA layer's training step or more; its decode step does not depend on the context"
    write_result("ada-layer", claim=claim, config=vars(arguments), rows=rows)


def _model(arguments: argparse.Namespace, chunk: int = 64) -> ModelConfig:
    return ModelConfig(
        width=arguments.width,
        sequence_length=arguments.length,
        ada=AdaConfig(num_heads=arguments.heads, chunk=chunk),
        attention=AttentionConfig(num_heads=arguments.heads, num_kv_heads=arguments.heads),
    )


def _training(arguments: argparse.Namespace, batch: int, chunk: int) -> dict:
    config, length = _model(arguments, chunk), arguments.length
    x = torch.randn(batch, length, arguments.width, requires_grad=True)
    grad = torch.randn(batch, length, arguments.width)
    resets = torch.zeros(batch, length, dtype=torch.bool)
    resets[:, :: max(1, length // 3)] = True
    ada, softmax = (materialise(kind(config, 0), seed=0) for kind in (Ada, SoftmaxAttention))

    def step(layer: nn.Module, marks: Tensor | None = None) -> None:
        layer.zero_grad()
        layer(x, marks).backward(grad)
        x.grad = None

    cases: dict[str, Callable[[], None]] = {
        "ada": lambda: step(ada),
        "ada_packed": lambda: step(ada, resets),
        "products_alone": _products(batch * length, config),
        "softmax": lambda: step(softmax),
        "softmax_packed": lambda: step(softmax, resets),
    }
    seconds = _interleaved(cases, arguments.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    share = median["products_alone"] / median["ada"]
    kept = _kept_bytes(ada, x) / (batch * length * arguments.width * 4)
    listed = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in median.items())
    print(f"batch {batch} x {length}, chunk {chunk}: {listed}; products are {share:.0%} of the layer, which keeps {kept:.1f} x its input")
    return {
        "name": f"training step of one layer, batch {batch}, chunk {chunk}",
        "batch": batch,
        "chunk": chunk,
        "median_ms": {name: value * 1e3 for name, value in median.items()},
        "fastest_ms": {name: min(values) * 1e3 for name, values in seconds.items()},
        "products_share_of_layer": share,
        "products_share_of_layer_fastest": min(seconds["products_alone"]) / min(seconds["ada"]),
        "kept_for_backward_in_inputs": kept,
    }


def _products(tokens: int, config: ModelConfig) -> Callable[[], None]:
    """The layer's matrix products and nothing else."""
    width, head, chunk = config.width, config.head_width, min(config.ada.chunk, config.sequence_length)
    blocks = tokens // chunk * config.ada.num_heads
    x, w = torch.randn(tokens, width), torch.randn(width, width)
    rows, scores, state = torch.randn(blocks, chunk, head), torch.randn(blocks, chunk, chunk), torch.randn(blocks, head, head)

    def run() -> None:
        for _ in range(5):  # q, k, v, gate, out: forward, and the two products of the backward pass
            torch.mm(x, w.T)
            torch.mm(x, w)
            torch.mm(x.T, x)
        for _ in range(3):  # scores forward, again in the backward pass, and their gradient
            torch.bmm(rows, rows.mT)
        for left in (scores, scores.mT, scores, scores.mT):  # outputs; gradients of v, q, k
            torch.bmm(left, rows)
        for _ in range(3):  # states, again, and their gradient
            torch.bmm(rows.mT, rows)
        for _ in range(4):  # reads of the state, and the gradients of q, k, v through it
            torch.bmm(rows, state)

    return run


def _decode(arguments: argparse.Namespace, context: int) -> dict:
    config = _model(arguments)
    x = torch.randn(1, context, arguments.width)
    cases: dict[str, Callable[[], None]] = {}
    with torch.no_grad():
        for name, kind in (("ada", Ada), ("softmax", SoftmaxAttention)):
            layer = materialise(kind(config, 0), seed=0)
            _, state = layer.prefill(x, layer.init_state(1, "cpu", torch.float32))
            cases[name] = lambda layer=layer, state=state: layer.step(x[:, 0], state)  # type: ignore[misc]
        seconds = _interleaved(cases, 20 * arguments.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"decode step after {context} tokens: ADA {median['ada'] * 1e6:.0f} us, softmax attention {median['softmax'] * 1e6:.0f} us")
    microseconds = {name: value * 1e6 for name, value in median.items()}
    return {"name": f"decode step after {context} tokens", "context": context, "median_us": microseconds}


def _interleaved(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in every round: what else runs on the machine disturbs all alike."""
    # With one thread CPU time is the time that a quiet machine would take; with more it would add the threads up.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 2):
        for name, run in cases.items():
            start = clock()
            run()
            if number >= 2:
                seconds[name].append(clock() - start)
    return seconds


def _kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of distinct tensors that the forward pass keeps for the backward pass, parameters and input left out."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()} | {x.untyped_storage().data_ptr()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(kept.values())


if __name__ == "__main__":
    main()
