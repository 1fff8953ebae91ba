"""`kan cost`: what it says of a run that was launched, lost its trainer to a kill -9, and finished."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kan_train.accounting.account import BUCKETS, account_of, read_account
from kan_train.accounting.ledger import read_ledger
from kan_train.accounting.lines import read_lines
from kan_train.cli import main
from kan_train.launch.attempts import attempts_of, read_events

COMMANDS = ("show", "reprice")
STEPS, EVERY = 40, 10
SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=2", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.grove.num_groves=8", "model.grove.width=16", "train.global_batch_size=4", "train.micro_batch_size=2", f"train.steps={STEPS}",
    "train.validate_every=1", "train.validation_sequences=2", f"checkpoint.every={EVERY}", "optimizer.schedule.warmup_steps=2", "run.threads=1",
    "run.device=cpu", "cluster.health_check=false", "accounting.price=3.6", "run.name=first",
)  # fmt: skip
TOKENS = 4 * 32

pytestmark = pytest.mark.xdist_group("cost command")  # one launched run for all


@pytest.fixture(scope="module")
def launched(tmp_path_factory, corpora: Path) -> tuple[Path, float, float]:
    """A folder with the run `first`, not to be changed; when its launcher was started, and when it had left."""
    folder = tmp_path_factory.mktemp("launched")
    shutil.copytree(corpora, folder / "corpora")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    command = [sys.executable, "-m", "kan_train", "launch", "local", *SETTINGS, f"data.root={folder / 'corpora'}", f"run.root={folder / 'runs'}"]
    began = time.time()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _kill_after_a_save(folder / "runs" / "first" / "ledger.jsonl", process)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return folder, began, time.time()


def _kill_after_a_save(ledger: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        events = read_ledger(ledger)
        saved = max((event["saved_step"] for event in events if event["event"] == "saved"), default=None)
        if saved is not None and events[-1]["step"] >= saved + 2:
            os.kill(events[-1]["pid"], signal.SIGKILL)
            return
        time.sleep(0.005)
    raise AssertionError("the run came to no save")


@pytest.fixture
def root(launched: tuple[Path, float, float], tmp_path: Path) -> Path:
    """A folder of runs with a copy of what the commands read, to be changed."""
    for name in ("ledger.jsonl", "launch/attempts.jsonl"):
        target = tmp_path / "runs" / "first" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(launched[0] / "runs" / "first" / name, target)
    return tmp_path / "runs"


def kan(*words: str | Path) -> int:
    return main(["cost", *map(str, words)])


def shown(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[dict]:
    assert kan(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if re.match(rf"[│ ]*{re.escape(name)} ", line)]
    return [cell.strip() for cell in line.split("│")[2:-1]]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        kan(command, "--help")
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert len(re.findall(rf"\n  kan cost {command} first", text)) >= 2
    assert max(map(len, text.splitlines())) <= 150


def test_cost_alone_lists_its_commands_without_loading_anything(capsys: pytest.CaptureFixture[str]):
    assert kan() == 2
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    code = "import sys; from kan_train.cli import main; main(['cost']); assert not {'torch', 'yaml', 'rich', 'hydra'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_killed_run_is_paid_for_to_the_end_that_its_launcher_saw(launched):
    """The account against the launcher's clock, within 1 ms, and the clock of this process, which also saw the launcher itself start and end."""
    folder, began, left = launched
    run = folder / "runs" / "first"
    account, attempts = read_account(run), attempts_of(read_events(run))
    assert [start.status for start in account.starts] == ["killed", "finished"]
    for start, attempt in zip(account.starts, attempts, strict=True):
        assert start.devices == 1
        assert start.seconds == pytest.approx(attempt.ended - attempt.started, abs=0.05), "two clocks, one of which may be set meanwhile"
        assert sum(start.buckets.values()) == start.seconds
        assert start.overbooked < 0.01
        assert start.buckets["start-up"] > 0.5, "Python and torch were loaded"
    assert account.device_seconds < left - began
    assert account.device_seconds > 0.5 * (left - began)
    assert account.starts[0].buckets["shutdown"] == 0
    assert account.starts[1].buckets["shutdown"] > 0


