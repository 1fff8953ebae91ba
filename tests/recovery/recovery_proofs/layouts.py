"""The layouts that save and go on, the pairs of them, and what they all train: four steps, the checkpoint after the second."""

from dataclasses import dataclass
from pathlib import Path

import torch
from layout_matrix.rows import CP, EP, LENGTH, NO_SP, PP, SEQUENCES, SIZES, TP, Row
from torch import Tensor

from kan_train.config import Config, DataConfig
from kan_train.data import Loader, TrainingData, open_training_data
from recovery_proofs.corpus import NAME, VOCABULARY

SAVED, STEPS = 2, 4
"""Steps before the checkpoint that another layout goes on with, and in all."""

VPP, ETP = {"virtual_pipeline": 2}, {"expert_tensor_parallel": 2}

LAYOUTS: dict[str, Row] = {
    "plain": Row(world=1, zero=None, micro_batch=4),
    "dp2-zero0": Row(world=2, zero=0),
    "dp2-zero3": Row(world=2, zero=3),
    "cp2-zero0": Row(world=2, zero=0, layout=CP, micro_batch=2),
    "pp2-vpp2": Row(world=2, zero=1, layout=PP | VPP),
    "tp2-etp2-nosp": Row(world=2, zero=1, layout=TP | ETP | NO_SP, micro_batch=2),
    "tp2-ep2-dp2-zero1": Row(world=4, zero=1, layout=TP | EP),
    "tp2-etp2-dp2-zero2": Row(world=4, zero=2, layout=TP | ETP),
    "cp2-dp2-zero3": Row(world=4, zero=3, layout=CP),
    "ep2-dp4-zero2": Row(world=4, zero=2, layout=EP, micro_batch=2),
    "ep4-zero3": Row(world=4, zero=3, layout={"expert_parallel": 4}, micro_batch=2),
    "pp2-dp2-zero1": Row(world=4, zero=1, layout=PP),
    "pp2-vpp2-dp2-zero2": Row(world=4, zero=2, layout=PP | VPP),
    "dense-plain": Row(world=1, zero=None, kind="dense", micro_batch=4),
    "dense-dp2-zero3": Row(world=2, zero=3, kind="dense"),
    "dense-cp2-zero2": Row(world=2, zero=2, layout=CP, kind="dense", micro_batch=2),
    "dense-tp2-pp2-zero1": Row(world=4, zero=1, layout=TP | PP, kind="dense"),
}
"""Everything but the data goes its own way: ranks, ZeRO stages, micro-batches."""


@dataclass(frozen=True)
class Pair:
    """A layout that trains and saves, and one that goes on."""

    saving: str
    """Key of LAYOUTS."""
    loading: str
    """Key of LAYOUTS."""

    def __str__(self) -> str:
        return f"{self.saving} to {self.loading}"

    @property
    def alike(self) -> bool:
        """Whether both are the same layout: it must go on bit for bit."""
        return self.saving == self.loading


PAIRS: list[Pair] = [
    Pair(saving, loading)
    for saving, several in {
        "plain": ("plain", "tp2-ep2-dp2-zero1", "dp2-zero3"),
        "ep4-zero3": ("ep4-zero3", "pp2-vpp2-dp2-zero2", "tp2-etp2-nosp", "plain"),
        "tp2-etp2-dp2-zero2": ("cp2-dp2-zero3", "pp2-vpp2"),
        "pp2-vpp2-dp2-zero2": ("pp2-vpp2-dp2-zero2", "ep2-dp4-zero2", "tp2-etp2-dp2-zero2"),
        "tp2-etp2-nosp": ("dp2-zero0",),
        "cp2-zero0": ("cp2-zero0", "tp2-etp2-nosp"),
        "dense-tp2-pp2-zero1": ("dense-tp2-pp2-zero1", "dense-cp2-zero2"),
        "dense-dp2-zero3": ("dense-plain",),
    }.items()
    for loading in several
]
"""Those that the tests run; every dimension, stage and number of processes is on both sides."""


def features(row: Row) -> set[str]:
    """What a layout has that another may not: its processes, ZeRO stage, and each size above 1."""
    sizes = {short for short, key in SIZES.items() if row.size(key) > 1}
    split = {f"sequence parallel {row.sequence_parallel}"} if row.size("tensor_parallel") > 1 else set()
    return {f"world {row.world}", f"zero {row.zero}"} | sizes | split


def configuration(row: Row, corpora: Path) -> Config:
    """The settings of a layout on the corpus in `corpora`, checked."""
    config = row.config()
    config.model.vocab_size = VOCABULARY
    config.data = DataConfig(root=str(corpora), blend={NAME: 1.0}, prefetch=2)
    config.validate(row.world)
    return config


def open_data(config: Config) -> TrainingData:
    """The corpus as `kan train` opens it."""
    return open_training_data(config.data, sequence_length=LENGTH, seed=config.run.seed, vocab_size=config.model.vocab_size)


def read_all(loader: Loader) -> list[tuple[Tensor, Tensor]]:
    """(tokens int64 [8, T+1], resets bool [8, T]) of every step, as one process reads them that is never stopped."""
    steps = []
    for _ in range(STEPS):
        batches = loader.next_step()
        tokens = torch.cat([torch.cat((batch.tokens, batch.targets[:, -1:]), dim=1) for batch in batches])
        resets = torch.cat([batch.resets for batch in batches if batch.resets is not None])
        assert tokens.shape == (SEQUENCES, LENGTH + 1)
        assert resets.shape == (SEQUENCES, LENGTH)
        steps.append((tokens, resets))
    loader.close()
    return steps
