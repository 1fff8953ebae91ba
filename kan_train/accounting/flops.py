"""Floating-point operations of a model, from its configuration alone: the one owner of these facts.

Conventions, stated once:
- A multiply and its add are 2. Products of matrices count, and the convolutions and recurrences of ADA; elementwise work (norms, gates,
  activations with their splines, softmax, rotary positions, top-k, sorting, the optimizer) does not, nor does the embedding, which is a lookup.
- Model FLOPs, the numerator of MFU: what the mathematics needs, once. The backward pass of a product is two products; the scoring of all groves has
  none, because its gradient is taken for the chosen groves alone. Only the K active groves of a token count, without padding.
- Executed FLOPs, the numerator of HFU: what runs. Besides the model's that is z of the chosen groves, projected again for its gradient; masked products
  and states of ADA, and scores of softmax attention, which the backward pass computes again (fused attention does, as it runs on CPUs and GPUs); padding
  under capacity_factor; and, under activation checkpointing, every block's forward pass once more, without the scoring (the choice is replayed) and
  without a last product of which the backward pass needs nothing.
- Per token, averaged over one training sequence of `sequence_length` tokens (documents inside it are not looked at).
- counting="full": masked products in full: T x T scores in softmax attention, C x C in the chunks of ADA.
  counting="causal": what a token may see: softmax scores up to the diagonal, and ADA as a recurrence, 4 d^2 a token and head, since
  its chunk is a choice: a longer one must not look like more work done (the chunks' products still count as executed).
  A published "6 N + 12 L D T" is the first; name the counting wherever a share of a peak is quoted.

The full counting is proved against the products that plain torch dispatches (tests/accounting/test_flops_reference.py): equal for every shipped model,
but for the convolution and mixture of ADA, which run elementwise, and for what counts as elementwise here and runs as products, under 0.1% of them:
coefficients of splines into cells, once a micro-batch, and powers into basis functions in edge groves. Context parallelism adds the
last state of every chunk, 6 D d of forward and backward, which is not counted.

Letters as in docs/model.md: D width, T sequence, H heads, d head width, C chunk, w taps, N groves, K active, M grove width, r scoring rank.
"""

from dataclasses import dataclass

from kan_train.config import ModelConfig
from kan_train.config.errors import require_choice
from kan_train.config.model import EdgeConfig

COUNTINGS = ("full", "causal")


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, of a part of a layer or of several."""

    forward: float = 0.0
    """Of the model's forward pass."""
    backward: float = 0.0
    """Of the model's backward pass."""
    extra_forward: float = 0.0
    """Run in the forward pass besides those: done twice, or for rows of padding."""
    extra_backward: float = 0.0
    """Run in the backward pass besides those, also without activation checkpointing."""
    recomputed: float = 0.0
    """Run once more under activation checkpointing."""

    @property
    def training(self) -> float:
        """Model FLOPs of forward and backward pass."""
        return self.forward + self.backward

    def executed(self, *, activation_checkpointing: bool = False) -> float:
        """All that run in training, the optimizer apart."""
        run = self.training + self.extra_forward + self.extra_backward
        return run + self.recomputed if activation_checkpointing else run

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class FlopCount:
    """FLOPs a token of a model."""

    layers: tuple[dict[str, Flops], ...]
    """Each block by part; only parts that it has."""
    head: Flops
    """Of the product with the vocabulary."""

    def layer(self, number: int) -> Flops:
        """Block `number`, from 0."""
        return sum(self.layers[number].values(), Flops())

    @property
    def total(self) -> Flops:
        """Of all blocks and the head."""
        return sum((self.layer(number) for number in range(len(self.layers))), self.head)

    @property
    def forward(self) -> float:
        """Model FLOPs of the forward pass."""
        return self.total.forward

    @property
    def backward(self) -> float:
        """Model FLOPs of the backward pass."""
        return self.total.backward

    @property
    def training(self) -> float:
        """Model FLOPs of both: the numerator of MFU."""
        return self.total.training

    def executed(self, *, activation_checkpointing: bool = False) -> float:
        """FLOPs that run in training: the numerator of HFU."""
        return self.total.executed(activation_checkpointing=activation_checkpointing)

    @property
    def by_part(self) -> dict[str, float]:
        """Model FLOPs of the forward pass by part, summed over the blocks; with the head."""
        parts: dict[str, float] = {}
        for layer in self.layers:
            for name, flops in layer.items():
                parts[name] = parts.get(name, 0.0) + flops.forward
        return parts | {"head": self.head.forward}


