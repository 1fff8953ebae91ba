"""Bytes that one block keeps from its forward to its backward pass, and needs beside them, operator by operator, as the code of `kan_train.model` makes them.

n tokens of this rank's chunk of the sequences, s of its residual stream (n / tensor ranks under sequence parallelism), e bytes of an activation, D width,
H heads. An operator's `kept` is what a later operator's backward pass reads, mostly its output, and is free once that one is done; `own` is what its own reads
besides. `forward` and `backward` are what is alive beside both while it runs: scratch, gradients that come in and go out, and those of its parameters.
Operators stand in the order of the forward pass; the backward pass runs them in reverse.

What an operator of torch takes inside itself (blocks of a product, a convolution's workspace) is not seen here, nor in a tally of tensors.
"""

import math
from collections import Counter
from dataclasses import KW_ONLY, dataclass

from kan_train.config import ModelConfig

WIDE = 4
"""Bytes of a number of what is computed in fp32 whatever the precision."""


@dataclass(frozen=True)
class Op:
    """One operator, or several that run together."""

    part: str
    """What its bytes are counted with."""
    _: KW_ONLY
    kept: int = 0
    """For the backward passes of later operators: gone before its own."""
    own: int = 0
    """For its own backward pass."""
    forward: int = 0
    """Alive beside what is kept, in the forward pass."""
    backward: int = 0
    """Alive beside what is kept, in the backward pass."""
    weights: int = 0
    """Of `backward`, gradients of parameters, which stay."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a rank has of a block and of a micro-batch."""

    model: ModelConfig
    sequences: int
    """Of a micro-batch."""
    chunk: int
    """Tokens of each that this rank has."""
    element: int
    """Bytes of an activation: 4, or 2 in bf16."""
    tensor: int = 1
    """Tensor-parallel ranks."""
    split: bool = False
    """Sequence parallelism."""
    context: int = 1
    """Context-parallel ranks."""
    expert: int = 1
    """Ranks that share the groves."""
    expert_tensor: int = 1
    """Ranks that split a grove's hidden units."""
    strided: bool = False
    """Whether the stream comes in Megatron's order of dimensions, [T, B, D], seen as [B, T, D]: every product then keeps a copy of its own."""
    resets: bool = True
    """Whether batches say where documents start."""
    kernels: bool = False
    """Whether Triton kernels run, instead of plain torch."""

    @property
    def tokens(self) -> int:
        """n."""
        return self.sequences * self.chunk

    @property
    def stream(self) -> int:
        """s."""
        return self.tokens // self.tensor if self.split else self.tokens

    @property
    def stream_bytes(self) -> int:
        """Of the residual stream."""
        return self.element * self.stream * self.model.width

    @property
    def inner_bytes(self) -> int:
        """Of all tokens at the model's width, as layers inside a tensor region read them."""
        return self.element * self.tokens * self.model.width


@dataclass(frozen=True)
class Block:
    """One block of a kind, summed up."""

    kept: "Counter[str]"
    """Bytes by part that its backward pass needs; with its output, without its input."""
    forward: int
    """The most that is alive beside what was kept before it, in its forward pass."""
    backward: int
    """The most that is alive beside what was kept before it, in its backward pass."""
    weights: int
    """Of gradients of its parameters."""

    @property
    def bytes(self) -> int:
        """All that is kept."""
        return sum(self.kept.values())


def summed(ops: list[Op], beside: int = 0) -> Block:
    """Operators in the order of their forward pass. beside: bytes of the gradient that passes them by, along the residual stream."""
    kept: Counter[str] = Counter()
    forward = backward = live = 0
    for op in ops:
        live += op.kept + op.own
        kept[op.part] += op.kept + op.own
        forward = max(forward, live + op.forward)
    for op in reversed(ops):
        live -= op.kept
        backward = max(backward, live + op.backward + beside)
        live -= op.own
    return Block(kept, forward, backward, sum(op.weights for op in ops))


def column(part: str, cut: Cut, outputs: int, *, beside: int = 0) -> Op:
    """A column-parallel product of what a region holds. beside: other gradients that wait meanwhile."""
    out, matrix = cut.element * cut.tokens * outputs, cut.element * cut.model.width * outputs
    copied = cut.inner_bytes if cut.strided else 0
    return Op(part, kept=out, own=copied, backward=beside + out + cut.inner_bytes + copied + matrix, weights=matrix)


