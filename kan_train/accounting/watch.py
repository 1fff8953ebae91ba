"""Who watches a run: the ledger, metrics.jsonl, the console and W&B, as one hook of the training loop in the first process."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from kan_train.accounting.budget import Budget, Cap, event_of, forecast_of, warning
from kan_train.accounting.ledger import LEDGER, Ledger, Where
from kan_train.accounting.lines import Row
from kan_train.accounting.meters import StepMeter, device_name, devices_of
from kan_train.accounting.prices import chosen_price
from kan_train.accounting.sinks import Sink
from kan_train.accounting.sinks.console import ConsoleSink
from kan_train.accounting.sinks.jsonl import METRICS, JsonlSink
from kan_train.accounting.spend import Spend, cost_row
from kan_train.config import Config

PICTURE = "loss.png"
"""The loss curve's name in a run directory."""


class Process(Protocol):
    """What is asked about this process of a run."""

    @property
    def is_first(self) -> bool:
        """Whether it writes what is written once a run."""
        ...

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        ...

    @property
    def local_world_size(self) -> int:
        """Those on this machine."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...


class Watch:
    """A hook that completes the loop's rows and hands them on. Opens nothing before `on_start`."""

    def __init__(self, config: Config, run_dir: Path, process: Process, sinks: Sequence[Sink] = ()) -> None:
        """sinks: those besides metrics.jsonl and the ledger, which are always written. They see the rows that metrics.jsonl has.

        ConfigError where accounting.price names prices of other devices.
        """
        self.config, self.run_dir = config, run_dir
        self.meter = StepMeter(config, process.device, process.world_size)
        devices = devices_of(config, process.world_size, process.local_world_size)
        self.where = Where.here(process.world_size, device_name(config, process.device), devices)
        choice = config.accounting.price
        self.price = None if choice is None else chosen_price(choice, self.where.device, setting="accounting.price")
        """What a device costs, as the run says; None where it does not."""
        self.console = ConsoleSink(config)
        self.sinks: list[Sink] = [JsonlSink(run_dir / METRICS), *sinks]
        self._ledger: Ledger | None = None
        self._spend: Spend | None = None
        self._budget: Budget | None = None
        self._reached: Cap | None = None
        self._energy: Row = {}
        self._lineage: Row = {}
        self._step = 0
        self._unusual_step: int | None = None

    def on_start(self, start: Row) -> None:
        """A segment begins. ConfigError where its files cannot be written or another process is training this run."""
        self._ledger = Ledger(self.run_dir / LEDGER, self.where)
        # The ledger counts every start: a segment that dies before its first save leaves no trace in a checkpoint.
        self._lineage = {"segment": self._ledger.segment, "resumed_from": start["step"], "rewinds": 0}
        start = start | self._lineage
        for sink in (*self.sinks, self.console):
            sink.start(start)
        self._ledger.begin(start["step"], start["tokens"], start["origin"], None if self.price is None else self.price.as_row())
        self._step = start["step"]
        self._spend = Spend(self.config, self.run_dir, self._ledger.segment)
        self._budget = Budget(self.config.accounting, self._spend)
        joules = sum(self._ledger.totals.get(f"{kind}.joules", 0.0) for kind in ("steps", "energy"))
        self._energy = {"energy/joules": joules} if joules else {}
        self._joules_here = self._tokens_of_joules = 0.0

    def on_step(self, row: Row) -> None:
        """Every step is counted and shown; one in logging.every is written, and any that validated, was bad, or is the last."""
        row = self.meter.add_to(row) | self._lineage | self._energy
        assert self._ledger is not None, "on_step before on_start"
        self._ledger.count_step(row)
        self._step = row["step"]
        row |= self._costs(row)
        self.console.write(row)
        unusual = row["step"] in (self._unusual_step, self.config.train.steps) or "validation/loss" in row or "time/evaluation" in row
        if unusual or row["step"] % self.config.logging.every == 0:
            for sink in self.sinks:
                sink.write(row)

    def _costs(self, row: Row) -> Row:
        assert self._ledger is not None
        assert self._spend is not None
        assert self._budget is not None
        self._spend.step(row)
        elapsed = self._ledger.elapsed()
        spent, outlook = self._spend.at(elapsed), self._spend.outlook(self._step, elapsed)
        for event in self._budget.warnings(spent, outlook):
            print(f"kan: {warning(event)}", file=sys.stderr, flush=True)
            self.on_event("budget", {"step": self._step} | event)
        return cost_row(spent, outlook) | self._budget.left(spent)

    def over_budget(self) -> str:
        """Why the run must be saved and end now, for a limit of accounting; empty where it need not."""
        if self._ledger is None or self._spend is None or self._budget is None or not self._budget.caps:
            return ""
        elapsed = self._ledger.elapsed()
        spent = self._spend.at(elapsed)
        self._reached = self._budget.reached(spent)
        return "" if self._reached is None else self._budget.why(self._reached, spent, self._spend.outlook(self._step, elapsed))

    def _stopped_by(self, cap: Cap) -> Row:
        assert self._ledger is not None
        assert self._spend is not None
        elapsed = self._ledger.elapsed()
        return event_of("stopped", cap, self._spend.at(elapsed), forecast_of(cap, self._spend.outlook(self._step, elapsed)))

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """Into the ledger, after the steps before it."""
        assert self._ledger is not None, "on_event before on_start"
        assert self._spend is not None
        if kind == "energy":
            self._add_energy(fields)
            return
        if kind == "budget" and "setting" not in fields and self._reached is not None:
            fields = fields | self._stopped_by(self._reached)
        self._ledger.write_steps()
        elapsed = self._ledger.event(kind, **fields)
        self._spend.event(kind, fields, elapsed)
        if kind in ("skipped_step", "spike_step", "budget"):
            self._unusual_step = fields["step"]
        elif kind == "rewind":
            self._lineage |= {"resumed_from": fields["step"], "rewinds": self._lineage["rewinds"] + 1}
        for sink in (*self.sinks, self.console):
            sink.event(kind, fields)

    def _add_energy(self, fields: dict[str, Any]) -> None:
        assert self._ledger is not None
        self._ledger.add_joules(fields["joules"])
        self._joules_here += fields["joules"]
        self._tokens_of_joules += fields["steps"] * self.config.train.global_batch_size * self.config.model.sequence_length
        # A token of this start: the starts before may have been on devices that do not tell.
        self._energy = {
            "energy/joules": self._energy.get("energy/joules", 0.0) + fields["joules"],
            "energy/joules_per_token": self._joules_here / self._tokens_of_joules,
        }

    def totals(self) -> dict[str, float]:
        """Those of the ledger, over all segments of the run."""
        return {} if self._ledger is None else dict(self._ledger.totals)

    def on_end(self, end: Row) -> None:
        """Close everything. Never raises: an error of the loop itself may be on its way out."""
        if self._ledger is None:
            return
        ledger = self._ledger
        _say_if_it_fails(ledger.write_steps)
        _say_if_it_fails(lambda: ledger.event("segment_end", step=end["step"], tokens=end["tokens"], status=end["status"]))
        _say_if_it_fails(ledger.close)
        for sink in (*self.sinks, self.console):
            _say_if_it_fails(lambda sink=sink: sink.close(end))  # type: ignore[misc]
        # An interrupted run has little time left, and will go on.
        if end["status"] != "interrupted":
            _say_if_it_fails(self._draw)

    def _draw(self) -> None:
        from kan_train.accounting.plots import draw_losses  # loads matplotlib

        draw_losses(self.run_dir / METRICS, self.run_dir / PICTURE, title=f"{self.config.model.name}: loss")


def default_hooks(config: Config, run_dir: Path, process: Process) -> list[Watch]:
    """What watches a run as config.logging says; nothing in processes other than the first. Writes nothing yet."""
    if not process.is_first:
        return []
    sinks: list[Sink] = []
    if config.logging.wandb != "disabled":
        from kan_train.accounting.sinks.wandb import WandbSink

        sinks.append(WandbSink(config, run_dir))
    return [Watch(config, run_dir, process, sinks)]


def _say_if_it_fails(action: Any) -> None:
    try:
        action()
    except Exception as error:
        print(f"kan: at the end of the run: {error}", file=sys.stderr)
