"""What every process of a row does: build the engine, train, and leave what it saw in a folder."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kan_train.checkpoint import CheckpointError, save
from kan_train.config import Config
from kan_train.engine import build_engine
from kan_train.engine.engine import Engine
from kan_train.model.route import Router
from kan_train.parallel.runtime import Runtime, runtime
from layout_matrix.faults import FAULTS
from layout_matrix.rows import BALANCE_RATE, STEPS, Row, batches, find, learning_rate, micro_batches, routed_positions


def build(config: Config, process: Runtime) -> Engine:
    """The engine as `kan train` builds it."""
    return build_engine(config, process)


def routers(engine: Engine) -> Iterator[tuple[int, Router]]:
    """(layer, router) of every grove layer on this rank; layers count through the whole model."""
    for name, module in (pair for part in engine.parts for pair in part.named_modules()):
        if isinstance(module, Router):
            found = re.search(r"layers\.(\d+)\.", name)
            assert found is not None, name
            yield int(found[1]), module


class Replay:
    """Compares every choice of groves with the reference's, and takes the reference's where they differ.

    While nothing differs this changes no bit of the run. Once a near-tie has fallen the other way, the run would leave the reference's, and
    later choices say nothing: with the choice replaced, they do.
    """

    def __init__(self, row: Row, rank: int, choices: Tensor) -> None:
        self.row, self.rank, self.choices = row, rank, choices
        self.step = 0
        self.seen: dict[int, int] = {}
        self.differ: list[tuple[int, int, int, int]] = []

    def install(self, engine: Engine) -> None:
        """Watch all routers of `engine`."""
        for layer, router in routers(engine):
            router.selector = lambda selection, index, layer=layer: self._compare(layer, index)

    def begin(self, step: int) -> None:
        """The choices that follow are those of `step`."""
        self.step, self.seen = step, {}

    def _compare(self, layer: int, index_TK: Tensor) -> Tensor:
        """Calls of a layer within a step come in the order of its micro-batches: every schedule keeps that."""
        number = self.seen.get(layer, 0)
        self.seen[layer] = number + 1
        sequences, positions = micro_batches(self.row, self.rank)[number], routed_positions(self.row, self.rank)
        expected_TK = self.choices[self.step, layer, sequences, positions].flatten(0, 1).to(index_TK)
        if expected_TK.shape != index_TK.shape:
            raise ValueError(f"layer {layer} routes {tuple(index_TK.shape)}, but this rank's share is {tuple(expected_TK.shape)}")
        differs_T = (index_TK.sort(-1).values != expected_TK).any(-1)
        length = positions.stop - positions.start
        for token in differs_T.nonzero().flatten().tolist():
            self.differ.append((self.step, layer, sequences.start + token // length, positions.start + token % length))
        return torch.where(differs_T[:, None], expected_TK, index_TK)


def run_row(folder: Path, name: str, steps: int, choices: str | None, fault: str | None) -> None:
    """`train_row` in a process of its own, started as a launcher starts it."""
    (row,) = find([name])
    config = row.config()
    config.validate(row.world)
    with runtime(config) as process:
        train_row(row, process, folder, config=config, steps=steps, choices=Path(choices) if choices else None, fault=fault)


def train_row(row: Row, process: Runtime, folder: Path, *, config: Config, steps: int = STEPS, choices: Path | None = None, fault: str | None = None) -> None:
    """Train the first `steps` steps of a row and leave in `folder`: rank-N.json, and checkpoints after the first and the last of them. Collective.

    choices: file with the reference's choices of groves. fault: a name of FAULTS to plant.
    """
    with FAULTS[fault].plant() if fault else nullcontext():
        engine = build(config, process)
        replay = None
        if choices is not None and row.kind != "dense":
            replay = Replay(row, process.rank, load_file(choices)["choices"])
            replay.install(engine)
        seen: dict = {"losses": [], "norms": [], "skipped": [], "seconds": [], "not_saved": []}
        for step in range(steps):
            if replay is not None:
                replay.begin(step)
            started = time.perf_counter()
            result = engine.train_step(batches(row, process.rank, step), learning_rate(step), BALANCE_RATE)
            seen["seconds"].append(time.perf_counter() - started)
            for key, value in (("losses", result.loss), ("norms", result.grad_norm), ("skipped", result.skipped)):
                seen[key].append(value)
            if step in (0, steps - 1):
                try:
                    save(folder, step=step + 1, fragments=list(engine.named_fragments()), state={})
                except CheckpointError as error:  # on all ranks alike: what the steps say is worth knowing too
                    seen["not_saved"].append(str(error))
        if replay is not None:
            seen["differ"], seen["calls"] = replay.differ, sum(replay.seen.values())
        (folder / f"rank-{process.rank}.json").write_text(json.dumps(seen))
        engine.close()
