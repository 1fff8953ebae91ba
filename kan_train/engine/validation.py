"""Validation: the same held-out sequences every time, each token counted once whatever the number of ranks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kan_train.config import TrainConfig
from kan_train.parallel.place import Axis

if TYPE_CHECKING:
    from kan_train.data import TrainingData
    from kan_train.engine.engine import Engine


PORTION = 8
"""Micro-batches, times the pipeline's stages, between two looks at whether to stop."""


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Loss on held-out documents."""

    loss: float
    """Nats a token."""
    bits_per_byte: float
    """Bits a byte of the held-out text: comparable between tokenizers."""
    tokens: int
    """Tokens counted."""
    seconds: float
    """Wall-clock in this process."""


class Validator:
    """Holds the held-out batches of this rank among `readers`, read once, at the start: a corpus that holds none out is refused before any work."""

    def __init__(self, train: TrainConfig, data: "TrainingData", readers: Axis) -> None:
        self.train, self.data = train, data
        self._batches = data.heldout(train.validation_sequences, train.micro_batch_size, readers.rank, readers.size) if train.validate_every else []

    def due(self, step: int) -> bool:
        """Whether to validate after `step` optimizer steps."""
        return self.train.validate_every > 0 and (step % self.train.validate_every == 0 or step == self.train.steps)

    def run(self, engine: "Engine", stopped: Callable[[], bool] = lambda: False) -> ValidationResult | None:
        """Validate. Collective. `stopped` is asked now and then, on every rank: where it says so, validation ends without a result."""
        started = time.perf_counter()
        nats, tokens = 0.0, 0
        # A pipeline is idle at both ends of every portion: it gets longer ones.
        portion = PORTION * engine.place.pipeline.size
        for start in range(0, len(self._batches), portion):
            if start and stopped():
                return None
            some, counted = engine.evaluate(self._batches[start : start + portion])
            nats, tokens = nats + some, tokens + counted
        loss = nats / max(1, tokens)
        bits_per_byte = loss / math.log(2) / self.data.bytes_per_token_heldout
        return ValidationResult(loss=loss, bits_per_byte=bits_per_byte, tokens=tokens, seconds=time.perf_counter() - started)
