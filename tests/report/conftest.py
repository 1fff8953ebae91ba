"""Real runs for the pages: one that was killed and went on, and one of another model without a price, under a name that HTML would stumble over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kan_train.accounting.ledger import read_ledger
from kan_train.config.compose import compose_train
from kan_train.engine.trainer import train

from .browser import Browser

STEPS, EVERY, TOKENS = 30, 5, 4 * 32
ODD = "a<b> & \"c\" 'd' %{y}"

SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=2", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.grove.num_groves=8", "model.grove.width=16", "train.global_batch_size=4", "train.micro_batch_size=2", f"train.steps={STEPS}",
    "train.validate_every=10", "train.validation_sequences=2", f"checkpoint.every={EVERY}", "optimizer.schedule.warmup_steps=2", "run.threads=1",
    "run.device=cpu", "cluster.peak_tflops=0.01",
)  # fmt: skip


TRAIN = [sys.executable, "-m", "kan_train", "train"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """A folder of runs, not to be changed: `first`, and ODD."""
    root = tmp_path_factory.mktemp("reported") / "runs"
    places = (f"data.root={corpora}", f"run.root={root}")
    first = (*SETTINGS, *places, "run.name=first", "accounting.price=3.6")
    _train_until_killed(first, root / "first" / "ledger.jsonl")
    again = subprocess.run([*TRAIN, *first], capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    other = compose_train([*SETTINGS, *places, "train.steps=12", "model.ffn=swiglu", "model.attention_pattern=1", "run.name=other"], [])
    other.run.name = ODD
    assert train(other).finished
    return root


def _train_until_killed(settings: tuple[str, ...], ledger: Path) -> None:
    """With SIGKILL, two steps or more after a save."""
    process = subprocess.Popen([*TRAIN, *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        events = read_ledger(ledger)
        saved = max((event["saved_step"] for event in events if event["event"] == "saved"), default=None)
        if saved is not None and events[-1]["step"] >= saved + 2:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"the run came to no save: {process.communicate(timeout=60)[0]}")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all pages."""
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def not_a_process_of_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        if name in os.environ:
            monkeypatch.delenv(name)