def flops_per_token(model: ModelConfig, *, counting: str = "full") -> FlopCount:
    """FLOPs a token of `model`, see the conventions above; ConfigError for an unknown `counting`."""
    require_choice("counting", counting, COUNTINGS)
    feed_forward = _feed_forward(model)
    mixers = {softmax: _attention(model, counting) if softmax else _ada(model, counting) for softmax in (False, True)}
    layers = tuple(mixers[model.is_softmax_layer(layer)] | feed_forward for layer in range(model.num_layers))
    # The logits' gradients are taken as they are made: nothing of the head is computed twice, with activation checkpointing or without.
    return FlopCount(layers, _product(2 * model.width * model.vocab_size, kept=True))


def layer_flops(model: ModelConfig) -> list[float]:
    """Forward FLOPs a token of each block, the head's with the last one: what a pipeline balances."""
    count = flops_per_token(model)
    flops = [count.layer(layer).forward for layer in range(model.num_layers)]
    flops[-1] += count.head.forward
    return flops


def ideal_ratio(model: ModelConfig, twin: ModelConfig, *, counting: str = "full") -> float:
    """How many times the training FLOPs of `model` its `twin` needs for the same tokens: the speed-up if both ran at equal FLOP/s."""
    return flops_per_token(twin, counting=counting).training / flops_per_token(model, counting=counting).training


def executed_flops_share(model: ModelConfig, active_groves: float | None = None) -> float:
    """Forward FLOPs over those of the same model with all N groves active; 1 for a model without groves to choose.

    active_groves: groves run a token, as measured (rows multiplied / tokens: padding adds, drops subtract); K if not given.
    """
    if not model.has_groves:
        return 1.0
    count = flops_per_token(model)
    # The count of the groves is without what a capacity drops, and so is no multiple of one.
    one = count.by_part["projection"] / model.grove.active_groves + len(count.layers) * _grove(model)
    rest = count.forward - count.by_part["projection"] - count.by_part["groves"]
    active = model.grove.active_groves if active_groves is None else active_groves
    return (rest + one * active) / (rest + one * model.grove.num_groves)


def parameter_counts(model: ModelConfig) -> tuple[int, int]:
    """(total, active) parameters, from the table of the model on the meta device; active counts K of the N groves."""
    from kan_train.model.lm import count_parameters  # imports torch, which the counts above do not need

    return count_parameters(model)


def _product(forward: float, *, kept: bool = False, extra_backward: float = 0.0) -> Flops:
    """A product of weights with activations, or of two activations; `kept`: activation checkpointing does not run it again."""
    return Flops(float(forward), 2.0 * forward, 0.0, float(extra_backward), 0.0 if kept else float(forward))


def _ada(model: ModelConfig, counting: str) -> dict[str, Flops]:
    ada, width, head_width = model.ada, model.width, model.head_width
    projections = 5 if ada.output_gate else 4
    per_head_rate = 2 * width * ada.num_heads if ada.decay == "data" else 0
    tap_flops = 2 * width * ada.conv_width if ada.conv_width > 1 else 0
    exponential_flops = 4 * width * ada.mixture  # one multiply-add for the recurrence, one for the sum
    state = 4 * width * head_width  # k v^T and S^T q
    within = 4 * width * _masked_entries(model.sequence_length, ada.chunk) / model.sequence_length  # q k^T, and what it weighs of v
    scan = _product(state + within, extra_backward=(state + within) / 2)  # k v^T and q k^T again
    if counting == "causal":
        scan = Flops(state, 2.0 * state, within, scan.extra_backward + 2 * within, scan.recomputed)
    return {
        "ada_projections": _product(2 * width * width * projections + per_head_rate),
        "ada_conv": _product(tap_flops + exponential_flops),
        "ada_scan": scan,
    }


