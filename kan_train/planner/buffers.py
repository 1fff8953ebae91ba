"""What DeepSpeed holds beside weights, gradients and optimizer state while a step runs: buckets, flat copies, gathered parameters.

    ZeRO        during a backward pass                          when gradients are reduced
    none, 0     -                                               0: flat copies of gradients, up to 500 M elements
    1           bucket of b                                     the same; in bf16 instead flat copies of sums in fp32 and bf16
    2           bucket of b, two on a GPU                       the same, and new sums beside the old ones (fp32)
    3           bucket of b always; gathered parameters         the same
    pipeline    -                                               bucket of b

b elements, in the dtype of the gradients: the parameters, at most `engine.sharded.BUCKET_ELEMENTS`.
"""

from dataclasses import dataclass

from kan_train.engine.sharded import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS
from kan_train.planner.memory import Memory
from kan_train.planner.reduction import REPLICATED_BUCKET, REUSE_DISTANCE
from kan_train.planner.share import Share


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Bytes of one rank."""

    always: int = 0
    """From the beginning to the end of training."""
    backward: int = 0
    """During a backward pass."""
    gathered: int = 0
    """ZeRO-3: parameters that are whole at the end of a forward pass, and those that are never cut."""
    gathering: int = 0
    """ZeRO-3: what a gather received, until the last of its parameters is used."""
    reduction: int = 0
    """When gradients are reduced, after the last backward pass."""
    gradients: int = 0
    """Gradients and sums during a backward pass that is not the first."""
    gradients_before: int = 0
    """The same in the first one, before it adds any."""
    gradients_reduced: int = 0
    """The same when they are reduced."""
    grows: bool = True
    """Whether a first backward pass adds gradients that stay."""


def buffers_of(share: Share, memory: Memory, *, cuda: bool) -> Buffers:
    """For the engine of the share's layout, which holds `memory`. cuda: whether it overlaps reductions with backward passes, with a second bucket."""
    stage, size, elements = share.layout.zero_stage, share.element_size, share.elements
    kept, pipeline = memory.gradients, share.layout.pipeline_parallel > 1
    bucket = max(1, min(elements, BUCKET_ELEMENTS))
    if stage is None:
        return Buffers(gradients=kept, gradients_reduced=kept)
    if stage == 0:
        flat = size * min(elements, REPLICATED_BUCKET)
        return Buffers(gradients=kept, gradients_reduced=kept, reduction=flat)
    if pipeline:
        sums = 4 * elements if size == 2 else 0
        return Buffers(
            gradients=sums or kept, gradients_reduced=kept if size == 4 else size * elements + sums, reduction=0 if size == 2 else size * bucket
        )
    if stage == 1 and size == 2:
        flat = min(max(sum(sum(copies.sizes) for copies in share.copies() if copies.expert is expert) for expert in (False, True)), REPLICATED_BUCKET)
        return Buffers(gradients=kept, gradients_before=kept - size * elements, gradients_reduced=kept, reduction=(4 + size) * flat)
    if stage == 1:
        return Buffers(backward=size * bucket, gradients=kept, gradients_reduced=kept, reduction=size * bucket)
    if stage == 2:
        early = kept if size == 4 and elements > BUCKET_ELEMENTS else 0
        backward = size * bucket * (2 if cuda else 1)
        # Sums appear with the first reduction of a step: at the end of a backward pass, unless a bucket fills before.
        before = kept if size == 2 and elements > BUCKET_ELEMENTS else 0
        added = kept if size == 4 else 0  # the sums of this micro-batch, beside those of the ones before
        return Buffers(
            backward=backward + early, gradients=kept, gradients_before=before, gradients_reduced=kept, reduction=backward + added, grows=False
        )  # fmt: skip
    return _partitioned(share, kept, bucket)


def _partitioned(share: Share, kept: int, bucket: int) -> Buffers:
    size, named = share.element_size, [parameter.numel() for _, parameter in share.named_parameters()]
    small = sum(number for number in named if number <= PERSISTENT_ELEMENTS)
    large = sum(number for number in named if number > PERSISTENT_ELEMENTS)
    gathered = min(large, REUSE_DISTANCE)
    return Buffers(
        always=size * bucket,
        gathered=size * (gathered + small),
        gathering=size * min(gathered, bucket),
        gradients=kept,
        gradients_before=kept,
        gradients_reduced=kept,
        reduction=4 * sum(copies.partitioned for copies in share.copies()),
        grows=False,
    )
