"""What the two processes and their oracle have in common: models, settings, batches. Nothing here trains."""

import torch
from torch import Tensor

from kan_train.config import (
    AdaConfig,
    AttentionConfig,
    Config,
    DataConfig,
    GroveConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from kan_train.data import Batch

SEQUENCES, LENGTH, VOCABULARY = 8, 48, 256
# Drawn so that the gradients are well conditioned: in other draws rounding alone moves a norm by 1e-5, and float64 by 1e-4.
SEED = 29
RATES = (1e-3, 2e-3, 3e-3, 2e-3, 1e-3)
"""Learning rate of each step."""
BALANCE_RATE = 1e-2
CLIP = 0.5
"""Below every gradient norm met here: clipping is active in every step."""


def model_config(kind: str) -> ModelConfig:
    """kan: ADA and a softmax layer, groves with everything on. dense: softmax and SwiGLU."""
    common = {"width": 64, "vocab_size": VOCABULARY, "sequence_length": LENGTH, "attention": AttentionConfig(num_heads=4, num_kv_heads=2)}
    if kind == "dense":
        return ModelConfig(num_layers=2, ffn="swiglu", ffn_width=96, attention_pattern=1, **common)
    grove = GroveConfig(num_groves=8, active_groves=2, width=32, shared_width=32, auxiliary_loss=0.01)
    return ModelConfig(num_layers=3, attention_pattern=3, ada=AdaConfig(num_heads=2), grove=grove, **common)


def config(kind: str, stage: int | None, *, micro_batch: int = 2, clip: float = CLIP, precision: str = "fp32", **more) -> Config:
    """more: optimizer (name), offload, recompute, layout (further settings of `parallel`), name and root of the run."""
    found = Config(
        model=model_config(kind),
        data=DataConfig(blend={"synthetic": 1.0}),
        train=TrainConfig(
            steps=len(RATES),
            global_batch_size=SEQUENCES,
            micro_batch_size=micro_batch,
            precision=precision,
            activation_checkpointing=more.get("recompute", False),
            validate_every=0,
        ),
        optimizer=OptimizerConfig(kind=more.get("optimizer", "adamw"), clip_norm=clip, learning_rate=1e-3, muon_learning_rate=2e-2),
        parallel=ParallelConfig(zero_stage=stage, offload_optimizer=more.get("offload", False), timeout_minutes=10, **more.get("layout", {})),
        run=RunConfig(seed=SEED, threads=1, device="cpu", name=more.get("name", "case"), root=more.get("root", "runs")),
    )
    found.optimizer.schedule.warmup_steps = 2
    return found


def sequences(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: tokens int64 [8, T+1] and resets bool [8, T]."""
    generator = torch.Generator().manual_seed(1000 * SEED + step)
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator), torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.05


def batches(step: int, rank: int = 0, world_size: int = 1, micro_batch: int = 2) -> list[Batch]:
    """A rank's micro-batches of the global batch of a step."""
    tokens, resets = sequences(step)
    share = SEQUENCES // world_size
    starts = range(rank * share, (rank + 1) * share, micro_batch)
    parts = [slice(start, start + micro_batch) for start in starts]
    return [Batch(tokens[part, :-1].contiguous(), tokens[part, 1:].contiguous(), resets[part].contiguous()) for part in parts]


def heldout(rank: int = 0, world_size: int = 1) -> list[Batch]:
    """Held-out batches: five sequences and a half; the rest, all of the last rank's last batch among it, is padding."""
    tokens, resets = sequences(99)
    targets = tokens[:, 1:].clone()
    targets[5, LENGTH // 2 :] = -1
    targets[6:] = -1
    rows = [Batch(tokens[i : i + 2, :-1].contiguous(), targets[i : i + 2], resets[i : i + 2].contiguous()) for i in range(0, SEQUENCES, 2)]
    return rows[rank::world_size]