def _masked_entries(tokens: int, chunk: int) -> float:
    """Entries of the masked products of a sequence: the sum over its chunks of their squared lengths."""
    whole, rest = divmod(tokens, chunk)
    return float(whole * chunk**2 + rest**2)


def _attention(model: ModelConfig, counting: str) -> dict[str, Flops]:
    width, attention = model.width, model.attention
    inner, key_width = model.attention_head_width * attention.num_heads, model.attention_head_width * attention.num_kv_heads
    seen = model.sequence_length if counting == "full" else (model.sequence_length + 1) / 2
    return {
        "attention_projections": _product(2 * width * (2 * inner + 2 * key_width)),
        # q k^T and the weighted sum of v, over all query heads; the first again in the backward pass.
        "attention_scores": _product(4 * inner * seen, extra_backward=2 * inner * seen),
    }


def _feed_forward(model: ModelConfig) -> dict[str, Flops]:
    width, grove = model.width, model.grove
    if model.ffn == "swiglu":
        return {"ffn": _gated_unit(width, model.ffn_width)}
    if not model.has_groves:
        return {"shared_grove": _gated_unit(width, grove.shared_width)}
    scoring = 2.0 * grove.num_groves * width * (grove.score_rank if grove.score == "norm" else 1)
    parts = {"scoring": Flops(forward=scoring), "projection": _projection(model), "groves": _groves(model)}
    if grove.auxiliary_loss:
        # Scores of all groves, this time with a gradient.
        parts["auxiliary_loss"] = Flops(0.0, 2 * scoring, scoring, 0.0, scoring)
    if grove.shared_width:
        parts["shared_grove"] = _gated_unit(width, grove.shared_width)
    return parts


def _gated_unit(width: int, hidden: int) -> Flops:
    """Three matrices. The last one is the last product of its block: checkpointing stops before it, once its inputs are there."""
    both = 4.0 * width * hidden
    return Flops(1.5 * both, 3 * both, recomputed=both)


def _projection(model: ModelConfig) -> Flops:
    """w . x and z = E x of the chosen groves: what has a gradient. The scoring has z already, and does not keep it; the linear score is w . x itself."""
    grove, row = model.grove, 2.0 * model.width * model.grove.active_groves
    again = row * (grove.score_rank if grove.score == "norm" else 1)
    gate = row if grove.score == "norm" else 0.0
    return Flops(gate, 2 * (gate + again), extra_forward=again, recomputed=gate + again)


def _groves(model: ModelConfig) -> Flops:
    """The K chosen groves of a token. Under a capacity as many rows run as there is room for: more are padding, fewer are dropped choices."""
    grove, one = model.grove, float(_grove(model))
    run = one * grove.active_groves * (grove.capacity_factor or 1.0)
    needed = min(run, one * grove.active_groves)
    return Flops(needed, 2 * needed, run - needed, 2 * (run - needed), run)


def _grove(model: ModelConfig) -> int:
    """One token through one grove."""
    grove, width = model.grove, model.width
    match grove.kind:
        case "gated":
            return 6 * width * grove.width
        case "reuse":
            return 2 * grove.score_rank * grove.width + 4 * width * grove.width
        case _:
            edges = grove.score_rank * grove.width
            return 2 * edges * (1 + _edge_basis(grove.edge)) + 2 * grove.width * width


def _edge_basis(edge: EdgeConfig) -> int:
    from kan_train.model.edge import coefficients_of

    return coefficients_of(edge)
