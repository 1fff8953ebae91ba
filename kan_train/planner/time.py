"""The time of a training step of a layout.

    step = m (c + x) + b + r + o        m micro-batches; of the slowest pipeline rank, a micro-batch: c computation, x communication that nothing hides
    b = sum of (c + x) of the other pipeline ranks, over the chunks of a rank v: filling and draining, (p - 1) (c + x) / v where all are alike
    r = what DeepSpeed sends in a step, o = the optimizer's step

c is the FLOPs of what the rank runs (`kan_train.accounting.flops`, recomputation included) over the device's speed, x and r are the messages of
`kan_train.planner.traffic` and `reduction` over the links, o the bytes that the optimizer reads and writes over the memory's bandwidth.
Hidden, as the engine does it: on an accelerator, transfers between interleaved stages; gradients of ZeRO 2 and 3 behind the backward pass (without a pipeline,
whose reduction comes at the end), gathered weights of ZeRO-3 behind both; tokens to groves behind the shared grove. On a CPU nothing. Never more is hidden than
the computation takes; at the slow end half of that.
Imbalance: the fullest of E expert ranks computes and sends (1 + sqrt(2 ln E (E - 1) / n)) of the mean of n choices that are drawn evenly: the expected maximum.
Not modelled: see NOT_MODELLED.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from kan_train.accounting.flops import Flops, flops_per_token
from kan_train.config import Config
from kan_train.config.layout import Layout
from kan_train.engine.pipeline import stage_parts
from kan_train.model.lm import Part
from kan_train.planner.efficiency import Efficiency
from kan_train.planner.links import HOST, Network
from kan_train.planner.message import Message
from kan_train.planner.quantity import Quantity, assumed
from kan_train.planner.reduction import reductions
from kan_train.planner.skeleton import Skeleton, Skeletons
from kan_train.planner.step import Piece, StepTime
from kan_train.planner.traffic import traffic_of

NOT_MODELLED = (
    "stragglers and jitter: every rank computes equally fast",
    "congestion: a link serves one message at a time, and networks have their full bandwidth between any two machines",
    "small products: FLOP/s do not fall where tensor, expert or context parallelism make them narrow",
    "documents: softmax attention is counted over whole sequences, and its later chunks under context parallelism are no slower",
    "learned routing: the load of the groves is that of even draws, up to 1.3 of the mean at the slow end",
    "logging, validation, waiting for data, and the host's work between kernels",
)
"""What differs in a run."""

SKEW = assumed(1.0, 1.0, 1.3, "load of the fullest expert rank over that of even draws: assumed up to 1.3, as groves are balanced but not even")
"""How much worse than even draws the routing is."""

_OF_A_STEP = ("losses", "routing statistics")
_ROUTED = ("tokens to groves", "choices to groves", "outputs of groves", "gradients of tokens", "gradients of choices", "gradients of outputs")


class Clock:
    """Times steps of one model on one cluster. What several layouts have in common is computed once."""

    def __init__(self, config: Config, network: Network, efficiency: Efficiency, *, skew: Quantity = SKEW, hides: Iterable[str] = ()) -> None:
        """hides: groups whose messages run beside the computation besides: how other systems than this one are planned ("expert", "pipeline", "tensor")."""
        self.config, self.network, self.efficiency, self.skew, self.hides = config, network, efficiency, skew, frozenset(hides)
        count = flops_per_token(config.model)
        self.skeletons = Skeletons(config)
        self.flops = {kind: count.layers[self.skeletons.kinds.index(kind)] for kind in set(self.skeletons.kinds)}
        self.head = count.head
        self._pieces: dict[tuple[object, ...], dict[bool | str, Piece]] = {}
        self._stages: dict[tuple[object, ...], Counter[tuple[tuple[tuple[bool, int], ...], bool, bool, int]]] = {}
        self._parts: dict[int, list[Part]] = {}
        self._fullest_ranks: dict[tuple[int, ...], int] = {}
        self._ends: dict[tuple[object, ...], tuple[list[Message], int, int]] = {}

    def at(self, efficiency: Efficiency) -> "Clock":
        """The same with another efficiency; what does not depend on it is shared."""
        other = copy.copy(self)
        other.efficiency, other._pieces = efficiency, {}
        return other

    def configured(self, layout: Layout, micro_batch_size: int, *, recompute: bool = False, offload: bool = False) -> Config:
        """The run's configuration with this layout."""
        config = self.config
        train = replace(config.train, micro_batch_size=micro_batch_size, activation_checkpointing=recompute)
        parallel = replace(
            config.parallel, tensor_parallel=layout.tensor_parallel,
            sequence_parallel=layout.sequence_parallel if layout.tensor_parallel > 1 else layout.sequence_parallel or None,
            pipeline_parallel=layout.pipeline_parallel, virtual_pipeline=layout.virtual_pipeline, context_parallel=layout.context_parallel,
            expert_parallel=layout.expert_parallel, expert_tensor_parallel=layout.expert_tensor_parallel if config.model.has_groves else None,
            zero_stage=layout.zero_stage, offload_optimizer=offload,
        )  # fmt: skip
        return replace(config, train=train, parallel=parallel)

    def step(self, layout: Layout, micro_batch_size: int, *, recompute: bool = False, offload: bool = False, end: str = "expected") -> StepTime:
        """A step of `layout`, which must be sound. end: one of `kan_train.planner.quantity.ENDS`."""
        pieces = self._pieces_of(layout, micro_batch_size, recompute, end)
        micro_batches = self.config.train.global_batch_size // (micro_batch_size * layout.data_parallel)
        ranks = [(self._rank(pieces, layout, *what, micro_batch_size, end), how_many) for what, how_many in self._stages_of(layout).items()]
        slowest = max((piece for piece, _ in ranks), key=lambda piece: piece.seconds)
        others = sum(piece.seconds * how_many for piece, how_many in ranks) - slowest.seconds
        backward = 2 / 3 * slowest.compute
        reduction, hidden = self._reduction(layout, micro_batches, slowest.compute, backward, end)
        return StepTime(
            compute=micro_batches * slowest.compute, recompute=micro_batches * slowest.again, imbalance=micro_batches * slowest.waiting,
            communication=micro_batches * slowest.sends, bubble=others / layout.virtual_pipeline, reduction=reduction,
            optimizer=self._optimizer(layout, micro_batches, offload, end), hidden=micro_batches * slowest.hidden + hidden,
        )  # fmt: skip

    # --- a micro-batch ------------------------------------------------------------------------------------------------------------------------------------

    def _pieces_of(self, layout: Layout, micro_batch_size: int, recompute: bool, end: str) -> dict[bool | str, Piece]:
        sizes = (layout.tensor_parallel, layout.sequence_parallel, layout.context_parallel, layout.expert_parallel, layout.expert_tensor_parallel)
        key = (*sizes, micro_batch_size, recompute, end)
        if key not in self._pieces:
            one = self.configured(layout, micro_batch_size, recompute=recompute)
            one.train.global_batch_size = micro_batch_size * layout.data_parallel  # a single micro-batch
            found: dict[bool | str, Piece] = {kind: self._block(one, layout, kind, end) for kind in self.flops}
            messages = [message for message in traffic_of(self.skeletons.probe(one, layout, None)) if message.purpose not in _OF_A_STEP]
            tokens = micro_batch_size * self.config.model.sequence_length / layout.context_parallel
            head = self._sent([message for message in messages if message.purpose != "embedding"], layout, end)
            compute = tokens * self.head.executed() / layout.tensor_parallel / self.efficiency.of("head").rate(end)
            found["head"] = Piece(compute=compute) + self._sends(head, compute, end)
            found["embedding"] = self._sends(self._sent([message for message in messages if message.purpose == "embedding"], layout, end), 0.0, end)
            self._pieces[key] = found
        return self._pieces[key]

    def _block(self, config: Config, layout: Layout, kind: bool, end: str) -> Piece:
        model, efficiency = config.model, self.efficiency
        tokens = config.train.micro_batch_size * model.sequence_length / layout.context_parallel
        compute, again, groves, shared = efficiency.block_seconds.burden(end), 0.0, 0.0, 0.0
        for part, flops in self.flops[kind].items():
            seconds, more = self._computed(part, flops, tokens, layout, config.train.activation_checkpointing, end)
            compute, again = compute + seconds, again + more
            groves = seconds if part == "groves" else groves
            shared = seconds if part == "shared_grove" else shared
        messages = [message for message in traffic_of(self.skeletons.probe(config, layout, kind)) if message.purpose not in _OF_A_STEP]
        fullest = self._fullest(layout, tokens, end)
        routed = self._sent([message for message in messages if message.purpose in _ROUTED], layout, end, factor=fullest)
        rest = self._sent([message for message in messages if message.purpose not in _ROUTED], layout, end)
        beside = min(sum(routed.values()), shared) * (0.5 if end == "slow" else 1.0) if efficiency.overlaps else 0.0
        sends = self._sends({group: routed.get(group, 0.0) + rest.get(group, 0.0) for group in {*routed, *rest}}, compute, end)
        moved = min(beside, sends.sends)
        return replace(
            sends, compute=compute, again=again, waiting=groves * (fullest - 1), sends=sends.sends - moved, hidden=sends.hidden + moved
        )

    def _computed(self, part: str, flops: Flops, tokens: float, layout: Layout, recompute: bool, end: str) -> tuple[float, float]:
        """Seconds of a part of a block on this rank, and of them what is computed again."""
        routes_all = part in ("scoring", "projection", "auxiliary_loss") and not layout.splits_grove_tokens
        each = tokens / (1 if routes_all else layout.tensor_parallel) / self.efficiency.of(part).rate(end)
        return each * flops.executed(activation_checkpointing=recompute), each * flops.recomputed * recompute

    def _fullest(self, layout: Layout, tokens: float, end: str) -> float:
        """Choices of the fullest expert rank over the mean."""
        ranks, grove = layout.expert_parallel, self.config.model.grove
        if ranks == 1 or not self.config.model.has_groves:
            return 1.0
        own = tokens / layout.tensor_parallel if layout.splits_grove_tokens else tokens
        choices = own * ranks * grove.active_groves
        return (1 + math.sqrt(2 * math.log(ranks) * (ranks - 1) / choices)) * self.skew.burden(end)

    def _sent(self, messages: Iterable[Message], layout: Layout, end: str, factor: float = 1.0) -> dict[str, float]:
        """Seconds by group."""
        found: dict[str, float] = {}
        for message in messages:
            found[message.group] = found.get(message.group, 0.0) + factor * self.network.message_seconds(message, layout, end)
        return found

    def _sends(self, seconds: dict[str, float], compute: float, end: str) -> Piece:
        """What of the messages nothing hides. compute: beside which those of `hides` run."""
        beside = sum(own for group, own in seconds.items() if group in self.hides)
        hidden = min(beside, compute) * (0.5 if end == "slow" else 1.0)
        return Piece(sends=sum(seconds.values()) - hidden, hidden=hidden)

    # --- a pipeline rank ----------------------------------------------------------------------------------------------------------------------------------

    def _stages_of(self, layout: Layout) -> Counter[tuple[tuple[tuple[bool, int], ...], bool, bool, int]]:
        """Pipeline ranks by what they hold: (blocks of each kind, whether the embedding, whether the head, messages to neighbours a micro-batch)."""
        ranks, chunks = layout.pipeline_parallel, layout.virtual_pipeline
        key = (ranks, chunks)
        if key not in self._stages:
            parts = self._parts_of(layout)
            found: Counter[tuple[tuple[tuple[bool, int], ...], bool, bool, int]] = Counter()
            for rank in range(ranks):
                own = [rank + ranks * chunk for chunk in range(chunks)]
                counts: Counter[bool] = Counter()
                for stage in own:
                    counts.update(self.skeletons.counts(parts[stage].layers))
                sends = sum((stage < len(parts) - 1) + (stage > 0) for stage in own)
                found[(tuple(sorted(counts.items())), 0 in own, len(parts) - 1 in own, sends)] += 1
            self._stages[key] = found
        return self._stages[key]

    def _parts_of(self, layout: Layout) -> list[Part]:
        stages = layout.pipeline_parallel * layout.virtual_pipeline
        if stages not in self._parts:
            self._parts[stages] = stage_parts(self.config, layout)
        return self._parts[stages]

    def _rank(
        self, pieces: dict[bool | str, Piece], layout: Layout, counts: tuple[tuple[bool, int], ...], first: bool, last: bool, sends: int,
        micro_batch_size: int, end: str,
    ) -> Piece:  # fmt: skip
        found = sum((pieces[kind].times(count) for kind, count in counts), Piece())
        found = found + (pieces["embedding"] if first else Piece()) + (pieces["head"] if last else Piece())
        if not sends:
            return found
        model, size = self.config.model, 2 if self.config.train.precision == "bf16" else 4
        stream = micro_batch_size * model.sequence_length // layout.context_parallel * model.width * size
        each = stream // layout.tensor_parallel if layout.sequence_parallel else stream
        message = Message("pipeline", "stream", "send", sends, sends * each, layout.pipeline_parallel)
        seconds = self.network.message_seconds(message, layout, end)
        interleaved = layout.virtual_pipeline > 1 and self.efficiency.overlaps
        hidden = min(seconds, found.compute) * (0.5 if end == "slow" else 1.0) if interleaved or "pipeline" in self.hides else 0.0
        return found + Piece(sends=seconds - hidden, hidden=hidden)

    # --- a step -------------------------------------------------------------------------------------------------------------------------------------------

    def share(self, layout: Layout, micro_batch_size: int = 1, *, offload: bool = False) -> Skeleton:
        """What the pipeline rank with most parameters holds."""
        config, (rank, parts) = self.configured(layout, micro_batch_size, offload=offload), self._fullest_rank(layout)
        own = range(rank, len(parts), layout.pipeline_parallel)
        return self.skeletons.share(config, layout, [parts[stage] for stage in own], own)

    def _fullest_rank(self, layout: Layout) -> tuple[int, list[Part]]:
        key = (layout.tensor_parallel, layout.expert_parallel, layout.expert_tensor_parallel, layout.pipeline_parallel, layout.virtual_pipeline)
        if key not in self._fullest_ranks:
            parts, ranks = self._parts_of(layout), layout.pipeline_parallel
            shares = [self.skeletons.share(self.config, layout, [part], [stage]) for stage, part in enumerate(parts)] if ranks > 1 else []
            self._fullest_ranks[key] = max(range(ranks), key=lambda rank: sum(share.elements for share in shares[rank::ranks]))
        return self._fullest_ranks[key], self._parts_of(layout)

    def _ends_of(self, layout: Layout) -> tuple[list[Message], int, int]:
        """Messages of DeepSpeed for one micro-batch, elements of the rank that holds most, and those that its optimizer steps."""
        key = (
            layout.tensor_parallel, layout.expert_parallel, layout.expert_tensor_parallel, layout.pipeline_parallel, layout.virtual_pipeline, layout.zero_stage,
            layout.context_parallel * layout.data_parallel,
        )  # fmt: skip
        if key not in self._ends:
            share = self.share(layout)
            share.config.train.global_batch_size = layout.data_parallel  # a single micro-batch
            stepped = share.elements
            if layout.zero_stage:
                stepped = sum(group.partitioned if layout.zero_stage == 3 else group.flat // group.ranks for group in share.copies())
            self._ends[key] = ([one for one in reductions(share) if one.ranks > 1 and one.total], share.elements, stepped)
        return self._ends[key]

    def _reduction(self, layout: Layout, micro_batches: int, compute: float, backward: float, end: str) -> tuple[float, float]:
        """(seconds that nothing hides, hidden ones) of a step."""
        stage, pipelined = layout.zero_stage, layout.pipeline_parallel > 1
        gradients = weights = once = 0.0
        for message in self._ends_of(layout)[0]:
            seconds = self.network.message_seconds(message, layout, end)
            if stage in (2, 3) and not pipelined and message.purpose.startswith("gradients"):
                gradients += seconds
            elif stage == 3 and message.purpose.startswith("weights"):
                weights += seconds
            else:
                once += seconds
        share = (0.5 if end == "slow" else 1.0) if self.efficiency.overlaps else 0.0
        hidden = share * min(gradients, backward)
        hidden += share * min(weights, max(0.0, compute - hidden))
        return once + micro_batches * (gradients + weights - hidden), micro_batches * hidden

    def _optimizer(self, layout: Layout, micro_batches: int, offload: bool, end: str) -> float:
        _, elements, stepped = self._ends_of(layout)
        bf16 = self.config.train.precision == "bf16"
        size = 2 if bf16 else 4
        memory = self.efficiency.memory.rate(end)
        # A gradient is read, and its fp32 sum read and written, for every micro-batch; in fp32 autograd adds in place.
        adding = micro_batches * elements * (10 if bf16 else 4) / memory
        # Gradient, master, two moments are read, the last three and the weight written; the gradient once more for its norm.
        touched = (32 + size) * stepped
        if not offload:
            return adding + touched / memory
        over = (4 + size) * stepped / HOST.bandwidth.rate(end)
        return adding + touched / self.efficiency.host_memory.rate(end) + over

