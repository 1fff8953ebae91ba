"""Slurm: a job's script from a template in which every value is quoted, and thin wrappers of sbatch, squeue, sacct and scontrol."""

import hashlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError

from kan_train.config import ClusterConfig, Config, ConfigError
from kan_train.launch.spec import JobSpec, output_file, script_file, spec_file
from kan_train.launch.supervise import EXIT_DONE

TEMPLATE = "templates/slurm.sbatch.j2"
"""The shipped template, in this package."""

FIELDS = ("JobID", "JobArrayID", "State", "Reason", "NodeList", "TimeUsed", "TimeLeft", "RestartCount", "Name")
"""What `queue` tells of a job."""


class SlurmError(ConfigError):
    """A command of Slurm failed; the message is Slurm's own."""


class Raw(str):
    """Text that the template prints as it is: a directive or code, not a word of a shell command."""


# --- the script -----------------------------------------------------------------------------------------------------------------------------------------


def render(config: Config, spec: JobSpec, *, tasks: Sequence[JobSpec] = (), at_once: int | None = None) -> str:
    """The job's script. Whatever the template prints is quoted for the shell, but for what it marks as a directive, a comment or code.

    tasks: of an array job, each a run; `at_once` of them at most at the same time.

    ConfigError names cluster.template where that is not a template, or uses a value that there is not.
    """
    cluster = config.cluster
    try:
        return _environment().from_string(_template(cluster)).render(_values(config, spec) | _array(tasks, at_once))
    except TemplateError as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise ConfigError(f"cluster.template={cluster.template}{line}: {error.message}; use cluster.template='' for the shipped one") from error


def job_name(spec: JobSpec) -> str:
    """Name of all jobs of a run, and of no other's: `--dependency=singleton` starts one of a name at a time. Plain characters, whatever run.name has."""
    digest = hashlib.sha256(spec.run_dir.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"kan-{re.sub('[^A-Za-z0-9._-]', '_', spec.run_name)[:60]}-{digest}"


def _environment() -> Environment:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_quoted)
    environment.filters |= {"directive": _directive, "comment": _comment, "code": Raw}
    return environment


def _quoted(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, list | tuple):
        return shlex.join(map(str, value))
    return shlex.quote(str(value))