def test_what_was_lost_to_the_kill_is_replayed(launched):
    events = read_ledger(launched[0] / "runs" / "first" / "ledger.jsonl")
    account = read_account(launched[0] / "runs" / "first")
    last = max(event["step"] for event in events if event["segment"] == 1 and event["event"] == "steps")
    (resumed,) = [event["step"] for event in events if event["event"] == "segment_start" and event["segment"] == 2]
    assert resumed % EVERY == 0
    assert last > resumed >= EVERY
    assert account.steps_retained == STEPS
    assert account.steps_processed == STEPS + last - resumed
    assert account.tokens_retained == STEPS * TOKENS
    assert account.tokens_processed == (STEPS + last - resumed) * TOKENS
    assert account.starts[0].buckets["replayed"] > 0
    assert account.starts[1].buckets["replayed"] == 0
    lost = [event for event in events if event["event"] == "steps" and event["segment"] == 1 and event["first_step"] > resumed]
    assert account.starts[0].buckets["replayed"] == pytest.approx(sum(event["seconds_step"] for event in lost), abs=0.01)
    named = {bucket for bucket, seconds in account.buckets.items() if seconds}
    assert named >= {"start-up", "step", "data", "saving", "validation", "replayed", "shutdown"}


def test_rows_told_on_the_way_what_the_ledger_says_afterwards(launched):
    """Of each start the last row whose step the ledger has, against the account up to that step; the second one has the kill, the replay and the resume."""
    run = launched[0] / "runs" / "first"
    events, rows = read_ledger(run / "ledger.jsonl"), list(read_lines(run / "metrics.jsonl"))
    for segment in (1, 2):
        number = max(number for number, event in enumerate(events) if event["segment"] == segment and event["event"] == "steps")
        (told,) = [row for row in rows if row["segment"] == segment and row["step"] == events[number]["step"]]
        account = account_of(events[: number + 1], [event for event in read_events(run) if event["time"] <= events[number]["time"]])
        for bucket, seconds in account.buckets.items():
            # The ledger's line was written a little after the row: that moment is idle time.
            assert told[f"cost/bucket/{bucket}_hours"] * 3600 == pytest.approx(seconds, abs=0.5 if bucket == "idle" else 2e-3), (segment, bucket)
        assert told["cost/spent_usd"] == pytest.approx(told["cost/device_hours"] * 3.6)
        assert told["cost/usd_per_million_tokens"] == pytest.approx(1e6 * told["cost/spent_usd"] / account.tokens_retained)


def test_show_prints_what_adds_up(root, capsys):
    assert kan("show", "first", "--root", root) == 0
    text = capsys.readouterr().out
    account = read_account(root / "first")
    hours, shares, dollars = zip(*(row(text, bucket) for bucket in BUCKETS), strict=True)
    assert [float(number) for number in hours] == pytest.approx([seconds / 3600 for seconds in account.buckets.values()], abs=1e-4)
    assert sum(float(share.removesuffix("%")) for share in shares) == pytest.approx(100, abs=0.06)
    whole = account.device_seconds / 3600 * 3.6
    assert sum(float(value.removeprefix("$")) for value in dollars) == pytest.approx(whole, rel=1e-2)
    assert float(row(text, "all")[2].removeprefix("$")) == pytest.approx(whole, rel=1e-3)
    assert "$3.6 a device-hour (accounting.price=3.6)" in text
    assert f"steps             {STEPS} retained of" in text
    a_million = re.search(r"a million tokens +\$([\d.,e-]+) retained, \$([\d.,e-]+) processed", text)
    assert float(a_million[1].replace(",", "")) == pytest.approx(1e6 * whole / account.tokens_retained, rel=1e-2)
    assert float(a_million[2].replace(",", "")) < float(a_million[1].replace(",", "")), "what was lost costs, and adds nothing"


