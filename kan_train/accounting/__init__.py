"""What a run costs: FLOPs of a model, peaks of devices, the ledger of events, and the sinks that metrics go to."""

from kan_train.accounting.flops import FlopCount, Flops, executed_flops_share, flops_per_token, ideal_ratio, parameter_counts
from kan_train.accounting.peaks import Peak, known_peak_flops, peak_flops

__all__ = [
    "FlopCount", "Flops", "Peak", "executed_flops_share", "flops_per_token", "ideal_ratio", "known_peak_flops", "parameter_counts", "peak_flops",
]  # fmt: skip