def norm(part: str, cut: Cut, rows: int, width: int, *, beside: int = 0, heads: int = 1, output: int = 0) -> Op:
    """RMSNorm of rows of `width`: it keeps its input, which is counted where that is made, and one number a row and head. output: of its output, where no
    region reads it."""
    numbers, e = rows * width, cut.element
    forward, backward = (WIDE, 4 * WIDE) if e == WIDE else (2 * WIDE + e, 4 * WIDE + e)
    if cut.kernels:
        forward, backward = e, 2 * e
    return Op(part, kept=output, own=WIDE * rows * heads, forward=forward * numbers - output, backward=beside + backward * numbers, weights=e * width)


def region(part: str, cut: Cut) -> Op:
    """The way into a tensor region: what the layers inside read, gathered under sequence parallelism."""
    inner = cut.inner_bytes
    kept = 0 if cut.strided else inner
    travel = cut.stream_bytes if cut.split else 0
    return Op(part, kept=kept, forward=inner - kept + 2 * travel, backward=(2 * inner if cut.split else inner) + travel)


def leave(part: str, cut: Cut, inputs: int) -> list[Op]:
    """The row-parallel product that leads out of a region, and the sum with the stream."""
    inner, matrix = cut.inner_bytes, cut.element * inputs * cut.model.width
    # The gradient that comes in is the stream's own, which passes by too; under sequence parallelism it is gathered first.
    gathered = 2 * inner if cut.split else 0
    product = Op(part, forward=inner, backward=gathered + cut.element * cut.tokens * inputs + matrix, weights=matrix)
    return [product, Op("stream", kept=cut.stream_bytes, forward=2 * inner if cut.split else inner)]


def ada(cut: Cut) -> list[Op]:
    """The token mixer, from its norm to the stream behind it."""
    model, config, n, e = cut.model, cut.model.ada, cut.tokens, cut.element
    width, heads = model.width // cut.tensor, config.num_heads // cut.tensor
    u, gy = e * n * width, cut.inner_bytes  # a tensor of all heads; the gradient of what the region holds, which waits for its last reader
    ops = [norm("norms", cut, cut.stream, model.width), region("ada", cut)]
    ops += [column("ada", cut, width, beside=gy + waiting * u) for waiting in (0, 1, 2)]
    ops += _keys(cut, u, gy)
    if config.decay == "data":
        wide = WIDE * n * model.width
        ops.append(Op("scan", kept=WIDE * n * heads, own=3 * WIDE * n * heads + (0 if e == WIDE else wide), backward=gy + 3 * u + 2 * wide))
    if cut.context > 1:
        state, wide = WIDE * cut.sequences * heads * model.head_width**2, WIDE * n * width
        ops.append(Op("scan", kept=state, own=state, forward=(2 + cut.context) * state + 2 * wide, backward=gy + 3 * u + 4 * wide))
    ops.append(_scan(cut, u, gy))
    fused = cut.kernels and config.output_norm
    if config.output_norm and not fused:
        ops.append(norm("ada", cut, n, width, beside=gy, heads=heads, output=u))
    if config.output_gate:
        ops.append(column("ada", cut, width, beside=u))
        if not fused:
            ops += [Op("ada", kept=u, backward=3 * u)] * 2
    if fused:
        ops.append(Op("ada", kept=u, backward=gy + 3 * u))  # norm and gate together, which keep what they read
    return [*ops, *leave("ada", cut, width)]


