"""Learning rate as a pure function of the step: a resumed run needs no state to go on exactly.

Step n counts from 0: the factor at step n is used by the (n+1)-th optimizer step. Warm-up rises linearly from 0 and reaches the peak at
step `warmup_steps`; the decay ends at `final_fraction` of the peak at step `steps - 1`, the last one.
"""

import math

from kan_train.config import GroveConfig, ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate at `step` (from 0) of a run of `steps`, as a share of the peak.

    cosine: f + (1 - f) (1 + cos(pi u)) / 2, with u from 0 at the end of the warm-up to 1 at the last step and f = final_fraction.
    wsd: 1 until the last round(decay_fraction * steps) steps, then linear to f. Before the decay nothing depends on `steps`, so that a
    branch of any length may start from a checkpoint of the stable part.
    constant: 1.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    last, final = steps - 1, schedule.final_fraction
    if schedule.kind == "constant":
        return 1.0
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, last - round(schedule.decay_fraction * steps))
    if step <= start:
        return 1.0
    done = min(1.0, (step - start) / (last - start)) if last > start else 1.0
    if schedule.kind == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    return 1 - (1 - final) * done


def balance_rate(grove: GroveConfig, step: int, steps: int) -> float:
    """Rate of the selection bias at `step` (from 0): linear from balance_rate to balance_rate_final (docs/model.md, section 2)."""
    done = min(1.0, step / (steps - 1)) if steps > 1 else 0.0
    return grove.balance_rate + (grove.balance_rate_final - grove.balance_rate) * done
