"""Seconds of a training step and of its pieces."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by what they go to; the sum is the step."""

    compute: float
    """Computing m micro-batches, recomputation included."""
    recompute: float
    """Of that, what activation checkpointing adds."""
    imbalance: float
    """Waiting for the fullest expert rank."""
    communication: float
    """Model's messages that nothing hides, by the slowest pipeline rank."""
    bubble: float
    """Filling and draining the pipeline."""
    reduction: float
    """Gradients, weights, and what else is sent once a step, that nothing hides."""
    optimizer: float
    """The optimizer's step, adding up gradients, and moving them to the host and back."""
    hidden: float
    """Communication beside the computation: not in the sum."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.compute + self.imbalance + self.communication + self.bubble + self.reduction + self.optimizer


@dataclass(frozen=True)
class Piece:
    """Seconds a micro-batch of a block, of the embedding or of the head; computation, what of it is computed again, waiting, messages, hidden ones."""

    compute: float = 0.0
    again: float = 0.0
    waiting: float = 0.0
    sends: float = 0.0
    hidden: float = 0.0

    def times(self, count: int) -> "Piece":
        """Of so many alike."""
        return Piece(*(count * getattr(self, name) for name in self.__dataclass_fields__))

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def seconds(self) -> float:
        """What the micro-batch takes."""
        return self.compute + self.waiting + self.sends
