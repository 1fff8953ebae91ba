"""What one rank sends in a step, by which group: the messages that the model, the engine and DeepSpeed give to process groups.

The model's own messages are counted here, per layer and micro-batch, from the layers' code; `kan_train.planner.reduction` has what DeepSpeed adds.
Activation checkpointing runs a block's forward pass again, up to the last tensor that its backward pass needs: a message after that is not repeated.
Not modelled: see NOT_MODELLED.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kan_train.model.ada import Ada
from kan_train.model.attention import SoftmaxAttention
from kan_train.model.block import Block
from kan_train.model.grove import KalmaGrove
from kan_train.parallel.layers import head_rows
from kan_train.planner.message import Message
from kan_train.planner.reduction import reductions
from kan_train.planner.share import Share

NOT_MODELLED = (
    "slices of the head on another kind of device than the one that plans: as many bytes, in other portions",
    "validation, checkpoints, the first two steps of ZeRO-3 (DeepSpeed compares the order of modules between the ranks)",
    "routing: rows to other ranks are those expected where every token draws its groves evenly and without regard to the others",
    "ZeRO 1 to 3: how many calls DeepSpeed makes of its gradients, and ZeRO-3 of its parameters, is an estimate beyond one bucket; the bytes are not",
    "ZeRO-3: parameters that prefetching keeps from the forward to the backward pass are those within 1e9 elements of their next use",
    "offloading to the host, and packing, padding and retries of the transport",
)
"""What differs in a run."""


@dataclass(frozen=True)
class Routed:
    """Rows and choices that a rank exchanged in a step, summed over layers and micro-batches, where they are known."""

    rows_sent: float
    rows_received: float
    choices_received: float


def traffic_of(share: Share, routed: Routed | None = None) -> list[Message]:
    """Every message of one step of the share's rank, groups of one rank left out. routed: what was counted, instead of what is expected."""
    return [message for message in (*_Micro(share, routed).step(), *_step_ends(share), *reductions(share)) if message.ranks > 1 and message.total]


