"""The rows of the matrix, the models they train, and the batches they see."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kan_train.config import (
    AdaConfig,
    AttentionConfig,
    Config,
    DataConfig,
    EdgeConfig,
    GroveConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RecoveryConfig,
    RunConfig,
    TrainConfig,
)
from kan_train.data import Batch

SEQUENCES, LENGTH, VOCABULARY = 8, 64, 256
STEPS = 20
SEED = 29
BALANCE_RATE = 1e-2
CLIP = 0.5
"""Below every gradient norm met here: clipping is active in every step."""
EPS = 1e-4
"""AdamW's epsilon. With the usual 1e-8 an update is nearly the gradient's sign, and rounding decides it where the gradient is nearly 0."""


NORM_EPS = 1e-3
"""Added to the mean square in every norm. An ADA head that remembers one key puts out (q.k) v, which its norm divides by |q.k|: with the usual 1e-6
the gradient there grows without bound as q.k nears 0, and rounding alone moves the global norm by 4% within 20 steps (3e-7 with this)."""


def learning_rate(step: int) -> float:
    """Linear warm-up over five steps, then constant."""
    return 2e-3 * min(1.0, (step + 1) / 5)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout, and what it trains."""

    world: int
    """Processes."""
    zero: int | None
    """ZeRO stage; None: plain PyTorch, in one process."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Further settings of `parallel`: tensor_parallel=2 and so on; what is missing is 1."""
    kind: str = "kan"
    """kan: ADA and gated groves; hybrid: every second layer softmax; dense: softmax and SwiGLU; reuse and edge: ADA and groves of that kind."""
    micro_batch: int = 1
    """Sequences of a micro-batch; the rest of a rank's share of eight is accumulation."""
    clip: float = CLIP
    """Clipping norm; 0: none."""
    precision: str = "fp32"
    """fp32 or bf16."""
    recompute: bool = False
    """Activation checkpointing."""
    fast: bool = False
    """Whether the tests run it; the campaign runs all."""

    @property
    def name(self) -> str:
        """kind, sizes, ZeRO stage, and what is unusual: "kan-tp2-dp2-zero1"."""
        size = self.size
        sizes = [f"{short}{size(key)}" for short, key in SIZES.items() if size(key) > 1]
        marks = ["" if self.sequence_parallel or size("tensor_parallel") == 1 else "nosp", "" if self.clip else "noclip"]
        marks += ["bf16" if self.precision == "bf16" else "", f"acc{self.accumulation}", "recompute" if self.recompute else ""]
        return "-".join(part for part in (self.kind, *sizes, f"dp{self.data_parallel}", "plain" if self.zero is None else f"zero{self.zero}", *marks) if part)

    def size(self, key: str) -> int:
        """A size of the layout: 1 where nothing is said."""
        return int(self.layout.get(key) or 1)

    @property
    def sequence_parallel(self) -> bool:
        """Whether the residual stream is split over the tensor axis: by default where there is one."""
        return self.size("tensor_parallel") > 1 and self.layout.get("sequence_parallel") is not False

    @property
    def data_parallel(self) -> int:
        """Ranks that see different sequences."""
        return self.world // (self.size("tensor_parallel") * self.size("pipeline_parallel") * self.size("context_parallel"))

    @property
    def dense_copies(self) -> int:
        """Ranks over which ZeRO shards a dense parameter: data times context parallel."""
        return self.data_parallel * self.size("context_parallel")

    @property
    def grove_copies(self) -> int:
        """Ranks over which ZeRO shards a grove's parameter."""
        return self.world // (self.size("pipeline_parallel") * self.size("expert_parallel") * self.size("expert_tensor_parallel"))

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on one rank."""
        return SEQUENCES // (self.data_parallel * self.micro_batch)

    @property
    def model_key(self) -> str:
        """Rows of one key train the same model on the same batches with the same optimizer: they share a reference."""
        return f"{self.kind}-clip{self.clip:g}"

    def config(self, *, device: str = "cpu", minutes: float = 10.0) -> Config:
        """The run's settings, not validated. minutes: how long a collective may take."""
        found = Config(
            model=model_config(self.kind),
            data=DataConfig(blend={"synthetic": 1.0}),
            train=TrainConfig(
                steps=STEPS,
                global_batch_size=SEQUENCES,
                micro_batch_size=self.micro_batch,
                precision=self.precision,
                activation_checkpointing=self.recompute,
                validate_every=0,
            ),
            optimizer=OptimizerConfig(clip_norm=self.clip, learning_rate=1e-3, eps=EPS),
            parallel=ParallelConfig(zero_stage=self.zero, timeout_minutes=minutes, **self.layout),
            recovery=RecoveryConfig(hang_minutes=0.8 * minutes),
            run=RunConfig(seed=SEED, threads=1, device=device, name="row"),
        )
        found.optimizer.schedule.warmup_steps = 2
        return found


