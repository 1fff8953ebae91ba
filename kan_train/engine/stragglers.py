"""Which ranks and hosts are slow. Every rank counts its seconds; every so many steps they are gathered, and judged alike on all ranks.

A rank's own time is what it computes and what it waits for data. The ranks that it holds up wait for it in collectives, so that their steps are as long
as its own: the length of a step tells nobody apart, and waiting is shortest where the others wait for.
"""

import socket
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kan_train.config import StragglerConfig
from kan_train.engine.collectives import CollectiveClock
from kan_train.engine.hangs import ranks_text
from kan_train.engine.links import link_events
from kan_train.parallel.runtime import Runtime

Event = tuple[str, dict[str, Any]]

MEASURE_LINKS = "measure-links"
"""A file of this name in the run directory asks for the links between nodes to be measured at the next report."""

LEAST_SECONDS = 0.002
"""Own time beyond the median that is worth a word, a step: below it a machine's other work decides."""

HOST_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class RankTime:
    """One rank's mean seconds a step."""

    host: str
    """Its machine."""
    stage: int = 0
    """Its pipeline stage: ranks of one stage have the same to do."""
    computing: float = 0.0
    """All that is neither waiting nor data."""
    waiting: float = 0.0
    """In collectives."""
    data: float = 0.0
    """For the next batch."""

    @property
    def own(self) -> float:
        """What this rank takes whatever the others do."""
        return self.computing + self.data


class RankReports:
    """This rank's part in the reports of a run. Events are for the ledger; every rank gets the same."""

    def __init__(self, config: StragglerConfig, runtime: Runtime, stage: int, run_dir: Path, *, host: str | None = None) -> None:
        """stage: this rank's pipeline stage. host: name of this machine; None: asked."""
        self.config, self.runtime, self.stage, self.run_dir = config, runtime, stage, run_dir
        # One process has nobody to compare itself with; its own times are in the ledger's steps.
        alone = not runtime.distributed or runtime.world_size == 1
        self.every = 0 if alone else config.every
        self.host = host or socket.gethostname()
        self.clock: AbstractContextManager[object] = CollectiveClock(runtime.device) if self.every else nullcontext()
        """The context of a training step."""
        self._judge = Stragglers(config.factor, config.reports)
        self._hosts: list[str] = []
        self._links_due = config.links and not alone
        self._sums = (0.0, 0.0, 0.0)  # computing, waiting, data
        self._steps = -1  # a start's first step is like no other: it is not counted

    def count(self, step: int, *, seconds: float, data: float) -> list[Event]:
        """After training step `step`, which took `seconds`, of them `data` for its batch: what there is to report. Collective."""
        events = []
        if self.every:
            self._add(seconds, data)
            if self._steps and step % self.every == 0:
                events += self._report(step)
        if self._links_due:
            self._links_due = False
            events += link_events(self.runtime, self._host_names(), self.config, step)
        return events

    def _add(self, seconds: float, data: float) -> None:
        assert isinstance(self.clock, CollectiveClock)
        waiting = self.clock.taken()
        self._steps += 1
        if self._steps:
            computing = max(0.0, seconds - waiting - data)
            self._sums = (self._sums[0] + computing, self._sums[1] + waiting, self._sums[2] + data)

    def _report(self, step: int) -> list[Event]:
        asked = self.runtime.is_first and self._asked_for_links()
        means = [total / self._steps for total in self._sums]
        own = torch.tensor([*means, float(self.stage), float(asked)], dtype=torch.float64, device=self.runtime.device)
        gathered = self.runtime.gather(own).tolist()
        self._links_due = self._links_due or any(row[-1] for row in gathered)
        ranks = [
            RankTime(host=host, stage=int(stage), computing=round(computing, 6), waiting=round(waiting, 6), data=round(data, 6))
            for host, (computing, waiting, data, stage, _) in zip(self._host_names(), gathered, strict=True)
        ]
        columns = {name: [getattr(rank, name) for rank in ranks] for name in ("host", "stage", "computing", "waiting", "data")}
        report = {"step": step, "over": self._steps, "ranks": columns}
        self._steps, self._sums = 0, (0.0, 0.0, 0.0)
        return [("ranks", report), *(("straggler", {"step": step, **found}) for found in self._judge(ranks))]

    def _asked_for_links(self) -> bool:
        request = self.run_dir / MEASURE_LINKS
        try:
            request.unlink()
        except OSError:  # most of the time there is none
            return False
        return True

    def _host_names(self) -> list[str]:
        if not self._hosts:
            name = self.host.encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
            gathered = self.runtime.gather(torch.tensor(list(name), dtype=torch.uint8, device=self.runtime.device))
            self._hosts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered.tolist()]
        return self._hosts


