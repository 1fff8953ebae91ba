"""What the processes of test_expert.py and the one process that judges them both know: groves, tokens and choices, from a seed.

N groves, K choices a token, E ranks. Imports nothing of kan_train.parallel.expert.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kan_train.config import EdgeConfig, GroveConfig, ModelConfig
from kan_train.model.grove import EdgeGroves, GatedGroves

WIDTH, HIDDEN, RANK, CHOICES = 12, 8, 4, 3


@dataclass(frozen=True)
class Case:
    """Groves of one kind, and how the tokens of all ranks choose among them."""

    kind: str = "gated"
    routing: str = "spread"
    groves: int = 12
    dtype: torch.dtype = torch.float64
    tokens: int = 40
    """Of all ranks."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.routing} N={self.groves} T={self.tokens} {str(self.dtype).removeprefix('torch.')}"

    @property
    def sends_x(self) -> bool:
        return self.kind != "edge"

    @property
    def sends_z(self) -> bool:
        return self.kind in ("reuse", "edge")


ROUTINGS = ("spread", "skewed", "last rank", "idle rank", "no tokens")
KINDS = ("gated", "reuse", "edge", "chebyshev", "silu")
EXACT = [Case(kind, routing) for kind in KINDS for routing in ROUTINGS] + [Case(kind, groves=8) for kind in KINDS]
"""With 8 groves over 4 ranks a token has more choices than any rank has groves."""
ROUNDED = [Case(kind, dtype=dtype) for kind in ("gated", "reuse", "edge") for dtype in (torch.float32, torch.bfloat16, torch.float16)]
LARGE = [Case(kind, groves=24, tokens=400) for kind in ("gated", "edge")]
CASES = [*EXACT, *ROUNDED, *LARGE]


def model_config(case: Case) -> ModelConfig:
    edge = EdgeConfig(kind=case.kind if case.kind in ("chebyshev", "silu") else "bspline", grid=5, group_size=4)
    edge = dataclasses.replace(edge, sharing="per_edge") if case.kind == "edge" else edge
    grove = GroveConfig(
        num_groves=case.groves, active_groves=CHOICES, width=HIDDEN, score_rank=RANK, edge=edge, kind=case.kind if case.sends_z else "gated"
    )
    return ModelConfig(width=WIDTH, num_layers=2, grove=grove)


def tokens_of(case: Case, ranks: int) -> list[int]:
    """Tokens of each rank: unequal, and none on the first where the routing says so."""
    last = case.tokens - (ranks - 1) * (case.tokens // (ranks + 1))
    sizes = [case.tokens // (ranks + 1)] * (ranks - 1) + [last]
    return [0, sizes[0] + sizes[1], *sizes[2:]] if case.routing == "no tokens" else sizes


def inputs(case: Case, ranks: int) -> dict[str, Tensor]:
    """x [T, D], gate [T, K], z [T, K, r], index [T, K], and the weights [T, D] of the outputs in the loss; tokens of all ranks in their order."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scores, own = torch.rand(case.tokens, case.groves, generator=generator), case.groves // ranks
    if case.routing == "skewed":
        scores -= torch.arange(case.groves) / 4
    elif case.routing == "last rank":
        scores[:, -own:] += 2
    elif case.routing == "idle rank":
        scores[:, :own] -= 2
    wide = torch.promote_types(case.dtype, torch.float32)
    return {
        "x": normal(case.tokens, WIDTH).to(case.dtype),
        "gate": torch.rand(case.tokens, CHOICES, generator=generator, dtype=torch.float64).to(wide),
        "z": normal(case.tokens, CHOICES, RANK).to(case.dtype),
        "index": scores.topk(CHOICES).indices,
        "loss": normal(case.tokens, WIDTH).to(case.dtype),
    }


def build_groves(case: Case, first: int = 0, count: int | None = None) -> nn.Module:
    """Groves `first` to `first + count` (default: all) of the case, all their parameters normal, as a module for one process."""
    config = model_config(case)
    count = case.groves if count is None else count
    generator = torch.Generator().manual_seed(11)
    local = dataclasses.replace(config, grove=dataclasses.replace(config.grove, num_groves=count, active_groves=min(CHOICES, count)))
    groves = (EdgeGroves if case.kind == "edge" else GatedGroves)(local).to_empty(device="cpu").to(case.dtype)
    for parameter in groves.parameters():
        whole = torch.randn(case.groves, *parameter.shape[1:], generator=generator, dtype=torch.float64) / 3
        parameter.data.copy_(whole[first : first + count])
    return groves