def _keys(cut: Cut, u: int, gy: int) -> list[Op]:
    """Convolution, mixture and feature maps of keys and queries, while gradients of queries and values wait."""
    model, config, n = cut.model, cut.model.ada, cut.tokens
    width, heads = model.width // cut.tensor, config.num_heads // cut.tensor
    silu, waiting, ops = config.feature_map == "silu", gy + 2 * u, list[Op]()
    if cut.kernels and config.conv_width > 1 and not config.mixture:
        return [Op("conv", kept=u, backward=waiting + 2 * u)]
    if config.conv_width > 1:
        before = u if cut.context > 1 else 0  # the keys again, behind those of the chunk before
        ops.append(Op("conv", kept=u, own=before, forward=2 * u, backward=waiting + 4 * u + 2 * before))
    if config.mixture:
        # By doubling: every doubling keeps the means that it started from.
        mean, doublings = WIDE * config.mixture * n * width, max(1, math.ceil(math.log2(cut.chunk)))
        ops.append(Op("conv", kept=u, own=(doublings + 1) * mean, forward=2 * mean, backward=waiting + 3 * mean))
    if silu:
        ops += [Op("conv", kept=u, backward=waiting + 2 * u), norm("conv", cut, n, width, beside=waiting, heads=heads, output=u)]
        if not cut.kernels:
            ops.append(Op("ada", kept=u, backward=waiting + 2 * u))
    return ops


def _scan(cut: Cut, u: int, gy: int) -> Op:
    """The recurrence keeps its inputs alone, and computes everything in fp32 copies of them."""
    model, config, n = cut.model, cut.model.ada, cut.tokens
    width, heads, head = model.width // cut.tensor, config.num_heads // cut.tensor, model.head_width
    size, first = min(config.chunk, cut.chunk), WIDE * cut.sequences * width * head
    if cut.kernels:
        return Op("scan", kept=u, own=first, forward=2 * first, backward=gy + 5 * u + 2 * first)
    wide, products, states = WIDE * n * width, WIDE * n * size * heads, WIDE * math.ceil(n / size) * width * head
    within = WIDE * heads * size * size * (1 if config.decay != "data" else math.ceil(n / size)) + (WIDE * n * size if cut.resets else 0)
    forward = within + 4 * wide + max(products, 2 * states, states + u) - u
    backward = gy + u + within + products + max(7 * wide + 3 * states + 3 * u, 8 * wide + 2 * states)
    return Op("scan", kept=u, own=first, forward=forward, backward=backward)


def attention(cut: Cut) -> list[Op]:
    """Softmax attention, from its norm to the stream behind it; fused, so that scores are kept nowhere."""
    model, config, n, e = cut.model, cut.model.attention, cut.tokens, cut.element
    width, gy = model.width // cut.tensor, cut.inner_bytes
    keys = width * config.num_kv_heads // config.num_heads
    u, k, wide = e * n * width, e * n * keys, WIDE * n * width
    pairs = cut.sequences * cut.chunk * cut.context * cut.chunk if cut.resets or cut.context > 1 else 0  # of a mask
    gathered = 2 * (cut.context - 1) * k
    tables = 4 * WIDE * cut.chunk * (model.width // config.num_heads) // 2  # cosines and sines, for queries and for keys
    return [
        norm("norms", cut, cut.stream, model.width),
        region("attention", cut),
        # Queries and keys are turned in new tensors; what they were is not needed again.
        column("attention", cut, keys, beside=gy + u + k),
        Op(
            "attention",
            kept=u + k + gathered + e * pairs,
            own=tables + (2 * cut.inner_bytes if cut.strided else 0),
            forward=3 * wide,
            backward=gy + u + 2 * k + 3 * wide,
            weights=e * model.width * (width + keys),
        ),
        Op("attention", own=u + WIDE * n * config.num_heads // cut.tensor, forward=pairs, backward=gy + 2 * u + 2 * k + 2 * gathered),
        Op("attention", kept=u, backward=gy + 2 * u),  # heads side by side again
        *leave("attention", cut, width),
    ]


def swiglu(cut: Cut) -> list[Op]:
    """The dense feed-forward layer, from its norm to the stream behind it."""
    return [norm("norms", cut, cut.stream, cut.model.width), *gated_unit("feed-forward", cut, cut.model.ffn_width // cut.tensor)]


def gated_unit(part: str, cut: Cut, hidden: int) -> list[Op]:
    """silu(W_up x) * (W_v x), and the product that leads out."""
    u, gy = cut.element * cut.tokens * hidden, cut.inner_bytes
    return [
        region(part, cut),
        column(part, cut, hidden, beside=gy),
        Op(part, kept=u, backward=gy + 2 * u),
        column(part, cut, hidden, beside=u),
        Op(part, kept=u, backward=3 * u),
        *leave(part, cut, hidden),
    ]
