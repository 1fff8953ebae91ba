"""How sparse a step was and how evenly its groves were loaded: measured on the global batch, beside what the configuration promises."""

from torch import Tensor

from kan_train.accounting.flops import executed_flops_share
from kan_train.accounting.lines import Row
from kan_train.config import ModelConfig


def grove_figures(model: ModelConfig, statistics: Tensor) -> Row:
    """Load balance and sparsity of a step from its routing statistics: fp32 [layers, 3N+1], summed over all ranks.

    A layer's row holds the tokens that chose each of the N groves, sums of scores and squared scores, and the tokens there were.

    load/cv/LAYER                  standard deviation over mean of the groves' token counts: 0 if all are chosen as often.
    sparsity/touched/LAYER         share of the groves that any token chose: the share of grove parameters that the batch touched.
    sparsity/nominal               1 - K/N.
    sparsity/executed_flops_share  forward FLOPs over those with all groves active, from the rows that were multiplied: those chosen
                                   or, under capacity_factor, capacity_factor * K a token (padding is multiplied, drops are not).
    """
    grove = model.grove
    counts = statistics[:, : grove.num_groves].double().cpu()
    tokens = statistics[:, -1].double().cpu()
    variation = counts.std(dim=1, correction=0) / counts.mean(dim=1).clamp(min=1e-12)
    touched = (counts > 0).double().mean(dim=1)
    chosen = float((counts.sum(dim=1) / tokens.clamp(min=1)).mean())
    active = grove.capacity_factor * grove.active_groves if grove.capacity_factor else chosen
    row: Row = {
        "sparsity/nominal": 1 - grove.active_groves / grove.num_groves,
        "sparsity/executed_flops_share": executed_flops_share(model, active),
    }
    for layer, (cv, share) in enumerate(zip(variation.tolist(), touched.tolist(), strict=True)):
        row[f"load/cv/{layer}"], row[f"sparsity/touched/{layer}"] = cv, share
    return row