def _directive(value: object) -> Raw:
    # In an #SBATCH line a backslash is the only escape, of quotes too; nothing there is expanded.
    text = str(value)
    return Raw(text if re.fullmatch(r"[\w./:=+,@%&|*\[\]~^!()-]+", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"')


def _comment(value: object) -> Raw:
    return Raw(re.sub(r"[^\x20-\x7e]", "?", str(value)))


def _template(cluster: ClusterConfig) -> str:
    if not cluster.template:
        return resources.files("kan_train.launch").joinpath(TEMPLATE).read_text(encoding="utf-8")
    try:
        return Path(cluster.template).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cluster.template={cluster.template} cannot be read ({error}); use cluster.template='' for the shipped one") from error


def _values(config: Config, spec: JobSpec) -> dict[str, Any]:
    """All that a template may use."""
    cluster = config.cluster
    script = str(script_file(spec.run_dir, spec.job))
    container = _container(config, spec)
    srun = ["srun", f"--nodes={spec.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--label", *_cpus(cluster)]
    one = ["srun", "--nodes=1", "--ntasks=1", "--overlap"]  # on the node of the script, where Slurm puts a step of one task
    pyxis = cluster.container.runtime == "pyxis"
    return {
        "cluster": cluster,
        "title": f"Job {spec.job} of run {spec.run_name}",
        "job_name": job_name(spec),
        "options": _options(cluster),
        "gpus": _gpus(config),
        "output": _output(spec),
        "environment": list(_variables(cluster).items()),
        "working_directory": spec.working_directory,
        "spec": str(spec_file(spec.run_dir, spec.job)),
        "script": script,
        "python": spec.python,
        "every_node": [*srun, *container],
        "this_node": [*one, *container] if pyxis else container,
        # A job that is submitted by another takes its environment over: its count of restarts too.
        "sbatch": ["env", "--unset=SLURM_RESTART_COUNT", "sbatch", "--parsable", *sbatch_options(spec)],
        "exit_done": EXIT_DONE,
    }


def _array(tasks: Sequence[JobSpec], at_once: int | None) -> dict[str, Any]:
    """What a template may use of an array job; empty lists in any other."""
    if not tasks:
        return {"tasks": [], "task_logs": [], "array": ""}
    return {
        "title": f"{len(tasks)} runs of a sweep",
        "job_name": f"{job_name(tasks[0])}-sweep",  # not the name of the first run's own jobs, which its singleton dependency would wait for
        "output": _pattern(tasks[0], "%A_%a"),
        "tasks": [str(spec_file(task.run_dir, task.job)) for task in tasks],
        "task_logs": [str(output_file(task.run_dir, "").parent) for task in tasks],
        "array": f"0-{len(tasks) - 1}" + (f"%{at_once}" if at_once else ""),
    }


def _options(cluster: ClusterConfig) -> list[tuple[str, str]]:
    """(name, value) of the options that the settings ask for."""
    named = {name: getattr(cluster, name) for name in ("partition", "account", "qos", "time", "constraint", "reservation")}
    named |= {"mem": cluster.memory, "cpus-per-task": str(cluster.cpus_per_task or ""), "exclude": ",".join(cluster.exclude)}
    return [(name, value) for name, value in named.items() if value] + list(cluster.sbatch.items())


def _gpus(config: Config) -> str:
    """The value of --gpus-per-node; empty where the run is on CPUs."""
    cluster = config.cluster
    if config.run.device == "cpu":
        return ""
    return f"{cluster.device_type}:{cluster.devices_per_node}" if cluster.device_type else str(cluster.devices_per_node)


def _cpus(cluster: ClusterConfig) -> list[str]:
    # A step does not inherit the job's --cpus-per-task (since Slurm 22.05).
    return [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []


def _variables(cluster: ClusterConfig) -> dict[str, str]:
    network = cluster.network
    named = {"NCCL_SOCKET_IFNAME": network.interface, "GLOO_SOCKET_IFNAME": network.interface, "NCCL_IB_HCA": network.hca, "TMPDIR": cluster.scratch}
    return {name: value for name, value in named.items() if value} | network.environment | cluster.environment


def _container(config: Config, spec: JobSpec) -> list[str]:
    container = config.cluster.container
    if container.runtime == "none":
        return []
    if container.runtime == "pyxis":
        mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        return [f"--container-image={container.image}", *mounts, f"--container-workdir={spec.working_directory}", *container.options]
    mounts = [word for mount in container.mounts for word in ("--bind", mount)]
    devices = [] if config.run.device == "cpu" else ["--nv"]
    return ["apptainer", "exec", *devices, *mounts, "--pwd", spec.working_directory, *container.options, container.image]


def _output(spec: JobSpec) -> str:
    """The output as a pattern of Slurm's; empty where an #SBATCH line cannot hold it, which ends at a newline."""
    if "\\" in spec.run_dir:
        raise ConfigError(f"the run directory {spec.run_dir} has a backslash, which Slurm takes for its own in a file's name; use another run.name or run.root")
    return "" if "\n" in spec.run_dir else _pattern(spec)


def _pattern(spec: JobSpec, job_id: str = "%j") -> str:
    return str(output_file(spec.run_dir.replace("%", "%%"), job_id))


def sbatch_options(spec: JobSpec) -> list[str]:
    """Options that sbatch needs beside the script."""
    return [f"--output={_pattern(spec)}"] if "\n" in spec.run_dir else []


# --- Slurm's commands -----------------------------------------------------------------------------------------------------------------------------------


def command(words: Sequence[str], *, seconds: float = 60.0) -> str:
    """What a command of Slurm prints; SlurmError with its own words where it fails or is not there."""
    if shutil.which(words[0]) is None:
        raise SlurmError(f"{words[0]} is not on this machine: submit from a login node of the cluster, or use `kan launch local`")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} has not answered for {seconds:g} s: is Slurm's controller running? (`scontrol ping`)") from None
    if done.returncode != 0:
        raise SlurmError(f"{words[0]}: {' '.join((done.stderr or done.stdout).split()) or f'status {done.returncode}'}")
    return done.stdout


def submit(script: Path, spec: JobSpec, options: Sequence[str] = ()) -> str:
    """Submit a script; returns the job's id."""
    return command(["sbatch", "--parsable", *sbatch_options(spec), *options, "--", str(script)]).strip().partition(";")[0]


def verdict(script: Path, spec: JobSpec, options: Sequence[str] = ()) -> str:
    """What Slurm says about a script (`--test-only`) without taking it: when it would start, and where. SlurmError with its reason where it refuses."""
    words = ["sbatch", "--test-only", *sbatch_options(spec), *options, "--", str(script)]
    if shutil.which("sbatch") is None:
        return command(words)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    text = " ".join((done.stderr or done.stdout).split()).removeprefix("sbatch: ")
    if done.returncode != 0:
        raise SlurmError(text)
    return text


def queue(*, ids: Sequence[str] = (), name: str = "") -> list[dict[str, str]]:
    """Jobs that are waiting, running or have just ended, by their ids or their name: one dictionary of FIELDS each, the tasks of an array too."""
    chosen = [f"--jobs={','.join(ids)}"] if ids else []
    chosen += [f"--name={name}"] if name else []
    # Between fields a character that no name has.
    text = command(["squeue", "--noheader", "--states=all", "--array", *chosen, f"--Format={','.join(f'{field}:|' for field in FIELDS)}"])
    return [dict(zip(FIELDS, (part.strip() for part in line.split("|")), strict=False)) for line in text.splitlines() if line.strip()]


def alive(jobs: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Of `queue`'s jobs those that will still write to their run."""
    return [job for job in jobs if job["State"] in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")]


def accounting(ids: Sequence[str]) -> list[dict[str, str]]:
    """What sacct knows of jobs, all their starts included; SlurmError where the cluster keeps no accounts."""
    fields = ("JobID", "State", "ExitCode", "Start", "End", "Elapsed", "NodeList")
    text = command(["sacct", "--parsable2", "--noheader", "--duplicates", f"--jobs={','.join(ids)}", f"--format={','.join(fields)}"])
    return [dict(zip(fields, line.split("|"), strict=False)) for line in text.splitlines() if line]


def requeue(job_id: str) -> None:
    """Put a running job back into the queue; it starts again under the same id."""
    command(["scontrol", "requeue", job_id])


def cancel(job_id: str, *, signal: str = "") -> None:
    """Cancel a job, or send a signal to its steps."""
    command(["scancel", *([f"--signal={signal}"] if signal else []), job_id])
