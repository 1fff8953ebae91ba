"""A real Slurm of several nodes on one machine: no systemd, no container engine, nothing outside its own folder.

Each node is a slurmd in its own mount, UTS and PID namespace, with a hostname and an /etc/hosts of its own. Killing the first process of the namespace ends
all in it at once: a power cut. (Its connections are closed by the kernel, as when a machine crashes; a cable that is pulled is heard of later.)

Every process here dies with the one that started the cluster, even if that one is killed: nothing is left behind.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from slurm_proofs import accounts
from slurm_proofs.ports import reserve_ports

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "setpriv")

INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge util-linux"

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

CREDENTIAL_SECONDS = 5
"""Slurm's cred_expire. A requeued job waits as long before it may start again: 120 s on a cluster that does not set it, or below 5."""

DOWN_SECONDS = 6
"""A node that does not answer for so long is down."""

GRACE_SECONDS = 30
"""From the SIGTERM to the SIGKILL of a job that is preempted."""

START_SECONDS = 60

CONFIGURATION = """\
ClusterName=proof
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
# Neither needs control groups; and no pinning, for the CPUs that are claimed here do not exist.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounts}
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_setup_env_fail,nohold_on_prolog_fail
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
# Jobs of two clusters on one machine have different numbers, and so different ports where these derive from them.
FirstJobId={port}
SlurmctldTimeout=10
SlurmdTimeout={down}
KillWait=30
MessageTimeout=5
BatchStartTimeout=10
CompleteWait=0
MinJobAge=3600
InactiveLimit=0
TCPTimeout=1
DefMemPerCPU=100
NodeName=DEFAULT CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 State=UNKNOWN
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=train Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
{apart}
"""

# The namespace's first process: it names the node, shows it its own /etc/hosts, and reaps what is left of the jobs.
FIRST_PROCESS = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && { "$@" & wait $!; }'


class SlurmMissing(RuntimeError):
    """The machine cannot run the cluster; says what to install."""


class ClusterFailed(RuntimeError):
    """Slurm did not do what was asked of it in time."""


