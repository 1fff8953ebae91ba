"""Rows of ledgers and of launchers' events, and what holds for every account: shared by the tests of accounts."""

import json
from typing import Any

from kan_train.accounting.account import Account, account_as_json

TOKENS = 100  # of a step
T0 = 1.8e9


def row(kind: str, elapsed: float, segment: int = 1, *, world_size: int = 2, begun: float = T0, **fields: Any) -> dict[str, Any]:
    where = {"world_size": world_size, "device": "NVIDIA H200", "host": "node1", "pid": 3}
    return {"event": kind, "time": begun + elapsed, "elapsed": elapsed, "segment": segment, "step": 0, "tokens": 0, **where, **fields}


def attempt(kind: str, time: float, restart: int = 0, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, "job": 1, "scheduler": "slurm", "job_id": "7", "restart": restart, **fields}


def check_invariants(account: Account) -> None:
    for start in account.starts:
        assert sum(start.buckets.values()) == start.seconds, "to the last bit"
        assert min(start.buckets.values()) >= 0
    assert sum(account.buckets.values()) == account.device_seconds
    told = json.loads(json.dumps(account_as_json(account)))
    assert sum(told["buckets"].values()) == told["device_seconds"]
    assert sum(start["device_seconds"] for start in told["starts"]) == told["device_seconds"]
    assert 0 <= account.tokens_retained <= account.tokens_processed


def seconds_of(account: Account) -> dict[str, float]:
    """Device-seconds of the buckets that have any, to the millisecond."""
    return {bucket: round(seconds, 3) for bucket, seconds in account.buckets.items() if seconds > 5e-4}
