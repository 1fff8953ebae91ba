"""A budget ends a run in time, saved, and a larger one lets it go on as if nothing had been: real trainings, alone, on two ranks and under a launcher."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from free_ports import free_port

from kan_train.accounting import ledger as ledger_module
from kan_train.accounting.account import read_account
from kan_train.accounting.budget import LEAVING_SECONDS
from kan_train.accounting.energy import EVERY, Counter
from kan_train.accounting.forecast import LEAST_STEPS
from kan_train.accounting.ledger import read_ledger
from kan_train.accounting.money import cost_of
from kan_train.accounting.sinks.jsonl import read_metrics
from kan_train.checkpoint import load_tensors, newest
from kan_train.config import Config, ConfigError
from kan_train.config.compose import compose_train
from kan_train.engine import run as run_module
from kan_train.engine import saving as saving_module
from kan_train.engine import trainer
from kan_train.engine import validation as validation_module
from kan_train.engine.exits import EXIT_BUDGET
from kan_train.engine.plain import PlainEngine
from kan_train.engine.trainer import train
from kan_train.launch.attempts import read_events

SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=2", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.grove.num_groves=8", "model.grove.width=16", "train.global_batch_size=4", "train.micro_batch_size=2", "train.validation_sequences=2",
    "train.validate_every=0", "checkpoint.every=4", "optimizer.schedule.warmup_steps=2", "run.threads=1", "run.device=cpu", "run.name=first",
)  # fmt: skip
STEPS = 30
STEP_SECONDS, EVALUATION_SECONDS, WRITING_SECONDS = 100.0, 60.0, 250.0
"""Of the clock of these tests: so long that what the machine really takes, for a save say, is nothing beside it."""


class Clock:
    """Stands still but in a training step, and in the evaluation of a portion of held-out batches; where a test asks for it, elsewhere too."""

    def __init__(self) -> None:
        self.now = 0.0

    def advancing(self, seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, which takes so long."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return work(*arguments, **named)

        return timed


class Late:
    """A thread that does its work when somebody waits for it: a background that is as slow as it can be."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], **named: Any) -> None:
        self._work = partial(target, *args)

    def start(self) -> None:
        pass

    def join(self) -> None:
        self._work()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock):
    """make(overrides): a run's configuration."""
    times = SimpleNamespace(time=lambda: 1.8e9 + clock.now, monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    for module in (ledger_module, run_module, validation_module):
        monkeypatch.setattr(module, "time", times)
    monkeypatch.setattr(ledger_module, "_paid_until", 0.0)
    monkeypatch.setattr(ledger_module, "_process_seconds", lambda: 0.0)
    monkeypatch.setattr(PlainEngine, "train_step", clock.advancing(STEP_SECONDS, PlainEngine.train_step))
    monkeypatch.setattr(PlainEngine, "evaluate", clock.advancing(EVALUATION_SECONDS, PlainEngine.evaluate))

    def made(*overrides: str, name: str = "first") -> Config:
        return compose_train([*SETTINGS, f"train.steps={STEPS}", f"data.root={corpora}", f"run.root={tmp_path / name}", *overrides], [])

    return made


def figures(root: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(root / "first" / "metrics.jsonl")]


def refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a start says that is refused before it reads a checkpoint."""

    def too_early(config: Config) -> None:
        raise AssertionError("a checkpoint was looked for")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "starting_point", too_early)
        with pytest.raises(ConfigError) as error:
            train(config)
    return str(error.value)


@pytest.mark.parametrize(("price", "setting"), [("3600", "budget_usd"), (None, "budget_hours")])
def test_a_run_stops_within_its_budget_and_a_larger_one_goes_on_bit_for_bit(price, setting, make, tmp_path, monkeypatch, capsys):
    priced = () if price is None else (f"accounting.price={price}",)
    assert train(make(*priced, name="whole")).finished
    cap = 1650.0 if price else 1650 / 3600  # a dollar is a second
    limited = make(*priced, f"accounting.{setting}={cap}")
    result = train(limited)
    # One step more, a save and the way out would cross it.
    assert (result.finished, result.exit_code, result.steps) == (False, EXIT_BUDGET, 16)
    run = tmp_path / "first" / "first"
    account = read_account(run)
    assert account.starts[0].status == "interrupted"
    assert (cost_of(account).total if price else account.device_seconds) == pytest.approx(1600)
    assert newest(run / "checkpoints").name.endswith(str(result.steps))
    warned, stopped = [event for event in read_ledger(run / "ledger.jsonl") if event["event"] == "budget"]
    assert (warned["kind"], stopped["kind"]) == ("warned", "stopped")
    assert {event["setting"] for event in (warned, stopped)} == {f"accounting.{setting}"}
    assert (stopped["cap"], stopped["step"]) == (cap, 16)
    assert warned["step"] == 1 + LEAST_STEPS, "as soon as there is a forecast"
    assert warned["forecast"] * 1650 / cap == pytest.approx(3000, rel=0.01)
    said = capsys.readouterr().err
    assert said.count("the run will cost") == 1
    assert re.search(rf"kan: accounting\.{setting}=\S+ is used up: .* is saved at step 16 of {STEPS}\n", said)

    told = refused(limited, monkeypatch)
    working = re.search(rf"accounting\.{setting}=\S+ is used up: .* use accounting\.{setting}=(\S+) to go on", told)
    assert working, told
    again = train(make(*priced, f"accounting.{setting}={working[1]}"))
    assert again.finished, "the value that was told works"
    assert figures(tmp_path / "first") == figures(tmp_path / "whole")
    ends = [load_tensors(newest(tmp_path / name / "first" / "checkpoints"), prefix="") for name in ("first", "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert train(limited).finished, "a run that has finished is not refused"


def test_what_is_being_written_is_waited_for_within_the_budget(make, clock, tmp_path, monkeypatch):
    """Leaving takes two saves: that in flight, and another one of the steps since."""
    monkeypatch.setattr(saving_module, "save", clock.advancing(WRITING_SECONDS, saving_module.save))
    monkeypatch.setattr(saving_module, "threading", SimpleNamespace(Thread=Late))
    monkeypatch.setattr(saving_module, "time", run_module.time)
    cap = 3000.0
    result = train(make(f"accounting.budget_hours={cap / 3600}"))
    run = tmp_path / "first" / "first"
    assert result.exit_code == EXIT_BUDGET
    assert newest(run / "checkpoints").name.endswith(str(result.steps))
    spent = read_account(run).device_seconds
    assert cap - STEP_SECONDS - WRITING_SECONDS - LEAVING_SECONDS <= spent <= cap
    assert result.steps % 4, "a save was in flight, of an earlier step"


def test_a_run_that_is_stopped_tells_of_the_energy_of_its_steps_alone(make, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "counters_of", lambda runtime: [Counter(lambda: 3.0 * clock.now)])  # of three watts
    monkeypatch.setattr(run_module.Run, "_report_weights", clock.advancing(70.0, run_module.Run._report_weights))
    result = train(make(f"accounting.budget_hours={1720 / 3600}"))
    assert result.exit_code == EXIT_BUDGET
    assert result.steps % EVERY, "some were not told yet"
    events = read_ledger(tmp_path / "first" / "first" / "ledger.jsonl")
    assert sum(event.get("joules", 0.0) for event in events) == pytest.approx(3.0 * STEP_SECONDS * result.steps)


def test_rows_tell_of_the_forecast_and_of_what_is_left(make, tmp_path):
    assert train(make("accounting.price=1", "accounting.budget_usd=100", "accounting.budget_hours=1")).finished
    rows = read_metrics(tmp_path / "first" / "first" / "metrics.jsonl")
    for row in rows:
        assert row["cost/budget_left_usd"] == pytest.approx(100 - row["cost/spent_usd"])
        assert row["cost/budget_left_hours"] == pytest.approx(1 - row["cost/device_hours"])
    told = [row for row in rows if "cost/forecast_usd" in row]
    assert [row["step"] for row in told] == list(range(1 + LEAST_STEPS, STEPS + 1))
    for row in told:
        assert row["cost/forecast_usd_low"] <= row["cost/forecast_usd"] <= row["cost/forecast_usd_high"]
        assert row["cost/forecast_hours"] == pytest.approx(row["cost/forecast_usd"])
        assert row["cost/forecast_usd"] == pytest.approx(STEPS * STEP_SECONDS / 3600, rel=0.01)
    assert not [event for event in read_ledger(tmp_path / "first" / "first" / "ledger.jsonl") if event["event"] == "budget"]


def test_a_budget_breaks_a_validation_off_and_it_is_done_later(make, tmp_path, monkeypatch):
    """As a signal does: a long validation must not spend what is for the save."""
    validated = ("train.validate_every=4", "train.validation_sequences=64")
    run = tmp_path / "first" / "first"
    result = train(make(*validated, f"accounting.budget_hours={600 / 3600}"))  # four steps leave 200, of which a portion takes 60
    assert (result.exit_code, result.steps) == (EXIT_BUDGET, 4)
    assert [event["event"] for event in read_ledger(run / "ledger.jsonl") if event["event"].startswith("validation")] == ["validation_stopped"]
    assert read_account(run).device_seconds == pytest.approx(520)
    assert train(make(*validated)).finished
    assert [event["step"] for event in read_ledger(run / "ledger.jsonl") if event["event"] == "validation"] == [*range(4, STEPS, 4), STEPS]


def test_an_earlier_start_without_a_price_is_not_guessed(make, tmp_path, monkeypatch):
    assert train(make("accounting.budget_hours=0.5")).exit_code == EXIT_BUDGET
    told = refused(make("accounting.price=2", "accounting.budget_usd=10"), monkeypatch)
    assert "an earlier start of this run recorded no price" in told
    assert told.endswith("use accounting.budget_usd=null accounting.budget_hours=5")
    assert train(make("accounting.price=2", "accounting.budget_hours=5")).finished


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("accounting.budget_usd=50",), r"accounting\.budget_usd=50 needs accounting\.price, .* use accounting\.price=2\.35"),
        (("accounting.budget_hours=0",), r"accounting\.budget_hours=0 would end the run before it began; use accounting\.budget_hours=100"),
        (("accounting.price=2", "accounting.budget_usd=-1"), r"accounting\.budget_usd=-1 would end .* use accounting\.budget_usd=100"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_train([*SETTINGS, *overrides], [])


def test_all_ranks_stop_at_the_same_step_though_one_alone_counts(corpora, tmp_path):
    port = free_port()
    words = [*SETTINGS, "train.steps=12", f"data.root={corpora}", f"run.root={tmp_path}"]
    ranks = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, str(Path(__file__).with_name("budget_rank.py")), *words]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    assert [json.loads(output.splitlines()[-1]) for output, _ in told] == [{"code": EXIT_BUDGET, "steps": 5, "finished": False}] * 2
    assert "kan: enough is enough; run first is saved at step 5 of 12" in told[0][1]
    assert "enough" not in told[1][1]


def test_a_launcher_does_not_start_it_again_and_says_why(corpora, tmp_path):
    """Of a budget that is too small for anything, so that this takes no longer than a start; nor does it repeat the next start, which is refused."""
    shutil.copytree(corpora, tmp_path / "corpora")
    settings = [*SETTINGS, "cluster.health_check=false", "accounting.budget_hours=0.0001"]
    command = [sys.executable, "-m", "kan_train", "launch", "local", *settings, f"data.root={tmp_path / 'corpora'}", f"run.root={tmp_path / 'runs'}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")} | {"OMP_NUM_THREADS": "1"}
    run = tmp_path / "runs" / "first"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == EXIT_BUDGET, done.stdout + done.stderr
    assert [event["event"] for event in read_events(run)] == ["submitted", "started", "ended", "gave_up"]
    assert read_events(run)[2]["cause"] == "budget"
    assert re.match(r"accounting\.budget_hours=0\.0001 is used up: .* use accounting\.budget_hours=\S+ to go on", read_events(run)[3]["reason"])
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 2, again.stdout + again.stderr
    assert [event["event"] for event in read_events(run)[4:]] == ["submitted", "started", "ended", "gave_up"]
    assert read_events(run)[-1]["reason"].count("accounting.budget_hours=") == 2