class Cluster:
    """Controller, `nodes` nodes n0, n1, ... and two partitions: jobs in `urgent` preempt those in `train` (SIGTERM first).

    `apart` more nodes are in a partition of this name: a job that is alone there gets the same nodes again as long as they are good.
    """

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 4, apart: int = 0, accounts: bool = False) -> None:
        """folder: for everything the cluster writes; it must not exist or be empty. cpus: what a node claims to have. accounts: whether sacct knows jobs."""
        _require(accounts)
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(nodes + apart)]
        self.apart = self.nodes[nodes:]
        self.cpus, self.accounts = cpus, accounts
        self.port, self._reserved = reserve_ports(2 + nodes + apart)
        self.environment = {**os.environ, "PATH": SEARCH_PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        """For every command that talks to this cluster."""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything; returns when all nodes are up."""
        self._configure()
        munge = [f"--{name}={self.folder}/munge{suffix}" for name, suffix in _MUNGE_FILES.items()]
        # --force: it would refuse a socket below a folder that others may not enter, which pytest's are.
        self._spawn("munged", "munged", "--foreground", "--force", "--num-threads=2", *munge)
        self._await("munged to listen", (self.folder / "munge.sock").exists, 10)
        if self.accounts:
            self._start_accounts()
        self._start_controller()
        for node in self.nodes:
            self._start_node(node)
        self._await_nodes(self.nodes)

    def stop(self) -> None:
        """End every process of the cluster, those of its jobs included."""
        for name in [*self._processes]:
            self._kill(name)
        self._reserved.close()

    def power_cut(self, node: str) -> float:
        """End everything that runs on `node`, at once. Returns the time when it was done (unix)."""
        self._kill(node)
        return time.time()

    def start_node(self, node: str) -> None:
        """Switch `node` on again; returns when Slurm may use it."""
        self._start_node(node)
        self._await_nodes([node])

    def restart_controller(self) -> float:
        """Stop slurmctld in good order, so that it saves its state, and start it again. Returns the time between the two (unix)."""
        controller = self._processes.pop("slurmctld")
        controller.terminate()
        controller.wait(30)
        between = time.time()
        self._start_controller()
        self._await("the controller to answer", self._controller_answers, START_SECONDS)
        return between

    def command(self, *words: str) -> str:
        """Run one of Slurm's commands; its output. ClusterFailed with what it complained of where its status is not 0."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise ClusterFailed(f"{' '.join(words)}: exit status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job: JobState, Restarts, NodeList, Reason, ..."""
        words = self.command("scontrol", "show", "job", "--oneliner", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def pid(self, name: str) -> int:
        """The first process of munged, slurmctld or a node."""
        return self._processes[name].pid

    def log(self, name: str = "slurmctld") -> str:
        """The end of a daemon's log: slurmctld, munged, or slurmd-n0, ..."""
        path = self.folder / "log" / f"{name}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def node_states(self) -> dict[str, str]:
        """Node -> state as sinfo names it: idle, allocated, mixed, down, ..., with a `*` where it does not answer."""
        lines = self.command("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def _configure(self) -> None:
        for name in ("log", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        address = {node: f"127.0.0.{11 + number}" for number, node in enumerate(self.nodes)}
        own = "\n".join(f"NodeName={node} NodeHostname={node} NodeAddr={address[node]} Port={self.port + 1 + i}" for i, node in enumerate(self.nodes))
        apart = f"PartitionName=apart Nodes={','.join(self.apart)} MaxTime=INFINITE State=UP PreemptMode=OFF" if self.apart else ""
        text = CONFIGURATION.format(
            host=_short_hostname(), port=self.port, folder=self.folder, cpus=self.cpus, nodes=own, apart=apart,
            accounts=accounts.SLURM.format(port=self.port + 1 + len(self.nodes), folder=self.folder) if self.accounts else accounts.NONE,
            names=",".join(node for node in self.nodes if node not in self.apart),
            cred_expire=CREDENTIAL_SECONDS, down=DOWN_SECONDS, grace=GRACE_SECONDS,
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        hosts = ["127.0.0.1 localhost", *(f"{address[node]} {node}" for node in self.nodes)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "munge.key").touch(mode=0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(128))

    def _start_controller(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))

    def _start_accounts(self) -> None:
        folder, socket_file = self.folder, self.folder / "mysql.sock"
        (folder / "slurmdbd.conf").touch(mode=0o600)
        (folder / "slurmdbd.conf").write_text(accounts.SLURMDBD.format(host=_short_hostname(), port=self.port + 1 + len(self.nodes), folder=folder))
        subprocess.run([*accounts.INSTALL_TABLES, f"--datadir={folder}/mysql"], env=self.environment, capture_output=True, check=True, timeout=START_SECONDS)
        self._spawn("mariadbd", *accounts.DATABASE, f"--datadir={folder}/mysql", f"--socket={socket_file}", f"--pid-file={folder}/mysql.pid")
        self._await("the database to listen", socket_file.exists, START_SECONDS)
        self._spawn("slurmdbd", "env", f"MYSQL_UNIX_PORT={socket_file}", "slurmdbd", "-D")
        self._await("slurmdbd to know the cluster", self._cluster_added, START_SECONDS)

    def _cluster_added(self) -> bool:
        return subprocess.run(["sacctmgr", "--immediate", "add", "cluster", "proof"], env=self.environment, capture_output=True).returncode == 0

    def _start_node(self, node: str) -> None:
        slurmd = ("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))
        namespace = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "private")
        self._spawn(node, *namespace, "bash", "-c", FIRST_PROCESS, "node", node, str(self.folder / "hosts"), *slurmd)

    def _spawn(self, name: str, *command: str) -> None:
        # In a session of its own: a Ctrl-C is for the tests, which then stop the cluster in order.
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name)
        first = _children(process.pid) if name in self.nodes else []
        # With its first process a namespace ends whole, and only then unshare, which waits for it.
        for pid in first or [process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait(10)

    def _await_nodes(self, nodes: list[str]) -> None:
        def up() -> bool:
            if not self._controller_answers():
                return False
            states = self.node_states()
            return all(states.get(node) in ("idle", "allocated", "mixed", "completing") for node in nodes)

        self._await(f"{', '.join(nodes)} to be up", up, START_SECONDS)

    def _controller_answers(self) -> bool:
        return subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True).stdout.count(b"is UP") > 0

    def _await(self, what: str, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if ended := [name for name, process in self._processes.items() if process.poll() is not None]:
                raise ClusterFailed(f"{ended[0]} ended while waiting for {what}:\n{self._told(ended[0])}")
            if time.monotonic() > deadline:
                raise ClusterFailed(f"waited {seconds:.0f} s for {what}:\n{self._told('slurmctld')}")
            time.sleep(0.05)

    def _told(self, name: str) -> str:
        output = self.folder / "log" / f"{name}.out"
        return (output.read_text(errors="replace")[-2000:] if output.exists() else "") + self.log(f"slurmd-{name}" if name in self.nodes else name)


_MUNGE_FILES = {"key-file": ".key", "socket": ".sock", "pid-file": ".pid", "log-file": ".log", "seed-file": ".seed"}


def _require(with_accounts: bool) -> None:
    programs, packages = (PROGRAMS + accounts.PROGRAMS, f"{INSTALL} {accounts.PACKAGES}") if with_accounts else (PROGRAMS, INSTALL)
    missing = [program for program in programs if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        raise SlurmMissing(f"the tests of the launcher need a real Slurm, and {', '.join(missing)} is not installed; install it as root with: {packages}")
    if os.geteuid() != 0:
        raise SlurmMissing("the tests of the launcher run a real Slurm in namespaces of its own, which only root may make; run them as root in a container")


def _short_hostname() -> str:
    return socket.gethostname().partition(".")[0]


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
