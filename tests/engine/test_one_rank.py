"""DeepSpeed on one rank is a layout like any other: it trains the model that plain PyTorch trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def seen() -> dict:
    # In a process of its own: DeepSpeed and Megatron change what they are imported into.
    done = subprocess.run([sys.executable, Path(__file__).with_name("one_rank.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["0", "1", "2", "3", "offload"])
def test_zero_on_one_rank_agrees_with_plain_pytorch(seen, case):
    plain, zero = seen["plain"], seen[case]
    assert (plain["engine"], zero["engine"]) == ("PlainEngine", "ZeroEngine")
    assert min(plain["norms"]) > 0.5  # every step is clipped
    assert zero["losses"] == pytest.approx(plain["losses"], rel=5e-7)
    assert zero["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert zero["heldout"] == pytest.approx(plain["heldout"], rel=1e-6)
    assert (zero["written"], zero["elements"]) == (plain["written"], plain["elements"])


def test_bf16_in_one_process_goes_through_deepspeed_and_stays_near_fp32(seen):
    plain, bf16 = seen["plain"], seen["bf16"]
    assert bf16["engine"] == "ZeroEngine"
    assert bf16["losses"] == pytest.approx(plain["losses"], rel=3e-3)
    assert bf16["losses"] != plain["losses"]
    assert (bf16["written"], bf16["elements"]) == (plain["written"], plain["elements"])
