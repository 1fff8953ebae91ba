"""The cluster of these tests is a Slurm with nodes of their own, which can be switched off and on; and nothing of it stays behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from slurm_proofs import cluster as cluster_module
from slurm_proofs.cluster import INSTALL, Cluster, SlurmMissing

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """A job of two nodes; its number."""
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{script}\n")
    words = ("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--open-mode=append", f"--output={folder}/output", *options, str(path))
    return cluster.command(*words).strip()


def wait_for(cluster: Cluster, job_id: str, *states: str, seconds: float = 60) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while (job := cluster.job(job_id))["JobState"] not in states:
        assert time.monotonic() < deadline, f"{job}\n{cluster.log()}"
        time.sleep(0.1)
    return job


def test_a_job_runs_on_two_nodes_each_with_its_own_name_and_address(cluster, tmp_path):
    job_id = submit(cluster, tmp_path, 'srun bash -c \'echo "$(hostname) $SLURM_PROCID $(getent hosts "$(hostname)" | cut -d" " -f1)"\'')
    wait_for(cluster, job_id, "COMPLETED")
    lines = sorted(line.split() for line in (tmp_path / "output").read_text().splitlines())
    assert [(name, address) for name, _, address in lines] == [("n0", "127.0.0.11"), ("n1", "127.0.0.12")]
    assert sorted(rank for _, rank, _ in lines) == ["0", "1"]


def running_names(first: psutil.Process) -> set[str]:
    """Names of a process and all below it."""
    found = set()
    for process in (first, *first.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found.add(process.name())
    return found


def test_a_power_cut_ends_all_on_a_node_and_it_can_be_switched_on_again(cluster, tmp_path):
    job_id = submit(cluster, tmp_path, "srun sleep 300", "--no-requeue")
    wait_for(cluster, job_id, "RUNNING")
    node = cluster.job(job_id)["BatchHost"]
    first, deadline = psutil.Process(cluster.pid(node)), time.monotonic() + 30
    while "slurmstepd" not in (names := running_names(first)):  # a job is RUNNING a moment before its node has begun it
        assert time.monotonic() < deadline, names
    assert "slurmd" in names
    processes = [first, *first.children(recursive=True)]
    cluster.power_cut(node)
    assert [process for process in processes if process.is_running()] == []
    cluster.command("scancel", job_id)
    cluster.start_node(node)
    wait_for(cluster, submit(cluster, tmp_path, "srun true", f"--nodelist={node}"), "COMPLETED")


OWNER = """
import sys, time
from pathlib import Path
from slurm_proofs.cluster import Cluster
with Cluster(Path(sys.argv[1]), nodes=2) as cluster:
    print(cluster.port, *map(cluster.pid, ('munged', 'slurmctld', *cluster.nodes)), flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: signal.Signals(number).name)
def test_a_cluster_beside_this_one_dies_with_its_owner(cluster, tmp_path, number):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "other")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert owner.stdout is not None
    port, *pids = map(int, owner.stdout.readline().split())
    assert port != cluster.port
    processes = [process for pid in pids for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
    assert len(processes) >= 6
    owner.send_signal(number)
    owner.wait(20)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    cluster.node_states()  # this one is still there


def test_a_machine_without_slurm_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster_module, "SEARCH_PATH", str(tmp_path))
    with pytest.raises(SlurmMissing, match=INSTALL):
        Cluster(tmp_path / "other")
