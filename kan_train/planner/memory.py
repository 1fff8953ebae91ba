"""Bytes of weights, gradients and optimizer state on one rank, as the engines of `kan_train.engine` hold them between and within steps.

    ZeRO            weights     gradients                            masters       moments
    none, 0         w P         w P                                  -             8 P
    1               w F         w P, and in bf16 4 F of fp32 sums    4 F/n         8 F/n
    2               w F         in bf16 4 F/n, in fp32 4 W           4 F/n         8 F/n
    1, 2, pipeline  w F         w P, and in bf16 4 P of fp32 sums    4 F/n         8 F/n
    3               w Q         4 Q                                  4 Q           8 Q

P parameters of this rank, w bytes of a weight (4, or 2 in bf16), n ranks that hold the same ones (data times context, for groves expert data), F the P
padded to n ranges of equal length, W the parameters that have any element in this rank's range, Q the rank's ranges of every single parameter. Muon's
matrices have one momentum, 4 P, instead of two moments. What a step needs beside these is `kan_train.planner.footprint`'s; neither counts NOT_COUNTED.
"""

from dataclasses import dataclass

from kan_train.engine.optimizer import parameter_groups
from kan_train.planner.share import Share

NOT_COUNTED = (
    "rows that a rank's groves get beyond an even share of the tokens",
    "on a GPU the kernels' tensors are counted as their code makes them, and were never measured there; workspace of cuBLAS and of sums in parts is not",
    "CUDA's context, NCCL's buffers and the allocator's fragments: see the allowance",
    "Muon's products while it steps a matrix, validation, and copies that a save makes in the host's memory",
    "ZeRO 2 in fp32: parameters that lie across the ends of a rank's range, where they are larger than those of the rank that is described",
)
"""What takes memory too, and is neither here nor in `kan_train.planner.footprint`."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    """What computes."""
    gradients: int
    """What is kept from the first micro-batch of a step to its end."""
    masters: int
    """fp32 copies of the weights that the optimizer steps; 0 where it steps the weights themselves."""
    moments: int
    """AdamW's two moments or Muon's momentum."""
    offloaded: bool
    """Whether masters and moments are in the host's memory."""

    @property
    def optimizer(self) -> int:
        """Masters and moments."""
        return self.masters + self.moments

    @property
    def device(self) -> int:
        """Of all, what is in the device's memory."""
        return self.weights + self.gradients + (0 if self.offloaded else self.optimizer)


def memory_of(share: Share) -> Memory:
    """Bytes that the share's rank holds."""
    layout, size, copies = share.layout, share.element_size, share.copies()
    stage, pipeline, elements = layout.zero_stage, layout.pipeline_parallel > 1, share.elements
    if stage in (None, 0):
        return Memory(size * elements, size * elements, 0, _moments(share), offloaded=False)
    held = sum(group.partitioned if stage == 3 else group.flat // group.ranks for group in copies)
    whole = sum(group.flat for group in copies)
    weights = size * (held if stage == 3 else whole)
    if stage == 3 or (stage == 2 and size == 2 and not pipeline):
        gradients = 4 * held
    elif stage == 2 and not pipeline:
        gradients = 4 * sum(group.touched(share.ranks(group.group).index(share.rank)) for group in copies)
    elif size == 4:
        gradients = 4 * elements
    else:
        gradients = size * elements + 4 * (elements if pipeline else whole)
    return Memory(weights, gradients, 4 * held, 8 * held, offloaded=share.config.parallel.offload_optimizer)


def _moments(share: Share) -> int:
    groups = parameter_groups(share.config.optimizer, share.named_parameters())
    return sum((4 if group.get("muon") else 8) * parameter.numel() for group in groups for parameter in group["params"])
