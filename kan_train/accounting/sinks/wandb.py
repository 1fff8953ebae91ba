"""W&B as a replay of metrics.jsonl: the same rows, in the same order, under a run id that a restart keeps.

W&B's own step must only ever grow, and a resumed run goes back to its checkpoint's step. So W&B's step is the number of the row's line in
metrics.jsonl, and the x-axis of every chart is `tokens`. Offline, W&B cannot resume: each segment is a folder of its own below
RUN_DIRECTORY/wandb, all with one id and without overlapping steps, so that `wandb sync` puts them together.

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

INIT_SECONDS = 30
"""How long to wait for the server."""


class WandbSink:
    """Logs rows to W&B. The rows of segments that ran without W&B are replayed first."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self._run: Any = None
        self._line = 0

    def start(self, start: Row) -> None:
        """Begin, or go on with, the run's W&B run. The lines that metrics.jsonl holds already are not sent again."""
        self._line = count_lines(self.run_dir / METRICS)
        self._guarded(self._begin)

    def write(self, row: Row) -> None:
        """Log `row`, which is the next line of metrics.jsonl."""
        line, self._line = self._line, self._line + 1
        if self._run is not None:
            self._guarded(lambda: self._log(row, line))

    def event(self, kind: str, fields: dict[str, Any]) -> None:
        """Validations are in the rows; the other events are the ledger's."""

    def close(self, end: Row) -> None:
        """Finish: a failed run is marked as such."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=0 if end["status"] == "finished" else 1))

    def _begin(self) -> None:
        import wandb  # takes half a second: loaded only where it is asked for

        logging, path = self.config.logging, self.run_dir / RUN_ID
        known = path.exists()
        if not known:
            path.write_text(f"{uuid.uuid4().hex[:12]}\n")
        self._run = wandb.init(
            project=logging.wandb_project,
            entity=logging.wandb_entity,
            id=path.read_text().strip(),
            name=self.config.run.name,
            dir=str(self.run_dir),
            mode="online" if logging.wandb == "online" else "offline",
            # Offline, W&B ignores this with a warning.
            resume="allow" if logging.wandb == "online" else None,
            reinit="create_new",
            config=asdict(self.config),
            # Its console capture, and its own messages, would fight with the live progress.
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
        )
        where = self._run.url if logging.wandb == "online" else f"offline; to upload it: wandb sync {Path(self._run.dir).parent}"
        print(f"W&B: {where}", flush=True)
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        if not known:
            for line, row in enumerate(read_lines(self.run_dir / METRICS)):
                self._log(row, line)

    def _log(self, row: Row, line: int) -> None:
        # Committed at once: W&B would otherwise hold the row back until the next one, and a killed run would lose it.
        self._run.log(row, step=line, commit=True)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"kan: W&B failed ({reason}); the run goes on, metrics.jsonl has everything", file=sys.stderr)
