"""Commands that stand in for others in PATH, and a trainer that trains nothing: what the launcher does around them is then seen in a second."""

import json
import os
import sys
from pathlib import Path

PYTHON = """\
#!/bin/sh
# Trainers are the stub; all else is what it is.
case "$*" in
    *"-m kan_train train "*) exec {python} {trainer} {folder} "$@" ;;
    *) exec {python} "$@" ;;
esac
"""

TRAINER = '''\
import json, os, signal, sys, time
from pathlib import Path

folder, words = Path(sys.argv[1]), sys.argv[2:]
attempt = int(os.environ["TORCHELASTIC_RUN_ID"].rpartition(".")[2])
rank = int(os.environ["RANK"])
plan = json.loads((folder / "plan.json").read_text())
plan = plan[min(attempt, len(plan) - 1)]
signals = []

def save(step):
    if rank == 0:
        target = folder / "runs" / "first" / "checkpoints" / f"step-{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        (target / "manifest.json").write_text("{}")

def leave(code):
    with (folder / f"seen-{attempt}-{rank}.json").open("w") as file:
        json.dump({"words": words, "signals": signals, "environment": dict(os.environ), "directory": os.getcwd()}, file)
    sys.exit(code)

for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(signal.Signals(number).name))
print(f"rank {rank} begins", flush=True)
(folder / f"begun-{attempt}-{rank}").touch()
end = time.monotonic() + plan.get("seconds", 0)
while time.monotonic() < end:
    time.sleep(0.05)
    if signals:
        time.sleep(0.5)  # saving
        save(77)
        leave(75)
if "save" in plan:
    save(plan["save"])
leave(plan.get("exit", 0))
'''

SSH = """\
#!/bin/sh
# As ssh does: options, a host, and words that the shell there reads, joined by spaces.
printf '%s\\n' "$*" >>"$SSH_CALLS"
while [ "${1#-}" != "$1" ]; do shift 2; done
shift
exec sh -c "$*"
"""


def install(folder: Path, name: str, text: str) -> Path:
    """Write an executable `name` into `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def stub_python(folder: Path, plan: list[dict]) -> Path:
    """An interpreter whose trainers do in their n-th start what `plan[n]` says: wait `seconds`, `save` a step, `exit` with a status.

    A signal makes them save step 77 and leave with 75. Each leaves what it saw in seen-<start>-<rank>.json.
    """
    (folder / "plan.json").write_text(json.dumps(plan))
    trainer = folder / "trainer.py"
    trainer.write_text(TRAINER)
    return install(folder, "python", PYTHON.format(python=sys.executable, trainer=trainer, folder=folder))


def seen(folder: Path, start: int, rank: int) -> dict:
    """What a trainer saw."""
    return json.loads((folder / f"seen-{start}-{rank}.json").read_text())


def path_with(folder: Path) -> str:
    """PATH with the commands of `folder` first."""
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


SQUEUE = """\
#!/bin/sh
# Prints what the test wrote, in the fields that the launcher asks for.
printf '%s\\n' "squeue $*" >>"$CALLS"
cat "$QUEUE" 2>/dev/null
exit 0
"""

SBATCH = """\
#!/bin/sh
printf '%s\\n' "sbatch $*" >>"$CALLS"
count=$(grep -c ^sbatch "$CALLS")
echo $((100 + count))
"""

SCANCEL = """\
#!/bin/sh
# The job leaves the queue at once, as one that had saved.
printf '%s\\n' "scancel $*" >>"$CALLS"
: >"$QUEUE"
"""

REFUSED = """\
#!/bin/sh
echo "Slurm accounting storage is disabled" >&2
exit 1
"""


class Slurm:
    """Slurm's commands, as stubs: what they were called with, and a queue that tests write."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.calls_file, self.queue_file = folder / "calls", folder / "queue"
        self.calls_file.touch()
        for name, text in (("squeue", SQUEUE), ("sbatch", SBATCH), ("scancel", SCANCEL), ("sacct", REFUSED)):
            install(folder / "slurm-bin", name, text)
        monkeypatch.setenv("PATH", path_with(folder / "slurm-bin"))
        monkeypatch.setenv("CALLS", str(self.calls_file))
        monkeypatch.setenv("QUEUE", str(self.queue_file))

    def calls(self, command: str) -> list[str]:
        """Words that `command` was called with, without the command."""
        return [line.removeprefix(f"{command} ") for line in self.calls_file.read_text().splitlines() if line.startswith(f"{command} ")]

    def queue(self, **jobs: str) -> None:
        """What squeue prints from now on: id -> "STATE" or "STATE reason"; an id that begins with "job" is without that."""
        from kan_train.launch.slurm import FIELDS

        lines = []
        for name, text in jobs.items():
            state, _, reason = text.partition(" ")
            known = {"JobID": name.removeprefix("job"), "JobArrayID": name.removeprefix("job"), "State": state, "Reason": reason or "None"}
            lines.append("".join(f"{known.get(field, '')}|" for field in FIELDS))
        self.queue_file.write_text("\n".join(lines) + "\n")
