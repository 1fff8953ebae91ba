"""Whether kan_1b on kernels is right, at a size that is checked in seconds: against plain torch, and the twin's cache in place against its own step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from whole_models import KAN, SMALL, TINY, TWIN, overlaid, random_caches, random_states, random_tokens, shipped, step_in_place, without_last

from kan_train.config.model import ModelConfig
from kan_train.kernels.backend import runs_triton
from kan_train.model.ada import AdaState
from kan_train.model.cache import KeyValueCache
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel


def checks(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """A small kan_1b on kernels against plain torch, and the twin's cache in place against its own step."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [_loss_check(dtype, device, dry), _step_check(dtype, device, dry), _cache_check(dtype, device, dry)]
    return found


def _loss_check(dtype: torch.dtype, device: torch.device, dry: bool) -> dict[str, Any]:
    """Loss and the gradient of every parameter, with a document that starts within each sequence."""
    config = overlaid(shipped(KAN), TINY if dry else SMALL)
    fused, plain = (_perturbed(config, kernels, dtype, device) for kernels in ("triton" if runs_triton(device) else "torch", "torch"))

    def make(seed: int) -> tuple[Tensor, Tensor]:
        tokens_BT = random_tokens(seed, (2, config.sequence_length + 1), config.vocab_size, device)
        resets_BT = torch.zeros(2, config.sequence_length, dtype=torch.bool, device=device)
        resets_BT[:, 0] = resets_BT[0, config.sequence_length // 3] = resets_BT[1, config.sequence_length // 2] = True
        return tokens_BT, resets_BT

    def of(model: LanguageModel) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        def run(tokens_BT: Tensor, resets_BT: Tensor) -> tuple[Tensor, ...]:
            loss, _ = model.train()(tokens_BT[:, :-1], tokens_BT[:, 1:], resets_BT)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            statistics = model.pending_statistics()
            model.discard_statistics()
            return loss.detach(), statistics, *gradients

        return run

    return _check("loss, routing statistics and gradients", dtype, make, of(fused), of(plain))


def _step_check(dtype: torch.dtype, device: torch.device, dry: bool) -> dict[str, Any]:
    """Logits of three steps, each after the state that the one before it left."""
    config = overlaid(shipped(KAN), TINY if dry else SMALL)
    fused, plain = (_perturbed(config, kernels, dtype, device) for kernels in ("triton" if runs_triton(device) else "torch", "torch"))

    def make(seed: int) -> tuple[Tensor, list[AdaState]]:
        return random_tokens(seed, (3, 5), config.vocab_size, device), random_states(plain, 5, seed)

    def of(model: LanguageModel) -> Callable[[Tensor, list[AdaState]], tuple[Tensor, ...]]:
        @torch.no_grad()
        def run(tokens_3B: Tensor, states: list[AdaState]) -> tuple[Tensor, ...]:
            logits = []
            for tokens_B in tokens_3B:
                logits_BV, states = model.eval().step(tokens_B, states)
                logits.append(logits_BV)
            return tuple(logits)

        return run

    return _check("logits of three decode steps", dtype, make, of(fused), of(plain))


def _cache_check(dtype: torch.dtype, device: torch.device, dry: bool) -> dict[str, Any]:
    config = overlaid(shipped(TWIN), TINY if dry else SMALL)
    twin = _perturbed(config, "auto", dtype, device).eval()

    def make(seed: int) -> tuple[Tensor, list[KeyValueCache]]:
        return random_tokens(seed, (3,), config.vocab_size, device), random_caches(twin, 3, 37, seed)

    @torch.no_grad()
    def copying(tokens_B: Tensor, caches: list[KeyValueCache]) -> Tensor:
        return twin.step(tokens_B, without_last(caches))[0]

    case = _check("the twin's cache in place", dtype, make, lambda tokens_B, caches: step_in_place(twin, tokens_B, caches), copying)
    return case | {"name": case["name"].replace(KAN, TWIN)}


def _check(
    name: str, dtype: torch.dtype, make: Callable[[int], tuple], kernel: Callable[..., Any], reference: Callable[..., Any]
) -> dict[str, Any]:
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    # Both sides round to bf16 at every step, and in other places.
    return {"name": f"{name}, small {KAN} {short}", "make": make, "kernel": kernel, "reference": reference, "tolerance": TOLERANCE[dtype]}


TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 8e-2}


def _perturbed(config: ModelConfig, kernels: str, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Weights moved away from the zeros and ones that some start from. In bf16 the choices of groves are fixed: rounding would decide near-ties."""
    model = materialise(LanguageModel(dataclasses.replace(config, kernels=kernels)), seed=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * (float(weight.std()) or 1.0) * torch.randn(weight.shape, generator=generator)
    for layer, groves in enumerate(model.grove_layers()):
        groves.router.selector = _fixed_choice(layer) if dtype == torch.bfloat16 else None
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)  # the buffers stay in fp32
    return model.to(device)


def _fixed_choice(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
    def choose(scores_TN: Tensor, index_TK: Tensor) -> Tensor:
        random_TN = torch.rand(scores_TN.shape, generator=torch.Generator().manual_seed(layer))
        return random_TN.topk(index_TK.shape[1]).indices.to(index_TK.device)

    return choose
