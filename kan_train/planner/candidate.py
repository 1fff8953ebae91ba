"""A layout with what decides its speed and memory besides, and the settings that a run with it has."""

from dataclasses import dataclass

from kan_train.config import Config
from kan_train.config.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout and what decides its speed and memory besides."""

    layout: Layout
    micro_batch_size: int
    """Sequences."""
    recompute: bool = False
    """Activation checkpointing."""
    offload: bool = False
    """Optimizer in the host's memory."""

    def __str__(self) -> str:
        """tp8sp-pp8-dp16-ep16-zero2, mb 1, recompute."""
        return f"{self.layout}, mb {self.micro_batch_size}" + (", recompute" if self.recompute else "") + (", offload" if self.offload else "")

    def overrides(self, config: Config) -> list[str]:
        """The settings of a run with this layout beside those of `config`, ready to paste behind `kan train`."""
        layout = self.layout
        sizes = {
            "tensor_parallel": layout.tensor_parallel, "pipeline_parallel": layout.pipeline_parallel, "virtual_pipeline": layout.virtual_pipeline,
            "context_parallel": layout.context_parallel, "expert_parallel": layout.expert_parallel,
        }  # fmt: skip
        words = [f"parallel.{name}={size}" for name, size in sizes.items() if size > 1]
        if layout.tensor_parallel > 1 and layout.sequence_parallel is (config.parallel.sequence_parallel is False):
            words.append(f"parallel.sequence_parallel={str(layout.sequence_parallel).lower()}")
        if config.model.has_groves and layout.expert_tensor_parallel > 1:
            words.append(f"parallel.expert_tensor_parallel={layout.expert_tensor_parallel}")
        if layout.zero_stage is not None:
            words.append(f"parallel.zero_stage={layout.zero_stage}")
        if self.offload is not config.parallel.offload_optimizer:
            words.append(f"parallel.offload_optimizer={str(self.offload).lower()}")
        words.append(f"train.micro_batch_size={self.micro_batch_size}")
        if self.recompute is not config.train.activation_checkpointing:
            words.append(f"train.activation_checkpointing={str(self.recompute).lower()}")
        return words
