"""Cases of routing for benchmarks/gpu.py.  T tokens, D width, N groves, K choices a token, r scoring rank, R = T K."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kan_train.kernels import grove_route
from kan_train.kernels.grove_route import reference

_EPS = 1e-6


def cases(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """A training batch, and the decode steps of 1 and 64 tokens, bf16, at D 2048, N 128, K 8."""
    width, groves, rank, choices = (32, 16, 4, 2) if dry else (2048, 128, 16, 8)
    batch = 40 if dry else 32768
    shape = f"N {groves} K {choices} D {width} r {rank}"
    found = []
    for tokens in (1, 24) if dry else (1, 64, batch):
        found.append(_scores(f"scores, T {tokens} {shape} bf16", tokens, width, groves, rank, torch.bfloat16, device))
    if not dry:
        found.append(_scores(f"scores, T {batch} N {groves} D {width} r 64 bf16", batch, width, groves, 64, torch.bfloat16, device))
    for tokens in (1, 24) if dry else (64, batch):
        found.append(_selection(f"selection with balance, T {tokens} N {groves} K {choices} fp32", tokens, groves, choices, device))
        found.append(_order(f"order by grove, T {tokens} N {groves} K {choices}", tokens, groves, choices, device))
        found.append(_route(f"scores to order, T {tokens} {shape} bf16", tokens, width, groves, rank, choices, device))
        found.append(_projection(f"projection of the chosen, T {tokens} {shape} bf16", tokens, width, groves, rank, choices, torch.bfloat16, device))
    return found


def checks(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Odd sizes in three dtypes; both ways of sorting."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tokens, width, groves, rank in ((3, 40, 7, 5),) if dry else ((1, 40, 7, 5), (300, 136, 100, 12), (5000, 256, 128, 8), (2500, 72, 33, 7)):
            name = f"scores, T {tokens} N {groves} D {width} r {rank} {str(dtype).removeprefix('torch.')}"
            found.append(_scores(name, tokens, width, groves, rank, dtype, device))
        found.append(_projection(f"projection, {str(dtype).removeprefix('torch.')}", 33, 40, 7, 5, 3, dtype, device))
    for tokens, groves, choices in ((9, 7, 3),) if dry else ((1, 1, 1), (777, 100, 6), (4096, 1024, 16), (20000, 33, 8)):
        found.append(_selection(f"selection, T {tokens} N {groves} K {choices}", tokens, groves, choices, device))
        found.append(_order(f"order by grove, T {tokens} N {groves} K {choices}", tokens, groves, choices, device))
    return found


def _scores(name: str, tokens: int, width: int, groves: int, rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor, ...]:
        random = _random(seed, device)
        score = random(groves, rank, width).to(dtype)
        return random(tokens, width).to(dtype), score, grove_route.inverse_norms(score), random(groves).mul(0.1).add(1), random(groves).abs().add(0.2)

    def kernel(x: Tensor, score: Tensor, inverse: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        return grove_route.scores_and_sums(x, score, _EPS, inverse_N=inverse, mean_N=mean, std_N=std)

    def wide(x: Tensor, score: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        return reference.grove_scores(x.double(), score.double(), _EPS, *(vector.double() for vector in vectors), sums=True)

    size = torch.empty(0, dtype=dtype).element_size()
    return {
        "name": name,
        "make": make,
        "kernel": kernel,
        "reference": wide,
        "rivals": {
            "product, then squares": _two_steps,
            "the product alone": lambda x, score, *_: x @ score.flatten(0, 1).T,
        },
        "bytes": size * (tokens * width + groves * rank * width) + 4 * tokens * groves,
        "flops": 2 * tokens * groves * rank * width,
        "tokens": tokens,
        # A standardised score near 0 is a difference of larger numbers.
        "tolerance": 2e-4 if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else 2e-3,
    }


def _two_steps(x: Tensor, score: Tensor, inverse: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Without a kernel: z [T, r, N] is written in the dtype of x, and read again."""
    groves, rank, _ = score.shape
    z = (x @ score.transpose(0, 1).flatten(0, 1).T).view(len(x), rank, groves)
    scores = (z.float().square().sum(1) + _EPS).sqrt() * inverse
    return (scores - mean) / std, torch.stack((scores.sum(0), scores.square().sum(0)))