class _Micro:
    """Messages of the micro-batches."""

    def __init__(self, share: Share, routed: Routed | None) -> None:
        layout, config = share.layout, share.config
        self.share, self.layout, self.model, self.routed = share, layout, config.model, routed
        self.size, self.count, self.sequences = share.element_size, share.micro_batches, config.train.micro_batch_size
        self.split = layout.sequence_parallel
        self.chunk = config.model.sequence_length // layout.context_parallel
        self.tokens = self.sequences * self.chunk
        self.stream = self.tokens * config.model.width * self.size
        device = "cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu"
        self.head_rows = head_rows(config.model.vocab_size // layout.tensor_parallel, device)
        # Blocks' forward messages, which checkpointing repeats.
        self.forward = 2 if config.train.activation_checkpointing else 1

    def step(self) -> Iterator[Message]:
        for stage, model in zip(self.share.stages, self.share.models, strict=True):
            if model.part.is_first:
                yield from self._leave("embedding", 1)
            for block in model.layers:
                assert isinstance(block, Block)
                yield from self._block(block)
            if model.part.is_last:
                yield from self._norm()
                yield from self._enter("head", 1)
                slices, rest = divmod(self.tokens, self.head_rows)
                for number, rows in ((slices, self.head_rows), (min(rest, 1), rest)):  # three fp32 numbers a token and rank
                    yield self._message("tensor", "head: vocabulary", "all-gather", number, self.layout.tensor_parallel * rows * 3 * 4)
            yield from self._neighbours(stage)
        yield from self._exchange(sum(len(model.grove_layers()) for model in self.share.models))

    def _message(self, group: str, purpose: str, operation: str, calls: int, each: float) -> Message:
        """`calls` of a micro-batch, of `each` bytes."""
        return Message(group, purpose, operation, calls * self.count, calls * self.count * each, len(self.share.ranks(group)))

    def _block(self, block: Block) -> Iterator[Message]:
        yield from self._norm()
        yield from self._norm()
        yield from self._enter("mixers", self.forward)
        yield from self._context(block.mixer)
        yield from self._leave("mixers", self.forward)
        if isinstance(block.ffn, KalmaGrove) and self.model.has_groves:
            yield from self._groves(block.ffn)
        else:
            yield from self._enter("feed-forward", self.forward)
            yield from self._leave("feed-forward", 1)

    def _norm(self) -> Iterator[Message]:
        if self.split:
            yield self._message("tensor", "norms", "all-reduce", 1, self.model.width * self.size)

    def _enter(self, purpose: str, forward: int) -> Iterator[Message]:
        """A `TensorRegion`, which the stream enters."""
        if self.split:
            yield self._message("tensor", purpose, "all-gather", forward, self.stream)
            yield self._message("tensor", purpose, "reduce-scatter", 1, self.stream)
        else:
            yield self._message("tensor", purpose, "all-reduce", 1, self.stream)

    def _leave(self, purpose: str, forward: int) -> Iterator[Message]:
        """A `TensorRegion`, which the stream leaves."""
        if self.split:
            yield self._message("tensor", purpose, "reduce-scatter", forward, self.stream)
            yield self._message("tensor", purpose, "all-gather", 1, self.stream)
        else:
            yield self._message("tensor", purpose, "all-reduce", forward, self.stream)

    def _context(self, mixer: object) -> Iterator[Message]:
        ranks, size = self.layout.context_parallel, self.size
        if isinstance(mixer, SoftmaxAttention):
            both = 2 * self.tokens * mixer.key.weight.shape[0] * size
            yield self._message("context", "keys and values", "all-gather", self.forward, ranks * both)
            yield self._message("context", "keys and values", "reduce-scatter", 1, ranks * both)
            yield self._message("context", "starts of documents", "all-gather", self.forward, ranks * self.tokens)
            return
        assert isinstance(mixer, Ada)
        channels = mixer.key.weight.shape[0]
        halo = self.sequences * (mixer.config.conv_width - 1) * channels * size
        yield self._message("context", "keys before the chunk", "all-gather", self.forward + 1, ranks * halo)
        # States are fp32, and go with how much of them each sequence keeps: a number a head, or a channel of the mixture.
        state, heads = self.sequences * channels * mixer.head_width * 4, self.sequences * channels // mixer.head_width * 4
        yield self._message("context", "states", "all-gather", self.forward, ranks * (state + heads))
        yield self._message("context", "states", "all-gather", 1, ranks * state)
        mixture = self.sequences * mixer.config.mixture * channels * 4
        yield self._message("context", "mixture", "all-gather", self.forward, ranks * 2 * mixture)
        yield self._message("context", "mixture", "all-gather", 1, ranks * mixture)

    def _groves(self, layer: KalmaGrove) -> Iterator[Message]:
        inside, split = self.layout.expert_tensor_parallel, self.layout.splits_grove_tokens
        if split:
            for _, parameter in layer.router.named_parameters():
                yield self._message("tensor", "routers", "all-reduce", 1, parameter.numel() * self.size)
        if layer.config.auxiliary_loss:
            each = self.sequences * layer.config.num_groves * 4
            yield self._message("context", "load of sequences", "all-reduce", self.forward, each)
            if split:
                yield self._message("tensor", "load of sequences", "all-reduce", self.forward, each)
        if split and not self.split:
            yield self._message("tensor", "groves", "all-gather", 2, self.stream)
        elif inside > 1 and self.split:
            yield self._message("tensor", "groves", "all-gather", self.forward + 1, self.stream)
            yield self._message("tensor", "groves", "reduce-scatter", 1, self.stream)
        elif inside > 1:
            yield self._message("tensor", "groves", "all-reduce", 1, self.stream)
        yield from self._inputs(layer)
        if layer.config.shared_width:
            yield from self._enter("shared groves", self.forward)
            # It runs beside the exchange, whose arrivals the backward pass needs; without one it is the last that a block does.
            yield from self._leave("shared groves", self.forward if self.layout.expert_parallel > 1 else 1)

    def _inputs(self, layer: KalmaGrove) -> Iterator[Message]:
        """Gradients of what groves read, where their hidden units are split, and every rank routes all tokens."""
        if self.layout.expert_tensor_parallel == 1:
            return
        grove, tokens = layer.config, self.tokens
        choices = tokens * grove.active_groves
        if grove.kind != "edge":
            yield self._message("expert_tensor", "groves' inputs", "all-reduce", 1, tokens * self.model.width * self.size)
        if grove.kind != "gated":
            yield self._message("expert_tensor", "groves' inputs", "all-reduce", 1, choices * grove.score_rank * self.size)
        yield self._message("expert_tensor", "gates", "all-reduce", 1, choices * 4)

    def _exchange(self, layers: int) -> Iterator[Message]:
        """`kan_train.parallel.expert.Exchange`, of which each of `layers` makes one a micro-batch: P, R, C and c of a step are in its docstring."""
        ranks, grove, split = self.layout.expert_parallel, self.model.grove, self.layout.splits_grove_tokens
        if ranks == 1 or not layers:
            return
        tokens = (self.tokens // self.layout.tensor_parallel if split else self.tokens) * layers * self.count
        choices = tokens * grove.active_groves
        rows = tokens * expected_destinations(grove.num_groves, grove.active_groves, ranks)
        routed = self.routed or Routed(rows, rows, choices)
        reads_x, reads_z = grove.kind != "edge", grove.kind != "gated"
        width, projection = self.model.width * self.size, grove.score_rank * self.size if reads_z else 0
        forward = self.forward

        def message(purpose: str, calls: int, total: float) -> Message:
            return Message("expert", purpose, "all-to-all", calls * layers * self.count, calls * total, ranks)

        yield message("counts", forward, 8 * ranks * (grove.num_groves // ranks + 1) * layers * self.count)
        if reads_x:
            yield message("tokens to groves", forward, routed.rows_sent * width)
            yield message("gradients of tokens", 1, routed.rows_received * width)
        yield message("choices to groves", forward, choices * (4 + 4 + projection))
        yield message("gradients of choices", 1, routed.choices_received * (4 + projection))
        yield message("outputs of groves", 1, routed.rows_received * width)
        yield message("gradients of outputs", 1, routed.rows_sent * width)

    def _neighbours(self, stage: int) -> Iterator[Message]:
        """The stream to the next stage and its gradient back."""
        layout = self.layout
        last = layout.pipeline_parallel * layout.virtual_pipeline - 1
        each = self.stream // layout.tensor_parallel if self.split else self.stream
        sends, receives = "pipeline", "pipeline"
        if layout.pipeline_parallel == 2 and layout.virtual_pipeline > 1:
            # Between two ranks Megatron sends one way over the pipeline's group and the other over that of all ranks, so that both overlap.
            even = layout.coordinates(self.share.rank).pipeline == 0
            sends, receives = ("pipeline", "default") if even else ("default", "pipeline")
        if stage < last:
            yield self._message(sends, "stream to the next stage", "send", 1, each)
            yield self._message(receives, "gradient from the next stage", "receive", 1, each)
        if stage > 0:
            yield self._message(receives, "stream from the stage before", "receive", 1, each)
            yield self._message(sends, "gradient to the stage before", "send", 1, each)


def expected_destinations(groves: int, active: int, ranks: int) -> float:
    """Expected number of ranks that hold any of a token's `active` groves, drawn evenly from `groves`, of which each rank holds as many."""
    held = groves // ranks
    return ranks * (1 - math.comb(groves - held, active) / math.comb(groves, active))


def _step_ends(share: Share) -> Iterator[Message]:
    """Losses and routing statistics, once a step."""
    layout, model = share.layout, share.config.model

    def total(group: str, purpose: str, size: int) -> Message:
        return Message(group, purpose, "all-reduce", 1, size, len(share.ranks(group)))

    yield total("tensor_and_data", "losses", 2 * 8)
    if layout.pipeline_parallel > 1:
        yield total("pipeline", "losses", 2 * 8)
    if not model.has_groves:
        return
    numbers = 4 * (3 * model.grove.num_groves + 1)
    for held in share.models:
        yield total("tensor_and_data" if layout.splits_grove_tokens else "data_and_context", "routing statistics", len(held.part.layers) * numbers)
    yield total("pipeline", "routing statistics", model.num_layers * numbers)
