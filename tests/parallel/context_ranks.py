"""Run by test_context.py in four processes: each layer on this rank's chunk of every case; what it gave goes to a file.

    RANK=.. python context_ranks.py FOLDER cases|long
"""

import os
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kan_train.config import AdaConfig, AttentionConfig, ModelConfig
from kan_train.model.ada import Ada
from kan_train.model.attention import SoftmaxAttention
from kan_train.model.init import materialise
from kan_train.parallel.place import Axis, Place, at

RANKS = 4
TIME, WIDTH, BATCH = 32, 16, 2
RESETS = {
    "no resets": None,
    "none of them set": ([], []),
    "first token of a chunk": ([16, 24], [8]),
    "end of a chunk": ([6, 15, 21], [7, 13, 14]),
    "every chunk": ([3, 12, 17, 28], [0, 8, 9, 20, 31]),
}
"""Where documents start, in each of two sequences: chunks of four ranks start at 0, 8, 16, 24, and the convolution reaches back three tokens."""


@dataclass(frozen=True)
class Case:
    """A layer and its input, and over how many ranks the input is split."""

    name: str
    ranks: int
    ada: dict | None = None
    kv_heads: int = 0
    resets: tuple[list[int], ...] | None = None
    time: int = TIME
    width: int = WIDTH
    batch: int = BATCH
    heads: int = 2
    dtype: torch.dtype = torch.float64
    recompute: bool = False

    def layer(self) -> nn.Module:
        """The layer at the current place, every parameter off its initial value, alike on all ranks."""
        config = ModelConfig(width=self.width, num_layers=2, sequence_length=self.time, attention_pattern=int(self.ada is None))
        if self.ada is None:
            config.attention = AttentionConfig(num_heads=4, num_kv_heads=self.kv_heads)
            layer = SoftmaxAttention(config, 0)
        else:
            config.ada = AdaConfig(num_heads=self.heads, **{"chunk": 6, **self.ada})
            layer = Ada(config, 0)
        materialise(layer, seed=1, dtype=self.dtype)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                # In long sequences the slow half-lives of step 0 are what is tested.
                scale = 0.0 if "rate" in name and self.time > 1000 else 0.3
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(self.dtype)
        return layer

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [B, T, D], dL/dy [B, T, D], and resets [B, T] or None, of the whole sequences."""
        generator = torch.Generator().manual_seed(7)
        x, grad = (torch.randn(self.batch, self.time, self.width, generator=generator).to(self.dtype) for _ in range(2))
        if self.resets is None:
            return x, grad, None
        resets = torch.zeros(self.batch, self.time, dtype=torch.bool)
        for row, starts in zip(resets, self.resets, strict=True):
            row[starts] = True
        return x, grad, resets


def cases() -> list[Case]:
    settings = [{"decay": d, "mixture": m, "conv_width": w} for d in ("learned", "data", "none") for m in (0, 2) for w in (4, 1)]
    settings.append({"feature_map": "identity", "decay": "none", "output_norm": False, "output_gate": False})
    found = []
    for ranks in (2, 4):
        for where, resets in RESETS.items():
            for ada in settings:
                label = "literal" if "feature_map" in ada else ", ".join(f"{key} {value}" for key, value in ada.items())
                found.append(Case(f"{ranks} ranks: ada, {label}, {where}", ranks, ada=ada, resets=resets))
            for heads in (4, 2, 1):
                found.append(Case(f"{ranks} ranks: softmax, {heads} key-value heads, {where}", ranks, kv_heads=heads, resets=resets))
    everything = {"decay": "data", "mixture": 2}
    found.append(Case("recomputed", 4, ada=everything, resets=RESETS["end of a chunk"], recompute=True))
    for decay in ("learned", "data", "none"):
        slow = {"decay": decay, "mixture": 2, "half_life_max": 1e5, "chunk": 64}
        found.append(Case(f"fp32, 4096 tokens, {decay}", 4, ada=slow, time=4096, width=32, batch=1, dtype=torch.float32))
    found.append(Case("bf16", 4, ada=everything, time=256, width=32, dtype=torch.bfloat16))
    return found


def long_case(ranks: int, dtype: torch.dtype = torch.float32) -> Case:
    """64k tokens; the second head's half-life at step 0 is 32k."""
    return Case(f"long, {ranks}", ranks, ada={"chunk": 64}, time=65536, width=64, batch=1, dtype=dtype)


class Watch(TorchDispatchMode):
    """Counts collectives by name, and the bytes of all tensors that live at one time and were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives[func.overloadpacket.__name__] += 1
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass
class Outcome:
    """What a rank got: y and dL/dx of its chunk, its part of dL/d(parameter), collectives of either pass, and the peak of live bytes."""

    y: Tensor
    x: Tensor
    parameters: dict[str, Tensor]
    collectives: list[dict[str, int]] = field(default_factory=list)
    peak: int = 0


def run(case: Case, axis: Axis) -> Outcome:
    with at(Place(context=axis)):
        layer = case.layer()
    x, grad, resets = (None if t is None else t.chunk(axis.size, dim=1)[axis.rank].contiguous() for t in case.tensors())
    x.requires_grad_()
    with Watch() as watch:
        y = checkpoint(layer, x, resets, use_reentrant=False) if case.recompute else layer(x, resets)
        forward = dict(watch.collectives)
        watch.collectives.clear()
        y.backward(grad)
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return Outcome(y.detach(), x.grad, grads, [forward, dict(watch.collectives)], watch.peak)


def main(folder: Path, what: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    axes = {2: Axis(2, rank % 2, pairs[rank // 2]), 4: Axis(4, rank, dist.group.WORLD)}
    # Each pair runs every other case of two ranks.
    todo = cases() if what == "cases" else [long_case(2), long_case(4)]
    todo = [case for i, case in enumerate(todo) if case.ranks == RANKS or i % 2 == rank // 2]
    outcomes = {}
    for case in todo:
        outcomes[case.name] = vars(run(case, axes[case.ranks]))
    torch.save(outcomes, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