def test_json_holds_the_same_numbers(root, capsys):
    (told,) = shown(capsys, "show", root / "first")
    account = read_account(root / "first")
    assert (told["run"], told["device_seconds"], told["buckets"]) == (str(root / "first"), account.device_seconds, account.buckets)
    assert sum(told["buckets"].values()) == told["device_seconds"], "to the last bit"
    assert [start["price"]["per_device_hour"] for start in told["starts"]] == [3.6, 3.6]
    assert told["cost"]["total"] == pytest.approx(told["device_seconds"] * 1e-3)
    assert told["cost"]["per_million_retained"] == pytest.approx(1e6 * told["cost"]["total"] / (STEPS * TOKENS))
    assert told["goodput"] == told["buckets"]["step"] / told["device_seconds"]


def test_another_price_changes_the_dollars_alone(root, capsys):
    before = (root / "first" / "ledger.jsonl").read_bytes()
    (told,) = shown(capsys, "show", "first", "--root", root)
    (other,) = shown(capsys, "show", "first", "--root", root, "--price", "7.2")
    assert other["cost"]["total"] == pytest.approx(2 * told["cost"]["total"])
    assert {name: other[name] for name in other if name != "cost"} == {name: told[name] for name in told if name != "cost"}
    (repriced,) = shown(capsys, "reprice", "first", "--root", root, "--price", "7.2", "--price", "1.8")
    assert list(repriced["costs"]) == ["recorded", "7.2", "1.8"]
    assert repriced["costs"]["recorded"] == told["cost"]
    assert repriced["costs"]["7.2"] == other["cost"]
    assert repriced["costs"]["1.8"]["total"] == pytest.approx(told["cost"]["total"] / 2)
    assert kan("reprice", "first", "--root", root, "--price", "7.2") == 0
    text = capsys.readouterr().out
    assert float(row(text, "7.2")[1].removeprefix("$")) == pytest.approx(other["cost"]["total"], rel=1e-3)
    assert row(text, "recorded")[0] == "$3.6"
    assert (root / "first" / "ledger.jsonl").read_bytes() == before


def test_a_run_without_a_price_has_hours_but_no_dollars(root, capsys):
    ledger = root / "first" / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    ledger.write_text("".join(json.dumps({name: value for name, value in line.items() if name != "price"}) + "\n" for line in lines))
    assert kan("show", "first", "--root", root) == 0
    text = capsys.readouterr().out
    assert row(text, "all")[1:] == ["100.00%", "-"]
    assert "none recorded" in text
    assert shown(capsys, "show", "first", "--root", root)[0]["cost"] is None
    assert list(shown(capsys, "reprice", "first", "--root", root, "--price", "2")[0]["costs"]) == ["2"]


def test_several_runs_are_compared(root, capsys):
    shutil.copytree(root / "first", root / "second")
    (root / "second" / "launch" / "attempts.jsonl").unlink()
    assert kan("show", "first", "second", "--root", root) == 0
    text = capsys.readouterr().out
    first, second = (row(text.split("\n┏")[-1], name) for name in ("first", "second"))
    assert float(first[2].removeprefix("$")) > float(second[2].removeprefix("$")), "without its launcher nobody knows what came before and after"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "nope"), r"kan: 'nope' is not a run with a ledger.jsonl; .* \(first\)"),
        (("show", "first", "--price", "spot"), r"kan: --price=spot: there is no price of 'cpu' in spot; give a number"),
        (("reprice", "first", "--price", "sopt"), r"kan: --price=sopt: price='sopt' is not known; use price=spot"),
        (("reprice", "first", "--price", "-1"), r"kan: --price=-1 must be a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], message: str, root, capsys):
    assert kan(*words, "--root", root) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_price_of_other_devices_is_refused_before_any_work(launched, tmp_path):
    command = [sys.executable, "-m", "kan_train", "train", *SETTINGS, f"data.root={launched[0] / 'corpora'}", f"run.root={tmp_path}", "accounting.price=spot"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "kan: accounting.price=spot: there is no price of 'cpu' in spot" in done.stderr
    assert not (tmp_path / "first" / "ledger.jsonl").exists()
