"""The terminal's view: before a run begins, while it goes on, after a kill, and to its end."""

import io
import json
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kan_train.report import text as text_of
from kan_train.report.history import read_history
from kan_train.report.live import EVENTS, sparkline, watch

from .conftest import ODD, STEPS

FILES = ("metrics.jsonl", "ledger.jsonl", "config.yaml")


def seen(run_dir: Path, **how: object) -> str:
    console = Console(width=160, record=True, file=io.StringIO(), highlight=False)
    assert watch(run_dir, console=console, **how) == 0  # type: ignore[arg-type]
    return console.export_text()


def copied(runs: Path, name: str, to: Path) -> Path:
    to.mkdir()
    for file in FILES:
        shutil.copy(runs / name / file, to / file)
    return to


def test_a_finished_run_is_shown_once(runs: Path, tmp_path: Path):
    run_dir = copied(runs, "first", tmp_path / "first")
    text = seen(run_dir, once=True)
    history = read_history(run_dir)
    assert not (run_dir / "report.html").exists(), "once is a look"
    assert re.search(r"first +finished", text)
    assert f"step              {STEPS} of {STEPS}" in text
    assert f"goodput {history.account.goodput:.1%}" in text
    assert re.search(r"spent +\$0\.0\d+ \(0\.0\d+ device-hours\)", text)
    for event in history.events[-EVENTS:]:
        assert re.search(rf"{text_of.moment(event.time)[11:]} +{event.step} +{event.name} .*{re.escape(event.detail[:20])}", text), event
    assert "tokens/s" in text
    assert "mfu" in text
    for bucket, seconds in history.account.buckets.items():
        if seconds > 0.01 * history.account.device_seconds:
            assert bucket in text


def test_a_run_without_a_price_says_how_to_see_dollars(runs: Path):
    text = seen(runs / ODD, once=True)
    assert "none recorded: --price 2.35" in text
    assert "$" not in text
    assert "$" in seen(runs / ODD, once=True, price="2")
    assert ODD in text


def test_a_run_is_waited_for_and_followed_to_its_end(runs: Path, tmp_path: Path):
    """Its files grow as they did: nothing, the killed start, half of the second, and all of it."""
    run_dir, events = tmp_path / "first", (runs / "first" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    rows = (runs / "first" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    second = next(number for number, line in enumerate(events) if b'"segment":2' in line)
    pages: list[str] = []

    def grow() -> None:
        time.sleep(0.5)
        run_dir.mkdir()
        shutil.copy(runs / "first" / "config.yaml", run_dir)
        for until in (second, second + 4, len(events)):
            share = until / len(events)
            (run_dir / "metrics.jsonl").write_bytes(b"".join(rows[: round(share * len(rows))]) + b'{"torn')
            (run_dir / "ledger.jsonl").write_bytes(b"".join(events[:until]))
            deadline = time.monotonic() + 30
            while not (run_dir / "report.html").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            pages.append((run_dir / "report.html").read_text())
            time.sleep(0.3)

    thread = threading.Thread(target=grow)
    thread.start()
    text = seen(run_dir, every=0.1)
    thread.join()
    assert "waiting for" in text
    assert "waiting for" in text.split("running")[0]
    states = list(dict.fromkeys(re.findall(r"─ first +(\w+) ─", text)))
    assert states in (["running", "finished"], ["killed", "running", "finished"], ["killed", "finished"]), states
    assert '<meta http-equiv="refresh"' in pages[0], "while it goes on, the page reads itself again"
    final = (run_dir / "report.html").read_text()
    assert '<meta http-equiv="refresh"' not in final
    assert f"{STEPS} retained of" in final
    assert [path.name for path in run_dir.glob(".report*")] == []


def test_a_folder_that_may_not_be_written_to_is_watched_without_a_page(runs: Path, tmp_path: Path):
    run_dir = copied(runs, "first", tmp_path / "first")
    (run_dir / "report.html").mkdir()  # root may write anywhere, but not there
    text = re.sub(r"\s+", " ", seen(run_dir, every=0.1))
    assert "first finished" in text
    assert text.count("no page is written: ") == 1
    assert f"use `kan cost report {run_dir} -o FILE`" in text


def test_what_the_rows_say_of_the_end_and_the_budget_is_shown(runs: Path, tmp_path: Path):
    run_dir = copied(runs, "first", tmp_path / "first")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    forecast = {"cost/forecast_usd": 0.5, "cost/forecast_usd_low": 0.4, "cost/forecast_usd_high": 0.7}
    figures = forecast | {"cost/budget_left_usd": 0.25, "cost/budget_left_hours": 2.0}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row | figures) + "\n" for row in rows))
    text = seen(run_dir, once=True)
    assert re.search(r"at the end +\$0\.5000 \(\$0\.4000 to \$0\.7000\)", text)
    assert re.search(r"budget left +\$0\.2500", text)
    assert re.search(r"budget left +2\.000 h", text)


@pytest.mark.parametrize(("values", "line"), [([], ""), ([np.nan], ""), ([2.0, 2.0], "▁▁"), ([0.0, 3.5, 7.0], "▁▅█"), ([0.0, np.nan, 7.0], "▁ █")])
def test_a_curve_in_a_line_of_text(values: list[float], line: str):
    assert sparkline(np.array(values)) == line
    assert len(sparkline(np.linspace(0, 1, 1000))) == 48
