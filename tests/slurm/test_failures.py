"""Runs on a real Slurm that go through every failure of a cluster, and end as the run that went through none (docs/reliability.md).

A journey is one run with several failures, one after the other: what each of them came to is asserted on its own (failures.py), and printed. Everything is
run once, two runs at a time; each test judges its own. The time limit is announced here as Slurm announces it, by SIGUSR1 to the batch script; that Slurm
does so itself, which it looks after every 30 s, is left to benchmarks/cluster_failures.py.
"""

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_proofs.accounts import charged
from slurm_proofs.cluster import Cluster
from slurm_proofs.failures import kill_in_start_up
from slurm_proofs.journeys import all_of, judge, travel, undisturbed
from slurm_proofs.runs import ENDED, STEPS, Run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

ROUTES = {
    "scheduler": ("time limit announced", "scontrol requeue", "preempted by a higher partition", "controller restarted"),
    "machines": ("rank killed", "power cut of a worker node", "power cut of the head node"),
    "signals": ("SIGTERM in start-up", "SIGTERM in a validation", "SIGTERM in a save"),
}

ODD_NAME = """it's "a" $HOME `touch broken-out` $(touch broken-out) & run; #1"""
ODD_TEXT = "two\nlines, 'quotes', \"more\", $PATH, $(touch broken-out), a\\b and a space at the end "


async def odd(run: Run) -> dict[str, Any]:
    """A run, too long to end by itself, whose settings have all that a shell would take for its own; a second job of it; and both taken back."""
    await run.submitted()
    await run.until("the ranks", lambda: len(run.ranks()) == 2)
    found: dict[str, Any] = {"run": run, "ranks": [process.cmdline() for process in run.ranks().values()]}
    await run.until("a step", lambda: run.step() > 0)
    found["second"] = await run.submit(), run.said
    # Submitted by hand, as the script says that it may be.
    second = run.cluster.command("sbatch", "--parsable", f"--output={run.folder}/second", str(run.run_dir / "launch" / "job-001.sbatch")).strip()
    await asyncio.sleep(2)
    found["by hand"] = run.cluster.job(second)
    run.cluster.command("scancel", second)
    found["cancel"] = await run.kan("launch", "cancel", str(run.run_dir))
    found["ranks after"] = run.ranks()
    await asyncio.sleep(7)  # longer than a requeued job waits
    found["job"] = run.job()
    return found


async def without_progress(run: Run) -> Run:
    """A rank on the same node is killed in every start, before a step is saved."""
    await run.submitted()
    for start in range(3):
        await kill_in_start_up(run, start)
    await run.until_state(*ENDED)
    return run


async def wrong_settings(run: Run) -> Run:
    """The corpus breaks while the job waits in the queue: no check before could know."""
    shutil.copytree(run.corpora, run.folder / "corpora")
    run.corpora = run.folder / "corpora"
    await run.submitted()
    manifest = run.corpora / "tiny" / "manifest.json"
    assert manifest.exists()
    manifest.write_text("{}")
    await run.until_state(*ENDED)
    return run