SIZES = {
    "tp": "tensor_parallel",
    "cp": "context_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
}
"""Short names of the sizes, in the order of a row's name."""


def model_config(kind: str) -> ModelConfig:
    """A model of four layers whose heads, groves, widths and vocabulary divide by 4, hidden widths of groves into groups of 8."""
    common = {"width": 64, "num_layers": 4, "vocab_size": VOCABULARY, "sequence_length": LENGTH, "norm_eps": NORM_EPS}
    common |= {"attention": AttentionConfig(num_heads=4, num_kv_heads=2)}
    if kind == "dense":
        return ModelConfig(ffn="swiglu", ffn_width=96, attention_pattern=1, **common)
    grove = GroveConfig(num_groves=8, active_groves=2, width=32, shared_width=32, auxiliary_loss=0.01, edge=EdgeConfig(group_size=8))
    if kind == "edge":
        grove.kind, grove.edge.sharing = "edge", "per_edge"
    elif kind == "reuse":
        grove.kind = "reuse"
    return ModelConfig(attention_pattern=2 if kind == "hybrid" else 0, ada=AdaConfig(num_heads=4, chunk=16), grove=grove, **common)


def sequences(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: tokens int64 [8, T+1] and resets bool [8, T]."""
    generator = torch.Generator().manual_seed(1000 * SEED + step)
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator), torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.05


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: its coordinate on each dense axis, tensor fastest, then context, data, pipeline (Megatron's order)."""

    tensor: int
    context: int
    data: int
    pipeline: int

    @classmethod
    def of(cls, row: Row, rank: int) -> "Seat":
        found = []
        for size in (row.size("tensor_parallel"), row.size("context_parallel"), row.data_parallel, row.size("pipeline_parallel")):
            found.append(rank % size)
            rank //= size
        return cls(*found)


def micro_batches(row: Row, rank: int) -> list[slice]:
    """Which sequences of the global batch each micro-batch of a rank has: those of its data-parallel share."""
    share = SEQUENCES // row.data_parallel
    start = Seat.of(row, rank).data * share
    return [slice(first, first + row.micro_batch) for first in range(start, start + share, row.micro_batch)]


def batches(row: Row, rank: int, step: int) -> list[Batch]:
    """A rank's micro-batches of a step: whole sequences; the ranks of one data-parallel share all read the same."""
    tokens, resets = sequences(step)
    parts = micro_batches(row, rank)
    return [Batch(tokens[part, :-1].contiguous(), tokens[part, 1:].contiguous(), resets[part].contiguous()) for part in parts]


def routed_positions(row: Row, rank: int) -> slice:
    """Which positions of a sequence a rank routes: its context chunk, and of that its tensor rank's part where groves are not split by hidden width."""
    seat, start, length = Seat.of(row, rank), 0, LENGTH
    splits = [(row.size("context_parallel"), seat.context)]
    if row.size("expert_tensor_parallel") == 1:
        splits.append((row.size("tensor_parallel"), seat.tensor))
    for size, index in splits:
        length //= size
        start += index * length
    return slice(start, start + length)


def find(names: Sequence[str]) -> list[Row]:
    """Rows by name, in the order of the list; all of them where no name is given. KeyError names what is not there."""
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            raise KeyError(f"no row is called {name}; known: {', '.join(known)}")
    return [row for row in ROWS if not names or row.name in names]


def _pair(first: dict[str, Any], second: dict[str, Any], **more: Any) -> list[Row]:
    """Two axes at once on eight processes, under ZeRO 1 and 2."""
    return [Row(world=8, zero=zero, layout=first | second, **more) for zero in (1, 2)]


TP, PP, CP, EP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2}, {"expert_parallel": 2}
NO_SP = {"sequence_parallel": False}

