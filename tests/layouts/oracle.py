"""One process in plain PyTorch and float64, from the model alone: what every layout must reproduce."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kan_train.config import ModelConfig
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel


@dataclass
class History:
    """What an oracle saw: a list entry a step, and the weights before the first and after the last."""

    losses: list[float] = field(default_factory=list)
    cross_entropies: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    heldout: tuple[float, int] = (0.0, 0)


def adamw(model: nn.Module, weight_decay: float = 0.1, grove_multiple: float = 0.5) -> list[torch.optim.Optimizer]:
    """AdamW with the groups that the parameter table asks for, each with its multiple of the learning rate."""
    groups = []
    for parameter in model.parameters():
        decay, multiple = weight_decay if parameter.spec.decay else 0.0, grove_multiple if parameter.spec.grove else 1.0
        groups.append({"params": [parameter], "weight_decay": decay, "multiple": multiple})
    return [torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)]


def muon(model: nn.Module, weight_decay: float = 0.1, ratio: float = 20.0) -> list[torch.optim.Optimizer]:
    """torch.optim.Muon for the matrices of a dense model (its rate `ratio` times the others') and AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.spec.matrix]
    rest = [{"params": [p], "weight_decay": weight_decay if p.spec.decay else 0.0, "multiple": 1.0} for p in named.values() if not p.spec.matrix]
    first = torch.optim.Muon([{"params": matrices, "multiple": ratio}], lr=1.0, weight_decay=weight_decay, momentum=0.95, nesterov=True)
    return [first, torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.95), eps=1e-8)]


def train(
    model_config: ModelConfig,
    steps: Sequence[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    *,
    seed: int,
    clip: float,
    balance_rate: float,
    dtype: torch.dtype = torch.float64,
    optimizers=adamw,
    heldout: Sequence = (),
    micro_batch: int | None = None,
) -> History:
    """Train on the global batches `steps` (tokens [B, T+1], resets [B, T]), each in one piece (or in pieces of `micro_batch` sequences)."""
    model = materialise(LanguageModel(model_config), seed=seed, dtype=dtype)
    stepped, history = optimizers(model), History(initial={name: p.detach().clone() for name, p in model.named_parameters()})
    for (tokens, resets), rate in zip(steps, rates, strict=True):
        size = micro_batch or len(tokens)
        pieces = [slice(start, start + size) for start in range(0, len(tokens), size)]
        both = torch.zeros(2, dtype=torch.float64)
        for piece in pieces:
            loss, cross_entropy = model(tokens[piece, :-1], tokens[piece, 1:], resets[piece])
            (loss / len(pieces)).backward()
            both += torch.stack((loss.detach(), cross_entropy)).double() / len(pieces)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        for optimizer in stepped:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["multiple"]
            optimizer.step()
            optimizer.zero_grad()
        statistics = model.pending_statistics()
        if statistics.numel():
            model.apply_statistics(statistics, balance_rate)
        history.losses.append(both[0].item())
        history.cross_entropies.append(both[1].item())
        history.norms.append(norm.item())
    history.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    history.buffers = {name: b.clone() for name, b in model.named_buffers() if name in model.state_dict()}
    history.heldout = evaluate(model, heldout)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence) -> tuple[float, int]:
    """Summed cross-entropy in nats, and the number of counted tokens."""
    model.eval()
    nats, tokens = 0.0, 0
    for batch in batches:
        log_probability = model.logits(batch.tokens, batch.resets).double().log_softmax(-1)
        own = log_probability.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
        nats -= own[batch.targets >= 0].sum().item()
        tokens += int((batch.targets >= 0).sum())
    return nats, tokens
