"""Who is slow: judged from figures, and in a run of four processes of which one is slowed on purpose."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kan_train.accounting.ledger import read_ledger
from kan_train.config import Config, ConfigError, StragglerConfig
from kan_train.engine.collectives import CollectiveClock
from kan_train.engine.links import ring_rounds, slow_links
from kan_train.engine.stragglers import RankReports, RankTime, Stragglers
from kan_train.parallel.runtime import Runtime


def ranks(*computing: float, hosts: str = "aabb", stages: tuple[int, ...] = (0, 0, 0, 0), data: tuple[float, ...] = (0, 0, 0, 0)) -> list[RankTime]:
    """Steps as long as the slowest rank's: what the others do not compute they wait."""
    length = max(map(sum, zip(computing, data, strict=True)))
    return [
        RankTime(host=host, stage=stage, computing=own, data=late, waiting=length - own - late)
        for host, stage, own, late in zip(hosts, stages, computing, data, strict=True)
    ]


def test_a_rank_is_named_once_it_was_slow_for_so_many_reports_in_a_row():
    judge = Stragglers(factor=1.3, reports=3)
    slow, even = ranks(1.0, 1.0, 1.0, 1.5), ranks(1.0, 1.1, 1.0, 1.2)
    assert [judge(report) for report in (slow, slow, even, slow, slow)] == [[]] * 5
    (found,) = judge(slow)
    assert (found["host"], found["ranks"], found["slower"], found["what"]) == ("b", [3], 1.5, "computing")
    assert "rank 3 on b" in found["summary"]
    assert judge(slow) == [], "it is known"
    assert judge(even) == []
    assert [len(judge(slow)) for _ in range(3)] == [0, 0, 1], "again, after it had recovered"


def test_a_host_of_which_every_rank_is_slow_is_named_itself():
    (found,) = Stragglers(1.3, 1)(ranks(1.0, 1.0, 1.0, 1.0, 2.0, 2.1, hosts="aabbcc", stages=(0,) * 6, data=(0,) * 6))
    assert (found["host"], found["ranks"], found["whole_host"], found["slower"]) == ("c", [4, 5], True, 2.1)
    assert "host c (ranks 4-5)" in found["summary"]


def test_a_rank_that_waits_for_its_data_is_told_from_one_that_computes_slowly():
    (found,) = Stragglers(1.3, 1)(ranks(1.0, 1.0, 1.0, 1.0, data=(0.1, 0.9, 0.1, 0.1)))
    assert (found["ranks"], found["what"]) == ([1], "data")


def test_ranks_are_compared_with_those_that_hold_the_same_layers():
    judge = Stragglers(1.3, 1)
    assert judge(ranks(1.0, 1.0, 2.0, 2.0, stages=(0, 0, 1, 1))) == [], "the second stage has more to do"
    assert judge(ranks(1.0, 2.0, 4.0, 8.0, stages=(0, 1, 2, 3))) == [], "and a stage of one rank has no equals"
    assert [found["ranks"] for found in judge(ranks(1.0, 1.0, 2.0, 3.0, stages=(0, 0, 1, 1)))] == [[3]]


def test_of_two_ranks_the_slower_one_is_named():
    (found,) = Stragglers(1.3, 1)(ranks(1.0, 1.4, hosts="ab", stages=(0, 0), data=(0, 0)))
    assert found["ranks"] == [1]


def test_a_millisecond_is_no_straggler():
    assert Stragglers(1.3, 1)(ranks(0.001, 0.001, 0.001, 0.002)) == []


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8])
def test_every_two_neighbours_of_the_ring_meet_once_and_nobody_meets_two_at_a_time(nodes):
    hosts = [f"node-{rank // 2}" for rank in range(2 * nodes)]
    rounds = ring_rounds(hosts)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    expected = {frozenset((2 * node + card, 2 * ((node + 1) % nodes) + card)) for node in range(nodes) for card in (0, 1)} if nodes > 1 else set()
    assert set(met) == expected
    assert len(met) == len(expected)
    for pairs in rounds:
        engaged = [rank for pair in pairs for rank in pair]
        assert len(engaged) == len(set(engaged))


def test_a_node_with_a_bad_card_makes_both_of_its_links_slow():
    rates = {("a", "b"): 20.0, ("b", "c"): 3.0, ("c", "a"): 3.1}
    links = [{"hosts": list(hosts), "ranks": [0, 1], "gigabytes_per_second": rate} for hosts, rate in rates.items()]
    assert [link["hosts"] for link in slow_links(links, 2.0)] == [["b", "c"], ["c", "a"]]
    assert slow_links(links[:1], 2.0) == []


