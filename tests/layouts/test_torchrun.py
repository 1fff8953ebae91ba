"""The command itself under torchrun: `torchrun --nproc-per-node 2 -m kan_train train model=kan_tiny parallel.zero_stage=N`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from kan_train.checkpoint import Fragment, weights_checksum
from kan_train.config import CorpusConfig, PrepareConfig, TokenizerConfig
from kan_train.config.compose import compose_train
from kan_train.data import open_training_data
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

pytestmark = pytest.mark.slow

SETTINGS = (
    "model=kan_tiny", "model.sequence_length=128", "model.vocab_size=512", "model.grove.balance_rate_final=0.01", "~data.blend.stdlib",
    "+data.blend.tiny=1.0", "train.global_batch_size=8", "train.micro_batch_size=2", "train.validate_every=0", "optimizer.clip_norm=0.5",
    "optimizer.schedule.kind=constant", "optimizer.schedule.warmup_steps=2", "run.seed=12", "run.device=cpu", "run.threads=1",
)  # fmt: skip
# The seed is one whose routing has no near-tie: in these four steps the K-th and the next score are never closer than 8.6e-5, where most seeds come
# within 1e-5 of a tie. A tie that rounding breaks the other way sends a token to another grove, and the runs part by 1e-4 or more.
LOSS, NORM = 5e-6, 1e-4
"""Relative bounds of fp32 against float64; one process in fp32 is 7e-7 and 3e-5 away."""
RATES = [6e-3 / 3, 6e-3 * 2 / 3, 6e-3, 6e-3]
"""Linear warm-up over two steps, then constant, of the default optimizer.learning_rate."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared corpora with one of them, "tiny"."""
    from kan_train.data_tools.commands import run_prepare

    texts, root = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("corpora")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        drawn = torch.randint(0, len(words), (300,), generator=generator).tolist()
        (texts / f"{number}.txt").write_text(" ".join(f"{words[index]}{number % 7}" for index in drawn))
    corpus = CorpusConfig(kind="directory", name="tiny", path=str(texts))
    run_prepare(PrepareConfig(root=str(root), corpus=corpus, tokenizer=TokenizerConfig(vocab_size=320), heldout=0.2, workers=1))
    return root