@pytest.fixture(scope="module")
def came_of(cluster: Cluster, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What came of a scene, by its name."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str, called: str = "run", steps: int = STEPS) -> Run:
        return Run(cluster, corpora, folder / name, called, list(overrides), steps)

    scenes = {
        "undisturbed": partial(undisturbed, run("undisturbed")),
        **{name: partial(travel, run(name, *(["logging.wandb=offline"] if name == "scheduler" else [])), route) for name, route in ROUTES.items()},
        "odd": partial(odd, run("odd", f"logging.wandb_project={ODD_TEXT}", called=ODD_NAME, steps=100 * STEPS)),
        "without progress": partial(without_progress, run("without-progress", "cluster.partition=apart", "cluster.max_restarts=2", "cluster.exclude_after=2")),
        "wrong settings": partial(wrong_settings, run("wrong-settings")),
    }
    results = asyncio.run(all_of(scenes))

    def of(name: str) -> Any:
        if isinstance(results[name], Exception):
            raise results[name]
        return results[name]

    return of


@pytest.mark.parametrize("name", ROUTES)
def test_a_run_that_suffers_all_this_is_the_run_that_suffered_nothing(name, came_of):
    """Rows, tensors of the checkpoints, cursor and files: to the last bit; nothing lost, nothing trained twice but what was not saved."""
    journey = came_of(name)
    print("\n".join(f"{one.failure}: next step after {one.seconds_to_next_step} s, {one.repeated_steps} steps repeated" for one in journey.suffered))
    assert judge(journey, came_of("undisturbed")) == []
    assert [one.failure for one in journey.suffered] == list(ROUTES[name])
    assert max(one.seconds_to_next_step for one in journey.suffered) < 150


def test_the_undisturbed_run_started_once(came_of):
    run = came_of("undisturbed")
    assert [event["event"] for event in run.events()] == ["submitted", "started", "ended", "finished"]
    assert [row["step"] for row in run.rows()] == list(range(1, run.rows()[-1]["step"] + 1))


def test_all_starts_are_one_job_one_ledger_and_one_run_of_wandb(came_of):
    run = came_of("scheduler").run
    assert {event["job_id"] for event in run.events()} == {run.job_id}
    starts = run.ledger("segment_start")
    assert [start["segment"] for start in starts] == [1, 2, 3, 4]
    (name,) = {path.name.rpartition("-")[2] for path in (run.run_dir / "wandb").glob("offline-run-*")}
    assert (run.run_dir / "wandb_id.txt").read_text().strip() == name
    assert len(list((run.run_dir / "wandb").glob("offline-run-*"))) == len(starts)


def test_a_node_that_was_cut_off_is_named_and_the_others_go_on_without_it(came_of):
    journey = came_of("machines")
    worker, head = journey.suffered[1:]
    assert (worker.failed_host, head.failed_host) == (worker.hosts[1], head.hosts[0])
    assert worker.hosts[1] not in head.hosts
    assert head.hosts[0] not in journey.run.hosts()


@pytest.mark.parametrize("name", ["undisturbed", "scheduler", "machines"])
def test_a_run_counts_the_device_seconds_that_slurm_counts(name, came_of):
    """Within 2 s and 1% of every start, also of one whose node lost its power: nobody lived to see its end but Slurm.

    A start that was requeued may count more than Elapsed, which ends when the requeue was asked for, but no more than the time that Slurm held its nodes.
    """
    run = came_of(name) if name == "undisturbed" else came_of(name).run
    status, said = asyncio.run(run.kan("cost", "show", str(run.run_dir), "--json"))
    assert status == 0, said
    (told,) = json.loads(said)
    starts = charged(run.cluster.command, {event["job_id"]: None for event in run.events("started")})
    assert len(starts) == len(run.events("started"))
    for one, own in zip(starts, told["starts"], strict=True):
        print(f"{one.state}: sacct {one.elapsed:.0f} s, held {one.held:.0f} s, counted {own['seconds']:.2f} s")
        least, most = one.elapsed * one.nodes, one.held * one.nodes
        assert least * 0.99 - 2.0 * one.nodes <= own["device_seconds"] <= most * 1.01 + 2.0 * one.nodes, one
        assert sum(own["buckets"].values()) == own["seconds"]
    assert told["device_seconds"] == pytest.approx(sum(own["device_seconds"] for own in told["starts"]))


def test_names_and_settings_reach_the_trainers_unchanged_and_run_nothing(came_of):
    found = came_of("odd")
    for words in found["ranks"]:
        assert f"run.name={ODD_NAME}" in words
        assert f"logging.wandb_project={ODD_TEXT}" in words
    assert not [process for process in psutil.process_iter(["name"]) if process.info["name"] == "touch"]


def test_odd_names_leave_no_file(came_of, tmp_path_factory):
    came_of("odd")
    assert list(tmp_path_factory.getbasetemp().rglob("broken-out")) == []
    assert not (Path.cwd() / "broken-out").exists()


def test_two_jobs_never_write_to_one_run(came_of):
    found = came_of("odd")
    status, said = found["second"]
    assert status == 2, said
    assert re.search("already|under way|is there", said), said
    assert (found["by hand"]["JobState"], found["by hand"]["Reason"]) == ("PENDING", "Dependency")


def test_a_cancelled_job_saves_and_does_not_come_back(came_of):
    found = came_of("odd")
    status, said = found["cancel"]
    assert status == 0, said
    saved = re.search("cancelled; the run is saved at step ([0-9]+)", said)
    assert saved, said
    run = found["run"]
    assert int(saved[1]) == run.step() > 0  # nothing that was trained is lost
    assert found["ranks after"] == {}
    assert [end["cause"] for end in run.events("ended")] == ["cancelled"]
    assert (found["job"]["JobState"], found["job"]["Restarts"]) == ("FAILED", "0")  # with the status of a run that was stopped and saved


def test_a_run_without_progress_is_given_up_and_its_bad_node_left_out(came_of):
    run = came_of("without progress")
    assert [end["cause"] for end in run.events("ended")] == ["failed"] * 3
    (moved,) = run.events("resubmitted")
    assert moved["exclude"] == [run.events("ended")[0]["failed_host"]]
    assert not set(moved["exclude"]) & set(run.hosts())
    assert (moved["new_job_id"], run.events("started")[-1]["restart"]) == (run.job_id, 0)  # a new job, which has not been restarted
    assert run.events()[-1]["event"] == "gave_up"
    assert "cluster.max_restarts=2" in run.events()[-1]["reason"]
    assert run.job()["JobState"] == "FAILED"


def test_a_wrong_setting_is_not_tried_again(came_of):
    run = came_of("wrong settings")
    (end,) = run.events("ended")
    assert (end["cause"], end["exit_code"]) == ("settings", 2), run.story()
    assert run.events()[-1]["event"] == "gave_up"
    assert (run.job()["JobState"], run.job()["Restarts"]) == ("FAILED", "0")