def _selection(name: str, tokens: int, groves: int, choices: int, device: torch.device) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor, Tensor]:
        random = _random(seed, device)
        return random(tokens, groves), random(groves).mul(0.1)

    return {
        "name": name,
        "make": make,
        "kernel": lambda selection, balance: grove_route.select(selection, balance, choices),
        "reference": lambda selection, balance: reference.select(selection, balance, choices),
        "rivals": {"torch.topk": lambda selection, balance: (selection + balance).topk(choices, dim=-1).indices},
        "bytes": 4 * tokens * groves + 8 * tokens * choices,
        "flops": 0,
        "tokens": tokens,
    }


def _order(name: str, tokens: int, groves: int, choices: int, device: torch.device) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor]:
        return (_random(seed, device)(tokens, groves).topk(choices, dim=-1).indices,)

    return {
        "name": name,
        "make": make,
        "kernel": lambda index: tuple(grove_route.sort_by_grove(index, groves)),
        "reference": lambda index: reference.sort_by_grove(index, groves),
        "rivals": {"argsort": lambda index: reference.sort_by_grove(index, groves)},
        "bytes": 4 * 8 * tokens * choices,
        "flops": 0,
        "tokens": tokens,
    }


def _route(name: str, tokens: int, width: int, groves: int, rank: int, choices: int, device: torch.device) -> dict[str, Any]:
    """From x to the order of rows; the intermediate scores are written and read once."""
    scores = _scores(name, tokens, width, groves, rank, torch.bfloat16, device)

    def make(seed: int) -> tuple[Tensor, ...]:
        return *scores["make"](seed), _random(seed + 1, device)(groves).mul(0.1)

    def kernel(x: Tensor, score: Tensor, inverse: Tensor, mean: Tensor, std: Tensor, balance: Tensor) -> tuple[Tensor, ...]:
        selection, _ = grove_route.scores_and_sums(x, score, _EPS, inverse_N=inverse, mean_N=mean, std_N=std)
        return tuple(grove_route.sort_by_grove(grove_route.select(selection, balance, choices), groves))

    def rival(x: Tensor, score: Tensor, inverse: Tensor, mean: Tensor, std: Tensor, balance: Tensor) -> tuple[Tensor, ...]:
        selection, _ = _two_steps(x, score, inverse, mean, std)
        return reference.sort_by_grove((selection + balance).topk(choices, dim=-1).indices, groves)

    # Near-ties fall either way between two roundings of one score: the parts are compared, each on equal inputs.
    added = 2 * 4 * tokens * groves + 5 * 8 * tokens * choices
    return {**scores, "make": make, "kernel": kernel, "reference": None, "rivals": {"torch": rival}, "bytes": scores["bytes"] + added}


def _projection(name: str, tokens: int, width: int, groves: int, rank: int, choices: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    def make(seed: int) -> tuple[Tensor, ...]:
        random = _random(seed, device)
        index = random(tokens, groves).topk(choices, dim=-1).indices
        return random(tokens, width).to(dtype), random(groves, rank + 1, width).to(dtype), *grove_route.sort_by_grove(index, groves)

    def loop(x: Tensor, weight: Tensor, offsets: Tensor, _: Tensor, token_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        """A product a grove, whose sizes the host waits for."""
        rows = zip(weight, token_of_row.split(offsets.diff().tolist()), strict=True)
        return torch.cat([x[tokens] @ matrix.T for matrix, tokens in rows])[row_of_choice]

    size = torch.empty(0, dtype=dtype).element_size()
    return {
        "name": name,
        "make": make,
        "kernel": lambda x, weight, *order: grove_route.project(x, weight, grove_route.GroveOrder(*order)),
        "reference": lambda x, weight, *order: loop(x.double(), weight.double(), *order),
        "rivals": {"a cuBLAS product a grove": loop},
        "bytes": size * (tokens * width + groves * (rank + 1) * width + tokens * choices * (rank + 1)),
        "flops": 2 * tokens * choices * (rank + 1) * width,
        "tokens": tokens,
    }


def _random(seed: int, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)