class Stragglers:
    """Judges one report after the other: who is slow in several in a row."""

    def __init__(self, factor: float, reports: int) -> None:
        """factor, reports: as in StragglerConfig."""
        self.factor, self.reports = factor, reports
        self._slow: Counter[int] = Counter()

    def __call__(self, ranks: Sequence[RankTime]) -> list[dict[str, Any]]:
        """The ranks that have become stragglers with this report, together where they are of one host; a rank that stays slow is named once.

        Each: host, ranks, whole_host (all of the host's ranks are slow now), slower (times the median), what ("computing" or "data", which has more of
        the excess), reports, and of the slowest rank computing, waiting and data, with the median that its own time was compared with; and a summary.
        """
        medians = _medians(ranks)
        # Nobody holds the same layers as the only rank of a stage: its time says how the layers are cut.
        slow = [
            number for number, rank in enumerate(ranks)
            if rank.stage in medians and rank.own > max(self.factor * medians[rank.stage], medians[rank.stage] + LEAST_SECONDS)
        ]  # fmt: skip
        self._slow = Counter({number: self._slow[number] + 1 for number in slow})
        new = [number for number in slow if self._slow[number] == self.reports]
        hosts = dict.fromkeys(ranks[number].host for number in new)
        return [self._named(host, [number for number in new if ranks[number].host == host], ranks, set(slow)) for host in hosts]

    def _named(self, host: str, named: list[int], ranks: Sequence[RankTime], slow: set[int]) -> dict[str, Any]:
        medians = _medians(ranks)
        slowest = ranks[max(named, key=lambda number: ranks[number].own / max(medians[ranks[number].stage], 1e-9))]
        median = medians[slowest.stage]
        usual = statistics.median_low([rank.data for rank in ranks if rank.stage == slowest.stage])
        found = {
            "host": host,
            "ranks": named,
            "whole_host": len({rank.host for rank in ranks}) > 1 and all(number in slow for number, rank in enumerate(ranks) if rank.host == host),
            "slower": round(slowest.own / max(median, 1e-9), 3),
            "what": "data" if slowest.data - usual > (slowest.own - median) / 2 else "computing",
            "reports": self.reports,
            "computing": slowest.computing,
            "waiting": slowest.waiting,
            "data": slowest.data,
            "median": round(median, 6),
        }
        return found | {"summary": _summary(found)}


def _medians(ranks: Sequence[RankTime]) -> dict[int, float]:
    """Stage -> median own time, for the stages of more than one rank. The lower one of two: of two ranks, the slower is not half the measure."""
    stages: dict[int, list[float]] = {}
    for rank in ranks:
        stages.setdefault(rank.stage, []).append(rank.own)
    return {stage: statistics.median_low(own) for stage, own in stages.items() if len(own) > 1}


def _summary(found: dict[str, Any]) -> str:
    named = ranks_text(found["ranks"])
    who = f"host {found['host']} ({named})" if found["whole_host"] else f"{named} on {found['host']}"
    took = f"{found['computing']:.3g} s computing and {found['data']:.3g} s for data a step where the median is {found['median']:.3g} s"
    return f"slow: {who}, {took} ({found['slower']:.2f} times, {found['reports']} reports in a row)"
