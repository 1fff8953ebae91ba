"""What `kan cost report`, `watch` and `sync` can be asked, and the texts that teach them. Nothing heavy is imported before a command runs."""

import argparse
from pathlib import Path
from typing import Any

from kan_train.commands.checkpoint_help import AddCommand

REPORT_TEXT = """\
Write one HTML page of a run, or of several side by side: what a token cost as the run went on, where the money went, loss against dollars, tokens and
time, throughput and share of the peak, load of the groves, and everything that happened. The page needs no network and nothing beside it.

  kan cost report first                             runs/first/report.html
  kan cost report first --price 2.35                at $2.35 a device-hour, whatever the run recorded
  kan cost report first second -o both.html         two runs side by side
  kan cost report first -o - | gzip > page.html.gz  on standard output

Without a price it shows device-hours. The numbers are those of `kan cost show`; docs/cost.md says what they mean.
"""

WATCH_TEXT = """\
Show a run as it goes on, in the terminal: loss, tokens a second, what was spent, the forecast of the end, and what happened last. The run's
report.html is written again as well, and reads itself again in a browser.

  kan cost watch first               until the run is finished; Ctrl-C leaves the run alone
  kan cost watch first --every 60
  kan cost watch first --once        what there is now, for a script

It reads metrics.jsonl and ledger.jsonl alone: a run that has not begun yet, or is being started again, is waited for.
"""

SYNC_TEXT = """\
Replay metrics.jsonl and the ledger's events into W&B, what was not sent before: a second call sends nothing, and one that was broken off is gone on with.

  kan cost sync first                           needs `wandb login`, or WANDB_API_KEY
  kan cost sync first --offline                 into runs/first/wandb, for `wandb sync` on a machine with a network
  kan cost sync first --project llm --entity me
  kan cost sync first --workspace               also a workspace with the charts of a report (pip install 'kan-train[wandb]')
  kan cost sync first --workspace-json ws.json  that workspace as JSON: nothing is sent

The x-axis of every chart is tokens. Rows of steps that a restart or rewind threw away are not sent.
"""


def add_report_commands(group: Any, add_command: AddCommand) -> None:
    """Add `report`, `watch` and `sync` to the commands of `kan cost`."""
    report = _add(group, add_command, "report", "one page of a run, or of several side by side", REPORT_TEXT, "run_report", several=True)
    report.add_argument("--price", metavar="NAME|NUMBER", help="price of a device-hour (default: what the run recorded)")
    where = "page to write, or - for standard output (default: report.html in the run directory, of several runs in DIR)"
    report.add_argument("-o", "--output", metavar="FILE", help=where)

    watch = _add(group, add_command, "watch", "a run as it goes on", WATCH_TEXT, "run_watch", several=False)
    watch.add_argument("--price", metavar="NAME|NUMBER", help="price of a device-hour (default: what the run recorded)")
    watch.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="seconds between two looks (default: %(default)g)")
    watch.add_argument("--once", action="store_true", help="show what there is now, and leave")

    sync = _add(group, add_command, "sync", "replay it into W&B", SYNC_TEXT, "run_sync", several=True)
    sync.add_argument("--offline", action="store_true", help="write an offline run instead of sending")
    sync.add_argument("--project", metavar="NAME", help="W&B project (default: logging.wandb_project of the run)")
    sync.add_argument("--entity", metavar="NAME", help="W&B entity (default: logging.wandb_entity of the run)")
    sync.add_argument("--workspace", action="store_true", help="also build and publish a workspace of the project")
    sync.add_argument("--workspace-json", type=Path, metavar="FILE", help="write the workspace as JSON and leave")


def _add(group: Any, add_command: AddCommand, name: str, help_line: str, text: str, command: str, *, several: bool) -> argparse.ArgumentParser:
    def run(arguments: argparse.Namespace) -> int:
        from kan_train.commands import cost_report

        called = {name: value for name, value in vars(arguments).items() if name not in ("run", "parser", "runs")}
        return int(getattr(cost_report, command)(arguments.runs, **called))

    parser = add_command(group, name, help_line, text, run)
    if several:
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run, by its name or path")
    else:
        parser.add_argument("runs", metavar="RUN", help="run, by its name or path")
    parser.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="folder of run directories (default: %(default)s)")
    return parser
