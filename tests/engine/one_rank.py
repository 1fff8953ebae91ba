"""Run by test_one_rank.py: the plain engine, then DeepSpeed's on one rank for every stage and with offloading; one JSON line with what each saw."""

import json
import sys

import torch

from kan_train.config import AttentionConfig, Config, GroveConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from kan_train.data import Batch
from kan_train.engine import build_engine
from kan_train.parallel.runtime import runtime, single_process_runtime

CASES = {
    "plain": (None, False, "fp32"), "0": (0, False, "fp32"), "1": (1, False, "fp32"), "2": (2, False, "fp32"), "3": (3, False, "fp32"),
    "offload": (2, True, "fp32"), "bf16": (None, False, "bf16"),
}  # fmt: skip


def config_for(stage: int | None, offload: bool, precision: str) -> Config:
    model = ModelConfig(
        num_layers=2, width=32, vocab_size=512, sequence_length=24, attention_pattern=2, attention=AttentionConfig(num_heads=2, num_kv_heads=1),
        grove=GroveConfig(num_groves=8, active_groves=2, width=16),
    )  # fmt: skip
    made = Config(
        model=model,
        train=TrainConfig(global_batch_size=4, micro_batch_size=2, precision=precision),
        parallel=ParallelConfig(zero_stage=stage, offload_optimizer=offload),
        run=RunConfig(threads=1, device="cpu"),
    )
    made.optimizer.clip_norm = 0.5
    return made


def batches(step: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 512, (4, 25), generator=generator)
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None) for part in tokens.split(2)]


def trained(config: Config, process) -> dict:
    engine = build_engine(config, process, seed=4)
    results = [engine.train_step(batches(step), 2e-3, 1e-2) for step in range(4)]
    fragments = list(engine.named_fragments())
    seen = {
        "engine": type(engine).__name__,
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "heldout": engine.evaluate(batches(9)),
        "written": sorted({f.name for f in fragments if f.write}),
        "elements": sum(f.flat.numel() for f in fragments),
    }
    engine.close()
    return seen


if __name__ == "__main__":
    seen = {"plain": trained(config_for(*CASES["plain"]), single_process_runtime(config_for(*CASES["plain"])))}
    with runtime(config_for(*CASES["1"]), environment={}) as process:
        for name, case in CASES.items():
            if name != "plain":
                seen[name] = trained(config_for(*case), process)
    json.dump(seen, sys.stdout)
