"""Run by test_expert.py in 2 or 4 processes: every case in turn; what each rank saw goes to a file.

    RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python expert_ranks.py FOLDER
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import expert_cases as cases
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kan_train.model.dispatch import dropless_plan, partial_plan
from kan_train.model.init import materialise
from kan_train.model.route import Router, checkpoint_contexts
from kan_train.parallel.expert import Exchange, SortedChoices
from kan_train.parallel.place import Axis


class Traffic(TorchDispatchMode):
    """Names of all collectives, and the bytes that the all-to-alls were given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._schema.name)
            self.bytes += args[1].numel() * args[1].element_size() if "alltoall" in func._schema.name else 0
        return func(*args, **(kwargs or {}))


class Events(TorchDispatchMode):
    """The order in which transfers start, end, and the computation between runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if "alltoall" in func._schema.name:
            self.seen.append("start")
        return func(*args, **(kwargs or {}))


class _Slow(torch.autograd.Function):
    """An identity that takes its time, another on each rank, and says when it runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[str]) -> Tensor:
        ctx.seen = seen
        return _Slow._take_time(x, seen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Slow._take_time(grad, ctx.seen), None

    @staticmethod
    def _take_time(x: Tensor, seen: list[str]) -> Tensor:
        seen.append("between")
        time.sleep(0.01 * (1 + dist.get_rank()))
        return x.clone()


def layer(
    groves: nn.Module, case: cases.Case, axis: Axis, x: Tensor, gate: Tensor, z: Tensor, plan: SortedChoices, between: Callable[[], Any] = lambda: None
) -> tuple[Tensor, Exchange]:
    exchange = Exchange(plan, axis)
    pending = exchange.start(x if case.sends_x else None, gate, z if case.sends_z else None)
    between()
    received = pending.wait()
    own = partial_plan(received.choice_of_row, received.sizes, *received.gate_RJ.shape)
    return exchange.combine(groves(received.x_RD, received.z_RJr, received.gate_RJ, own)), exchange


def own_part(case: cases.Case, axis: Axis) -> dict[str, Tensor]:
    """The inputs of this rank's tokens."""
    sizes = cases.tokens_of(case, axis.size)
    return {name: value.split(sizes)[axis.rank].clone() for name, value in cases.inputs(case, axis.size).items()}


def own_groves(case: cases.Case, axis: Axis) -> nn.Module:
    count = case.groves // axis.size
    return cases.build_groves(case, axis.rank * count, count)


def run(case: cases.Case, axis: Axis) -> dict[str, Any]:
    """A forward and a backward pass: outputs, gradients, and what travelled."""
    mine, groves = own_part(case, axis), own_groves(case, axis)
    leaves = {name: mine[name].requires_grad_() for name in ("x", "gate", "z")}
    with Traffic() as traffic:
        y, exchange = layer(groves, case, axis, *leaves.values(), dropless_plan(mine["index"], case.groves))
        (y * mine["loss"]).sum().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None} | {n: p.grad for n, p in groves.named_parameters()}
    sent = {"rows": exchange.rows_sent, "received": sum(exchange.rows_received), "choices received": sum(exchange.choices_received)}
    return {"y": y.detach(), "gradients": gradients, "sent": sent, "collectives": traffic.names, "bytes": traffic.bytes}


def same_bits(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = [[run["y"], *run["gradients"].values()] for run in (first, second)]
    return first["gradients"].keys() == second["gradients"].keys() and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def overlapped(case: cases.Case, axis: Axis) -> dict[str, Any]:
    """The order of events around a computation placed between start and wait, and the bits beside those of a run that has nothing there."""
    mine, groves, events = own_part(case, axis), own_groves(case, axis), Events()
    leaves = {name: mine[name].requires_grad_() for name in ("x", "gate", "z")}
    own, beside = torch.zeros_like(mine["x"]).requires_grad_(), []
    real = dist.Work.wait
    dist.Work.wait = lambda work, *rest: (events.seen.append("wait"), real(work, *rest))[1]  # type: ignore[method-assign, assignment]
    try:
        with events:
            plan = dropless_plan(mine["index"], case.groves)
            y, _ = layer(groves, case, axis, *leaves.values(), plan, between=lambda: beside.append(_Slow.apply(own, events.seen)))
            events.seen.append("backward")
            ((y + beside[0]) * mine["loss"]).sum().backward()
    finally:
        dist.Work.wait = real  # type: ignore[method-assign]
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None} | {n: p.grad for n, p in groves.named_parameters()}
    return {"events": events.seen, "same": same_bits({"y": y.detach(), "gradients": gradients}, run(case, axis))}


def recomputed(case: cases.Case, axis: Axis) -> dict[str, Any]:
    """A router, the exchange and the groves, with and without activation checkpointing."""
    runs, counted, collectives = [], [], []
    for saves_memory in (False, True):
        mine, groves = own_part(case, axis), own_groves(case, axis)
        router = materialise(Router(cases.model_config(case)), seed=3, dtype=case.dtype).train()
        x = mine["x"].requires_grad_()

        def routed(x: Tensor, router: Router = router, groves: nn.Module = groves) -> Tensor:
            routing = router(x)
            assert routing.projection_TKr is not None
            return layer(groves, case, axis, x, routing.gate_TK, routing.projection_TKr, routing.plan)[0]

        with Traffic() as traffic:
            y = checkpoint(routed, x, use_reentrant=False, context_fn=checkpoint_contexts) if saves_memory else routed(x)
            (y * mine["loss"]).sum().backward()
        named = [*router.named_parameters(), *groves.named_parameters(), ("x", x)]
        runs.append({"y": y.detach(), "gradients": {name: tensor.grad for name, tensor in named if tensor.grad is not None}})
        counted.append(int(router.pending[-1]))
        collectives.append(len(traffic.names))
    return {"same": same_bits(*runs), "gradients": sorted(runs[0]["gradients"]), "tokens": counted, "collectives": collectives}


def main() -> None:
    dist.init_process_group("gloo")
    axis = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    seen: dict[str, Any] = {}
    for case in cases.CASES:
        seen[case.name] = run(case, axis)
        seen[case.name]["again"] = same_bits(seen[case.name], run(case, axis))
    for kind in ("gated", "reuse", "edge"):
        seen[f"overlap {kind}"] = overlapped(cases.Case(kind, "skewed"), axis)
        seen[f"checkpoint {kind}"] = recomputed(cases.Case(kind), axis)
    torch.save(seen, Path(sys.argv[1]) / f"rank-{axis.rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