def torchrun(corpora: Path, root: Path, *overrides: str) -> subprocess.Popen:
    """Start the command on two processes; torchrun meets them at a free port of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "kan_train", "train", *SETTINGS, f"data.root={corpora}", f"run.root={root}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (root / "output.txt").open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=root)


def finish(process: subprocess.Popen, root: Path) -> int:
    try:
        return process.wait(timeout=300)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        print((root / "output.txt").read_text()[-4000:])


def rows(root: Path, name: str) -> list[dict]:
    path = root / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in lines if "grad_norm" in row]


@pytest.fixture(scope="module")
def expected(corpora: Path, oracle):
    """The oracle on the global batches that the loader reads."""
    config = compose_train([*SETTINGS, f"data.root={corpora}", "train.steps=4"], [], world_size=2)
    model = config.model
    data = open_training_data(config.data, sequence_length=model.sequence_length, seed=12, vocab_size=model.vocab_size)
    loader = data.loader(8, 8, rank=0, world_size=1)
    batches = [loader.next_step()[0] for _ in RATES]
    loader.close()
    steps = [(torch.cat((batch.tokens, batch.targets[:, -1:]), dim=1), batch.resets) for batch in batches]
    return oracle.train(model, steps, RATES, seed=12, clip=0.5, balance_rate=0.01)


@pytest.fixture(scope="module")
def initial_checksum(corpora: Path) -> str:
    """Of the weights that one process starts from."""
    config = compose_train([*SETTINGS, f"data.root={corpora}"], [], world_size=2)
    model = materialise(LanguageModel(config.model), seed=12)
    fragments = [Fragment.whole(f"param/{name}", parameter) for name, parameter in model.named_parameters()]
    return weights_checksum(fragments, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, lambda sums: sums)


LAYOUTS = {
    **{f"zero{stage}": (f"parallel.zero_stage={stage}",) for stage in range(4)},
    "tensor and expert": ("parallel.tensor_parallel=2", "parallel.expert_parallel=2"),
    "context": ("parallel.context_parallel=2", "parallel.zero_stage=3"),
    "interleaved pipeline": ("parallel.pipeline_parallel=2", "parallel.virtual_pipeline=2", "parallel.zero_stage=2", "parallel.stage_layers=[1,1,1,1]"),
}
"""Every process of a layout is started by the command here; the matrix of layouts (test_matrix.py) has many more."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_losses_and_norms_of_one_process(name, corpora, expected, initial_checksum, tmp_path):
    overrides = (*LAYOUTS[name], "train.steps=4", "run.name=run")
    assert finish(torchrun(corpora, tmp_path, *overrides), tmp_path) == 0
    found = rows(tmp_path, "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in found] == pytest.approx(RATES)
    assert [row["loss"] for row in found] == pytest.approx(expected.losses, rel=LOSS)
    assert [row["grad_norm"] for row in found] == pytest.approx(expected.norms, rel=NORM)
    assert min(expected.norms) > 0.6  # clipping was active
    events = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [event["checksum"] for event in events if event["event"] == "weights"] == [initial_checksum]


@pytest.mark.parametrize("name", ["tensor and expert", "interleaved pipeline"])
def test_terminated_and_started_again_equals_uninterrupted_bit_for_bit(name, corpora, tmp_path):
    """SIGTERM to torchrun: both processes finish their step, save together and leave; the same command goes on."""
    overrides = (*LAYOUTS[name], "train.steps=40", "checkpoint.every=0")
    assert finish(torchrun(corpora, tmp_path, *overrides, "run.name=whole"), tmp_path) == 0
    first = torchrun(corpora, tmp_path, *overrides, "run.name=again")
    deadline = time.monotonic() + 240
    while len(rows(tmp_path, "again")) < 3 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert finish(first, tmp_path) != 0
    stopped = len(rows(tmp_path, "again"))
    assert 3 <= stopped < 40
    assert (tmp_path / "again" / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()
    assert finish(torchrun(corpora, tmp_path, *overrides, "run.name=again"), tmp_path) == 0
    whole, again = rows(tmp_path, "whole"), rows(tmp_path, "again")
    for key in ("step", "tokens", "loss", "grad_norm", "learning_rate"):
        assert [row[key] for row in again] == [row[key] for row in whole]
    assert [row["segment"] for row in again] == [1] * stopped + [2] * (40 - stopped)


def test_a_process_that_stops_answering_is_named_and_the_run_goes_on_from_its_checkpoint(corpora, tmp_path):
    """SIGSTOP to rank 1, as a node that hangs: rank 0 waits in a collective, says for whom, and leaves; the same command goes on."""
    overrides = ("parallel.zero_stage=1", "train.steps=12", "checkpoint.every=2", "recovery.hang_minutes=0.05", "run.name=hung")
    first = torchrun(corpora, tmp_path, *overrides)
    deadline = time.monotonic() + 240
    while len(rows(tmp_path, "hung")) < 4 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    workers = {process.environ()["RANK"]: process for process in psutil.Process(first.pid).children(recursive=True) if "RANK" in process.environ()}
    workers["1"].suspend()
    reports = tmp_path / "hung" / "hangs"
    while not list(reports.glob("*/report.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        workers["0"].wait(60)
    finally:
        workers["1"].kill()  # a launcher would after a while
    assert finish(first, tmp_path) != 0
    report = json.loads(next(reports.glob("*/report.json")).read_text())
    assert report["silent"] == [1]
    assert [entry["rank"] for entry in report["did_not_arrive"]] == [1]
    assert "all_reduce" in json.dumps(report["collectives"])
    assert "HANG" in (tmp_path / "output.txt").read_text()
    assert finish(torchrun(corpora, tmp_path, *overrides), tmp_path) == 0
    events = [json.loads(line) for line in (tmp_path / "hung" / "ledger.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["segment"] == 1][-1] == "hang"
    (restart,) = [event for event in events if event["event"] == "restart"]
    assert (restart["previous_status"], restart["lost_steps"] <= 2) == ("hung", True)
    assert rows(tmp_path, "hung")[-1]["step"] == 12
