"""A Slurm that keeps accounts, so that `sacct` answers: slurmdbd, and a MariaDB of its own in the cluster's folder."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

PROGRAMS = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacct", "sacctmgr")

PACKAGES = "slurmdbd mariadb-server slurm-wlm-mysql-plugin"

NONE = "AccountingStorageType=accounting_storage/none"

SLURM = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.sock"""

SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
"""

INSTALL_TABLES = ["mariadb-install-db", "--no-defaults", "--user=root", "--auth-root-authentication-method=socket", "--skip-test-db", "--skip-name-resolve"]

# Small and fast: what it holds is worth nothing when the tests are over.
DATABASE = [
    "mariadbd", "--no-defaults", "--user=root", "--skip-networking", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M",
    "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin", "--performance-schema=0",
]  # fmt: skip


@dataclass(frozen=True)
class Charged:
    """One start of a job, as sacct tells of it."""

    state: str
    elapsed: float
    """Its Elapsed, seconds."""
    held: float
    """Seconds from its Start until Slurm had the nodes back: where the job was requeued, until it came into the queue again. Elapsed ends when the requeue was
    asked for or the node was missed; the nodes are held, and the job is COMPLETING, until its last process has ended."""
    nodes: int


def charged(command: Callable[..., str], job_ids: Iterable[str]) -> list[Charged]:
    """All starts of these jobs, by time. command: runs one of Slurm's commands."""
    fields = "State,Submit,Start,ElapsedRaw,NNodes"
    words = ("env", "SLURM_TIME_FORMAT=%s", "sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", f"--format={fields}")
    rows = sorted((line.split("|") for job in job_ids for line in command(*words, f"--jobs={job}").splitlines()), key=lambda row: float(row[2]))
    found = []
    for (state, _, start, elapsed, nodes), following in itertools.zip_longest(rows, rows[1:]):
        requeued = state in ("REQUEUED", "NODE_FAIL", "PREEMPTED") and following is not None
        found.append(Charged(state, float(elapsed), float(following[1]) - float(start) if requeued else float(elapsed), int(nodes)))
    return found