ROWS: list[Row] = [
    # ZeRO alone.
    Row(world=2, zero=0, fast=True),
    Row(world=4, zero=1, fast=True),
    Row(world=4, zero=2, kind="hybrid", micro_batch=2, clip=0.0, fast=True),
    Row(world=4, zero=3),
    Row(world=2, zero=3, kind="dense"),
    Row(world=2, zero=1, kind="reuse", micro_batch=4),
    Row(world=2, zero=2, kind="edge"),
    Row(world=2, zero=2, recompute=True),
    # One axis on four processes.
    Row(world=4, zero=1, layout=TP, fast=True),
    Row(world=4, zero=2, layout=TP | NO_SP, kind="hybrid", fast=True),
    Row(world=4, zero=2, layout=TP, kind="dense"),
    Row(world=4, zero=3, layout=TP, kind="hybrid"),
    Row(world=4, zero=1, layout=TP | {"expert_tensor_parallel": 2}),
    Row(world=4, zero=2, layout=TP | NO_SP | {"expert_tensor_parallel": 2}),
    Row(world=4, zero=0, layout=TP | {"expert_tensor_parallel": 2}),
    Row(world=4, zero=1, layout=CP, kind="hybrid", fast=True),
    Row(world=4, zero=2, layout=CP),
    Row(world=4, zero=3, layout=CP),
    Row(world=4, zero=1, layout=EP, fast=True),
    Row(world=4, zero=2, layout=EP, kind="reuse"),
    Row(world=4, zero=2, layout=EP, kind="edge", fast=True),
    Row(world=4, zero=3, layout=EP, kind="hybrid", fast=True),
    Row(world=4, zero=1, layout=PP, fast=True),
    Row(world=4, zero=2, layout=PP, kind="dense"),
    Row(world=4, zero=2, layout=PP | {"virtual_pipeline": 2}, fast=True),
    Row(world=4, zero=1, layout=PP | {"virtual_pipeline": 2}, kind="hybrid"),
    # Every pair on eight.
    *_pair(TP, PP),
    *_pair(TP, CP, kind="hybrid"),
    *_pair(TP, EP),
    *_pair(PP, CP, kind="hybrid"),
    *_pair(PP, EP),
    *_pair(CP, EP),
    # More of both kinds, and ZeRO-3 with two axes.
    Row(world=8, zero=2, layout=TP | NO_SP | EP),
    Row(world=8, zero=1, layout=TP | {"expert_tensor_parallel": 2} | EP),
    Row(world=8, zero=2, layout=TP | {"expert_parallel": 4}, kind="edge"),
    Row(world=8, zero=1, layout={"tensor_parallel": 4}),
    Row(world=8, zero=2, layout={"context_parallel": 4}, kind="hybrid"),
    Row(world=8, zero=3, layout=TP | EP),
    Row(world=8, zero=3, layout=TP | CP, kind="hybrid"),
    Row(world=8, zero=3, layout=CP | EP, kind="reuse"),
    Row(world=8, zero=2, layout=PP | {"virtual_pipeline": 2} | EP, kind="hybrid"),
    Row(world=8, zero=1, layout=TP | PP, kind="dense", clip=0.0),
    Row(world=8, zero=2, layout=TP | EP, recompute=True),
    # bf16, with bounds of its own.
    Row(world=2, zero=2, precision="bf16", fast=True),
    Row(world=4, zero=2, layout=TP, precision="bf16"),
    Row(world=4, zero=2, layout=PP, precision="bf16"),
    Row(world=4, zero=3, layout=EP, precision="bf16"),
]
