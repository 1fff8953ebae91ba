"""The layouts whose peak memory is measured, and what they train: large enough that tensors and not Python's small change decide, small enough for a laptop."""

from dataclasses import dataclass
from typing import Any

import torch
from layout_matrix.rows import CP, EP, NO_SP, PP, SEQUENCES, TP, Row, micro_batches

from kan_train.config import Config
from kan_train.data import Batch

OTHER = (
    ("width", 192), ("sequence_length", 200), ("num_layers", 6), ("ada.num_heads", 8), ("attention.num_heads", 6), ("attention.num_kv_heads", 6),
    ("grove.num_groves", 12), ("grove.active_groves", 3), ("grove.score_rank", 16), ("ffn_width", 320),
)  # fmt: skip
"""Another model: a last chunk of ADA that is shorter, other heads, more choices."""
TINY = (
    ("sequence_length", 512), ("vocab_size", 4096), ("grove.num_groves", 32), ("grove.width", 192), ("grove.shared_width", 0), ("grove.edge.group_size", 16),
    ("ada.chunk", 64),
)  # fmt: skip
"""The sizes of kan_tiny."""
ETP, VPP = {"expert_tensor_parallel": 2}, {"virtual_pipeline": 2}


@dataclass(frozen=True)
class Case:
    """A layout and the shape of its model."""

    row: Row
    wide: bool = False
    """Parameters outweigh activations, instead of the other way round."""
    resets: bool = True
    """Whether sequences have documents in them."""
    model: tuple[tuple[str, Any], ...] = ()
    """Further settings of `model`, by their path in it."""

    @property
    def name(self) -> str:
        """Of the row, and what is unusual."""
        marks = [f"{path.rpartition('.')[2]}={value}" for path, value in self.model]
        marks = {OTHER: ["other"], TINY: ["tiny"]}.get(self.model, marks)
        return "-".join([self.row.name, *(["wide"] if self.wide else []), *([] if self.resets else ["noresets"]), *marks])

    def config(self, device: str = "cpu") -> Config:
        """The run's settings, not validated."""
        found = self.row.config(device=device)
        model, grove = found.model, found.model.grove
        model.width, model.ffn_width, model.ada.chunk = 128, 256, 32
        model.sequence_length, model.vocab_size = (128, 1024) if self.wide else (256, 256)
        grove.num_groves, grove.width = (16, 64) if self.wide else (8, 32)
        grove.shared_width, grove.auxiliary_loss = 64, 0.0
        found.data.reset_at_documents = self.resets
        for path, value in self.model:
            owner: Any = model
            *parents, last = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, last, value)
        return found

    def batches(self, rank: int, step: int) -> list[Batch]:
        """A rank's micro-batches of a step."""
        config = self.config()
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, config.model.vocab_size, (SEQUENCES, config.model.sequence_length + 1), generator=generator)
        starts = torch.rand(SEQUENCES, config.model.sequence_length, generator=generator) < 0.02
        return [
            Batch(tokens[part, :-1].contiguous(), tokens[part, 1:].contiguous(), starts[part].contiguous() if self.resets else None)
            for part in micro_batches(self.row, rank)
        ]


FAST = [
    Case(Row(world=1, zero=None, kind="dense", micro_batch=4)),
    Case(Row(world=2, zero=1, kind="hybrid", layout=TP, micro_batch=4)),
    Case(Row(world=2, zero=2, kind="edge", layout=EP, micro_batch=2, precision="bf16")),
    Case(Row(world=2, zero=1, layout=PP, micro_batch=2)),
    Case(Row(world=2, zero=3, micro_batch=2, recompute=True), wide=True),
]
"""What the tests run."""

SLOW = [
    Case(Row(world=1, zero=None, micro_batch=4)),
    Case(Row(world=1, zero=None, micro_batch=4), wide=True),
    Case(Row(world=1, zero=None, kind="reuse", micro_batch=4), model=(("grove.shared_width", 0), ("grove.auxiliary_loss", 0.01))),
    Case(Row(world=1, zero=None, micro_batch=4, recompute=True)),
    Case(Row(world=1, zero=None, micro_batch=4), model=(("ada.mixture", 2), ("ada.decay", "data")), resets=False),
    Case(Row(world=1, zero=None, micro_batch=4), model=(("grove.capacity_factor", 1.5), ("ada.output_gate", False))),
    Case(Row(world=1, zero=None, micro_batch=4), model=(("grove.edge.kind", "rational"),)),
    Case(Row(world=1, zero=None, micro_batch=4), model=(("grove.edge.kind", "chebyshev"), ("grove.score", "linear"))),
    Case(Row(world=1, zero=None, kind="edge", micro_batch=2), model=(("grove.edge.kind", "chebyshev"),)),
    Case(Row(world=2, zero=0, micro_batch=2), wide=True),
    Case(Row(world=4, zero=1, micro_batch=2), wide=True),
    Case(Row(world=4, zero=2, kind="hybrid", micro_batch=2)),
    Case(Row(world=4, zero=3, kind="dense", micro_batch=2)),
    Case(Row(world=4, zero=3, layout=EP, micro_batch=2, precision="bf16"), wide=True),
    Case(Row(world=2, zero=1, micro_batch=2, precision="bf16"), wide=True),
    Case(Row(world=2, zero=2, layout=TP | NO_SP, micro_batch=4)),
    Case(Row(world=4, zero=2, layout=TP | ETP, micro_batch=4)),
    Case(Row(world=4, zero=1, layout=TP | EP, micro_batch=2), resets=False),
    Case(Row(world=4, zero=1, layout=EP, micro_batch=1)),
    Case(Row(world=2, zero=2, kind="dense", layout=CP, micro_batch=4)),
    Case(Row(world=4, zero=2, kind="hybrid", layout=CP, micro_batch=2), model=(("ada.mixture", 1),)),
    Case(Row(world=2, zero=2, layout=PP, micro_batch=1, precision="bf16")),
    Case(Row(world=4, zero=1, layout={"pipeline_parallel": 4}, micro_batch=1)),
    Case(Row(world=2, zero=2, layout=PP | VPP, micro_batch=2)),
    Case(Row(world=4, zero=2, layout=PP | EP, micro_batch=2, recompute=True), wide=True),
    Case(Row(world=4, zero=1, layout=TP | PP, kind="dense", micro_batch=2)),
    Case(Row(world=1, zero=None, kind="hybrid", micro_batch=2), model=OTHER),
    Case(Row(world=4, zero=2, layout=TP | EP, micro_batch=2, precision="bf16"), model=OTHER),
    Case(Row(world=4, zero=1, kind="hybrid", layout=PP | TP, micro_batch=2, recompute=True), model=OTHER),
    Case(Row(world=4, zero=3, kind="edge", layout=EP, micro_batch=2), model=OTHER),
    Case(Row(world=2, zero=2, kind="dense", micro_batch=4, precision="bf16"), model=OTHER),
    Case(Row(world=2, zero=1, layout=TP, micro_batch=2, recompute=True), model=TINY),
    Case(Row(world=2, zero=2, kind="hybrid", layout=CP, micro_batch=1, precision="bf16"), model=TINY),
    Case(Row(world=2, zero=1, layout=PP, micro_batch=1), model=TINY),
]
"""The campaign's, besides those."""


def named(names: "list[str] | None" = None) -> list[Case]:
    """Cases by name, all where none is given; KeyError names what is not there."""
    known = {case.name: case for case in (*FAST, *SLOW)}
    return [known[name] for name in names] if names else list(known.values())
