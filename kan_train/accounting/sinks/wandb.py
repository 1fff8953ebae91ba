"""W&B as a replay of metrics.jsonl: the same rows, in the same order, under a run id that a restart keeps.

W&B's own step must only ever grow, and a resumed run goes back to its checkpoint's step. So W&B's step is the number of the row's line in
metrics.jsonl, and the x-axis of every chart is `tokens`. Offline, W&B cannot resume: each segment is a folder of its own below
RUN_DIRECTORY/wandb, all with one id and without overlapping steps, so that `wandb sync` puts them together.

Figures of throughput stand under throughput/ there, so that W&B shows them together; metrics.jsonl's own names never change. What happened since
the row before is beside it: events/save, how often, and events/save_seconds, how long.

W&B must never cost a run: whatever it raises is said once, and the run goes on with metrics.jsonl alone.
"""

import sys
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kan_train.accounting.lines import Row, count_lines, read_lines
from kan_train.accounting.sinks.jsonl import METRICS
from kan_train.config import Config

RUN_ID = "wandb_id.txt"
"""File of a run directory that holds the run's W&B id."""

LOGGED = "wandb_lines.txt"
"""File of a run directory that holds how many lines of metrics.jsonl W&B was given, or need not be given."""

INIT_SECONDS = 30
"""How long to wait for the server."""

THROUGHPUT = ("tokens_per_second", "tokens_per_second_per_device", "flops_per_token", "mfu", "mfu_causal", "hfu")
"""What W&B shows as throughput/NAME."""

GROUPS = ("cost", "throughput", "sparsity", "load", "energy", "events", "validation", "evaluation", "time", "memory")
"""Groups of figures, each a section of W&B's page, all against tokens."""


def shown_row(row: Row, events: Row | None = None) -> Row:
    """A row of metrics.jsonl under the names that W&B shows, with what `events` counted since the row before."""
    return {f"throughput/{name}" if name in THROUGHPUT else name: value for name, value in row.items()} | (events or {})


def count_event(counts: Row, kind: str, seconds: float | None) -> None:
    """Add an event to what a row is to be told of: events/KIND, and events/KIND_seconds where it took any."""
    counts[f"events/{kind}"] = counts.get(f"events/{kind}", 0) + 1
    if seconds is not None:
        counts[f"events/{kind}_seconds"] = counts.get(f"events/{kind}_seconds", 0.0) + seconds


def logged_lines(run_dir: Path) -> int | None:
    """How many lines of metrics.jsonl W&B has under the run's id; None where nobody kept it: an older version, which logged all."""
    if not (run_dir / RUN_ID).exists():
        return 0
    return int((run_dir / LOGGED).read_text()) if (run_dir / LOGGED).exists() else None


def set_logged_lines(run_dir: Path, lines: int) -> None:
    """Remember it."""
    draft = run_dir / f".{LOGGED}"
    draft.write_text(f"{lines}\n")
    draft.replace(run_dir / LOGGED)


def begin(run_dir: Path, name: str, config: Config, *, online: bool) -> Any:
    """Begin the W&B run of `run_dir`, or go on with it, with tokens as the x-axis of everything; raises what W&B does.

    The run keeps its id for ever: it is written down once W&B has begun with it.
    """
    import wandb  # takes half a second: loaded only where it is asked for

    path = run_dir / RUN_ID
    run_id = path.read_text().strip() if path.exists() else uuid.uuid4().hex[:12]
    # Its console capture, and its own messages, would fight with the live progress: those of the run, and those of the library itself.
    wandb.setup(wandb.Settings(silent=True))
    run = wandb.init(
        project=config.logging.wandb_project,
        entity=config.logging.wandb_entity,
        id=run_id,
        name=name,
        dir=str(run_dir),
        mode="online" if online else "offline",
        # Offline, W&B ignores this with a warning.
        resume="allow" if online else None,
        reinit="create_new",
        config=asdict(config),
        settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
    )
    if not path.exists():
        set_logged_lines(run_dir, 0)
        path.write_text(f"{run_id}\n")
    run.define_metric("tokens")
    for group in (*(f"{group}/*" for group in GROUPS), "*"):
        run.define_metric(group, step_metric="tokens")
    return run


def log(run: Any, row: Row, line: int) -> None:
    """Send the row of line `line` of metrics.jsonl."""
    # Committed at once: W&B would otherwise hold the row back until the next one, and a killed run would lose it.
    run.log(row, step=line, commit=True)


def end(run: Any, exit_code: int) -> None:
    """Finish `run`, and with it W&B in this process: on a busy machine `finish` comes back before the last rows are on the disk."""
    import wandb

    run.finish(exit_code=exit_code)
    wandb.teardown()


class WandbSink:
    """Logs rows to W&B. Those that were written without it, by a start before or after W&B failed, are replayed first."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self._run: Any = None
        self._line = 0
        self._events: Row = {}

    def start(self, start: Row) -> None:
        """Begin, or go on with, the run's W&B run. The lines that metrics.jsonl holds already are not sent again."""
        self._line = count_lines(self.run_dir / METRICS)
        self._guarded(self._begin)

    def write(self, row: Row) -> None:
        """Log `row`, which is the next line of metrics.jsonl."""
        line, self._line = self._line, self._line + 1
        if self._run is not None:
            shown, self._events = shown_row(row, self._events), {}
            self._guarded(lambda: self._log(shown, line))

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """Told beside the next row."""
        count_event(self._events, kind, fields.get("seconds"))

    def close(self, end: Row) -> None:
        """Finish: a failed run is marked as such."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=0 if end["status"] == "finished" else 1))

    def _begin(self) -> None:
        online, logged = self.config.logging.wandb == "online", logged_lines(self.run_dir)
        self._run = begin(self.run_dir, self.config.run.name, self.config, online=online)
        where = self._run.url if online else f"offline; to upload it: wandb sync {Path(self._run.dir).parent}"
        print(f"W&B: {where}", flush=True)
        if logged is None:
            set_logged_lines(self.run_dir, self._line)
        elif logged < self._line:
            for line, row in enumerate(read_lines(self.run_dir / METRICS)):
                if line >= logged:
                    self._log(shown_row(row), line)

    def _log(self, shown: Row, line: int) -> None:
        log(self._run, shown, line)
        set_logged_lines(self.run_dir, line + 1)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"kan: W&B failed ({reason}); the run goes on, metrics.jsonl has everything", file=sys.stderr)