def test_the_clock_counts_waiting_of_its_own_thread_inside_it_alone(monkeypatch):
    monkeypatch.setattr(dist.Work, "wait", lambda work: time.sleep(0.02))
    untouched, clock = dist.Work.wait, CollectiveClock(torch.device("cpu"))
    work = object()
    dist.Work.wait(work)
    with clock:
        dist.Work.wait(work)
        writing = threading.Thread(target=dist.Work.wait, args=(work,))
        writing.start()
        writing.join()
    assert dist.Work.wait is untouched
    assert 0.02 <= clock.taken() < 0.04
    assert clock.taken() == 0


def test_one_process_has_nobody_to_compare_itself_with(tmp_path: Path):
    reports = RankReports(StragglerConfig(every=1, links=True), Runtime(), 0, tmp_path)
    with reports.clock:
        pass
    assert [reports.count(step, seconds=1.0, data=0.1) for step in (1, 2)] == [[], []]


@pytest.mark.parametrize("setting", ["factor", "link_factor"])
def test_a_factor_that_names_everybody_is_refused(setting):
    config = Config()
    setattr(config.stragglers, setting, 1.0)
    with pytest.raises(ConfigError, match=rf"stragglers\.{setting}=1 .*use stragglers\.{setting}="):
        config.validate()


SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=1", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.grove.num_groves=8", "model.grove.width=16", "train.global_batch_size=4", "train.steps=15", "train.validate_every=0", "checkpoint.every=0",
    "optimizer.schedule.warmup_steps=2", "run.threads=1", "run.device=cpu", "run.name=slow", "parallel.zero_stage=1", "logging.console_every=100",
    # Others compute on this machine too: the factor is larger, and what is slow is slower, than where a run has its machine for itself.
    "stragglers.every=3", "stragglers.reports=2", "stragglers.factor=2.5", "stragglers.links=true", "stragglers.link_megabytes=4", "stragglers.link_factor=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def slow_run(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of four ranks on two hosts: rank 3 sleeps 0.4 s a step from step 10 on, and 0.3 s whenever it sends to a neighbour."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow").mkdir()
    (folder / "slow" / "measure-links").touch()
    command = [sys.executable, str(Path(__file__).with_name("slow_rank.py")), str(folder), *SETTINGS, f"data.root={corpora}", f"run.root={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:] + "".join(path.read_text()[-2000:] for path in folder.glob("output-*"))
    return folder


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in read_ledger(folder / "slow" / "ledger.jsonl") if event["event"] == kind]


def test_a_slow_rank_is_named_with_its_host_and_an_even_run_names_none(slow_run):
    """Even up to step 9, slow from step 10: named with the second report of slow steps."""
    (found,) = events(slow_run, "straggler")
    assert (found["step"], found["ranks"], found["host"], found["what"], found["whole_host"]) == (15, [3], "node-b", "computing", False)
    assert found["computing"] > 0.4
    assert "slow: rank 3 on node-b" in (slow_run / "output-0").read_text()


def test_every_report_has_every_ranks_seconds(slow_run):
    reports = events(slow_run, "ranks")
    assert [(report["step"], report["over"]) for report in reports] == [(3, 2), (6, 3), (9, 3), (12, 3), (15, 3)]
    for report in reports:
        columns = report["ranks"]
        assert columns["host"] == ["node-a", "node-a", "node-b", "node-b"]
        assert columns["stage"] == [0, 0, 0, 0]
        assert min(columns["computing"]) > 0
    last = reports[-1]["ranks"]
    assert last["waiting"][3] < 0.4, "nobody keeps the slow rank waiting"
    assert min(last["waiting"][:3]) > 0.3, "the others wait for it"
    lengths = [sum(parts) for parts in zip(last["computing"], last["waiting"], last["data"], strict=True)]
    assert max(lengths) < 1.3 * min(lengths), "their steps are equally long"


def test_the_slow_link_is_named_and_links_are_measured_again_where_a_file_asks(slow_run):
    assert [report["step"] for report in events(slow_run, "links")] == [1, 3]
    for report in events(slow_run, "links"):
        assert [(link["hosts"], link["ranks"]) for link in report["links"]] == [(["node-a", "node-b"], [0, 2]), (["node-a", "node-b"], [1, 3])]
    for found in events(slow_run, "slow_link"):
        assert (found["hosts"], found["ranks"]) == (["node-a", "node-b"], [1, 3])
    assert len(events(slow_run, "slow_link")) == 2
    assert not (slow_run / "slow" / "measure-links").exists()
    assert "the link between node-a (rank 1) and node-b (rank 3) is slow" in (slow_run / "output-0").read_text()
