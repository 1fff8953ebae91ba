"""Floating-point operations of a model, from its configuration alone: the one owner of these facts.

Conventions, stated once:
- A multiply and its add are 2. Products of matrices count, and the convolutions and recurrences of ADA; elementwise work (norms, gates,
  activations with their splines, softmax, rotary positions, top-k, sorting) does not, nor does the embedding, which is a lookup.
- The backward pass of a product is two products, so backward = 2 * forward, and training = 3 * forward. What the backward pass computes
  again does not count: these are the model's FLOPs, the numerator of MFU.
- Per token, averaged over one training sequence of `sequence_length` tokens (documents inside it are not looked at).
- Only the K active groves of a token count, without padding or drops of the capacity mode.
- counting="executed": masked products as they are computed, in full: T x T scores in softmax attention, C x C in the chunks of ADA.
  counting="ideal": the part of softmax scores below the diagonal, and ADA as a recurrence, 4 d^2 a token and head.
  A published "6 N + 12 L D T" is the first; quote the convention wherever a share of a peak is quoted.

Letters as in docs/model.md: D width, T sequence, H heads, d head width, C chunk, w taps, N groves, K active, M grove width, r scoring rank.
"""

from dataclasses import dataclass

from kan_train.config import ModelConfig
from kan_train.config.errors import require_choice
from kan_train.config.model import EdgeConfig

COUNTINGS = ("executed", "ideal")


@dataclass(frozen=True)
class FlopCount:
    """FLOPs a token."""

    forward: float
    """Of the forward pass."""
    backward: float
    """Of the backward pass, without recomputation."""
    training: float
    """Of both."""
    by_part: dict[str, float]
    """The forward pass by part, summed over the layers; only parts that the model has."""


def flops_per_token(model: ModelConfig, *, counting: str = "executed") -> FlopCount:
    """FLOPs a token of `model`, see the conventions above; ConfigError for an unknown `counting`."""
    require_choice("counting", counting, COUNTINGS)
    by_part: dict[str, float] = {"embedding": 0.0}
    for layer in range(model.num_layers):
        mixer = _attention(model, counting) if model.is_softmax_layer(layer) else _ada(model, counting)
        for part, flops in (mixer | _feed_forward(model)).items():
            by_part[part] = by_part.get(part, 0.0) + flops
    by_part["head"] = 2.0 * model.width * model.vocab_size
    forward = sum(by_part.values())
    return FlopCount(forward=forward, backward=2 * forward, training=3 * forward, by_part=by_part)


def layer_flops(model: ModelConfig) -> list[float]:
    """Forward FLOPs a token of each block, the head's with the last one: what a pipeline balances."""
    flops = []
    for layer in range(model.num_layers):
        mixer = _attention(model, "executed") if model.is_softmax_layer(layer) else _ada(model, "executed")
        flops.append(sum(mixer.values()) + sum(_feed_forward(model).values()))
    flops[-1] += 2.0 * model.width * model.vocab_size
    return flops


def ideal_ratio(model: ModelConfig, twin: ModelConfig, *, counting: str = "executed") -> float:
    """How many times the training FLOPs of `model` its `twin` needs for the same tokens: the speed-up if both ran at equal FLOP/s."""
    return flops_per_token(twin, counting=counting).training / flops_per_token(model, counting=counting).training


def executed_flops_share(model: ModelConfig, active_groves: float | None = None) -> float:
    """Forward FLOPs over those of the same model with all N groves active; 1 for a dense model.

    active_groves: groves run a token, as measured (rows multiplied / tokens: padding adds, drops subtract); K if not given.
    """
    if model.ffn != "kalmagrove":
        return 1.0
    count = flops_per_token(model)
    groves = count.by_part["groves"]
    one = groves / model.grove.active_groves
    rest = count.forward - groves
    active = model.grove.active_groves if active_groves is None else active_groves
    return (rest + one * active) / (rest + one * model.grove.num_groves)


def parameter_counts(model: ModelConfig) -> tuple[int, int]:
    """(total, active) parameters, from the table of the model on the meta device; active counts K of the N groves."""
    from kan_train.model.lm import count_parameters  # imports torch, which the counts above do not need

    return count_parameters(model)


def _ada(model: ModelConfig, counting: str) -> dict[str, float]:
    ada, width, head_width = model.ada, model.width, model.head_width
    projections = 5 if ada.output_gate else 4
    per_head_rate = 2 * width * ada.num_heads if ada.decay == "data" else 0
    tap_flops = 2 * width * ada.conv_width if ada.conv_width > 1 else 0
    exponential_flops = 4 * width * ada.mixture  # one multiply-add for the recurrence, one for the sum
    state = 4 * width * head_width  # k v^T and S^T q
    within = 0.0 if counting == "ideal" else 4 * width * _masked_entries(model.sequence_length, ada.chunk) / model.sequence_length
    return {
        "ada_projections": float(2 * width * width * projections + per_head_rate),
        "ada_conv": float(tap_flops + exponential_flops),
        "ada_scan": state + within,
    }


def _masked_entries(tokens: int, chunk: int) -> float:
    """Entries of the masked products of a sequence: the sum over its chunks of their squared lengths."""
    whole, rest = divmod(tokens, chunk)
    return float(whole * chunk**2 + rest**2)


def _attention(model: ModelConfig, counting: str) -> dict[str, float]:
    width, attention = model.width, model.attention
    key_width = width // attention.num_heads * attention.num_kv_heads
    seen = model.sequence_length if counting == "executed" else (model.sequence_length + 1) / 2
    return {
        "attention_projections": float(2 * width * (2 * width + 2 * key_width)),
        "attention_scores": 4.0 * width * seen,  # q k^T and the weighted sum of v, over all query heads
    }


def _feed_forward(model: ModelConfig) -> dict[str, float]:
    width, grove = model.width, model.grove
    if model.ffn == "swiglu":
        return {"ffn": 6.0 * width * model.ffn_width}
    parts = {"groves": float(grove.active_groves * _grove(model))}
    if grove.score == "norm":
        parts["scoring"] = 2.0 * grove.num_groves * grove.score_rank * width
        parts["gate"] = 2.0 * grove.num_groves * width
    else:
        parts["scoring"] = 2.0 * grove.num_groves * width
    if grove.shared_width:
        parts["shared_grove"] = 6.0 * width * grove.shared_width
    return parts


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

