"""Validation: the same held-out sequences every time, each token counted once whatever the number of ranks."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kan_train.config import TrainConfig
from kan_train.parallel.place import Axis

if TYPE_CHECKING:
    from kan_train.data import TrainingData
    from kan_train.engine.engine import Engine


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

    def run(self, engine: "Engine") -> ValidationResult:
        """Validate. Collective."""
        started = time.perf_counter()
        nats, tokens = engine.evaluate(self._batches)
        loss = nats / max(1, tokens)
        bits_per_byte = loss / math.log(2) / self.data.bytes_per_token_heldout
        return ValidationResult(loss=loss, bits_per_byte=bits_per_byte, tokens=tokens, seconds=time.perf_counter() - started)
