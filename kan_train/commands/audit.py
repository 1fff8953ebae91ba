"""`kan audit`: what a run's edge functions and groves have become; audit.json and pictures, and the main figures on the terminal."""

import dataclasses
import datetime
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kan_train import __version__
from kan_train.audit.audit import Settings, audit, readings
from kan_train.audit.describe import SUMMARISED
from kan_train.audit.functions import require_groves
from kan_train.audit.pictures import draw_all
from kan_train.audit.prune import ORDERS
from kan_train.audit.results import AUDIT, write_audit
from kan_train.commands.output import columns
from kan_train.config import ConfigError
from kan_train.evaluation.perplexity import open_corpus
from kan_train.evaluation.results import require_folder
from kan_train.inference.load import LoadedRun, load_run


def run_audit(run: str, *, output: Path | None, root: str, text: str, device: str, **settings: Any) -> int:
    """Audit `run` and write the result; `settings`: those of `kan_train.audit.audit.Settings`. Returns the exit status."""
    asked = Settings(**settings)
    for option, value in (("--sequences", asked.sequences), ("--batch-size", asked.batch_size)):
        if value < 1:
            raise ConfigError(f"{option} {value} must be at least 1; use {option} 8")
    if not 1 <= asked.top <= SUMMARISED:
        raise ConfigError(f"--top {asked.top} must be between 1 and {SUMMARISED}; use --top 12")
    if asked.seed < 0:
        raise ConfigError(f"--seed {asked.seed} must not be negative; use --seed 0")
    if output is not None:
        require_folder(output, "--output")
    loaded = load_run(run, root, device)
    asked = dataclasses.replace(asked, reset_at_documents=loaded.reset_at_documents)
    require_groves(loaded.model.config)
    corpus = open_corpus(text, loaded.tokenizer.sha256)
    folder = output or _folder(run, root, loaded)
    console = Console(stderr=True)
    parts = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("readings of the text, left"), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("audit", total=readings(asked))
        found = audit(loaded.model, loaded.tokenizer, corpus, asked, lambda: progress.advance(bar))
    facts = {
        "checkpoint": str(loaded.checkpoint), "step": loaded.step, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": __version__, "corpus": str(corpus.folder), "corpus_sha256": corpus.hash,
    }  # fmt: skip
    pictures = draw_all(folder, found)
    path = write_audit(folder, facts | found | {"pictures": pictures})
    print(table(found))
    print(f"{loaded.checkpoint}: {path} and {len(pictures)} pictures beside it", file=sys.stderr)
    return 0


def _folder(run: str, root: str, loaded: LoadedRun) -> Path:
    from kan_train.checkpoint import find_checkpoint
    from kan_train.checkpoint.stream import run_directory_of

    if loaded.checkpoint.is_file():
        return loaded.checkpoint.with_name(f"{loaded.checkpoint.stem}.{AUDIT}")
    return run_directory_of(find_checkpoint("run", run, root), run, Path(root)) / AUDIT


def table(found: dict[str, Any]) -> str:
    """The main figures as text: functions and groves by layer, then the loss without functions."""
    parts = [columns(_functions(found), right=(1, 2, 3, 4)) if found["functions"] else "The groves' activation is plain silu: there are no learned functions."]
    parts.append(columns(_groves(found), right=(1, 2, 3, 4, 5)))
    if found["pruning"] is not None:
        parts.append(columns(_pruning(found["pruning"]), right=(0, 1, 2)))
    return "\n\n".join(parts)


def _functions(found: dict[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("layer", "functions", "importance", "hold 90%", "outside grid", "shapes of the most important")]
    for layer in found["functions"]:
        shapes = ", ".join(f"{count} {name}" for name, count in layer["shapes"].items()) or "none has any"
        facts = (f"{layer['importance']:.4g}", f"{layer['holds_90_percent']:.1%}", f"{layer['outside_grid']:.1%}")
        lines.append((str(layer["layer"]), f"{layer['functions']:,}", *facts, shapes))
    return lines


def _groves(found: dict[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("layer", "unused groves", "load CV", "bits: token", "byte class", "document", "entropy of the load")]
    for layer in found["groves"]:
        known = layer["mutual_information"]
        bits = (f"{known[name]['excess']:.3f}" for name in ("token", "byte class", "document"))
        lines.append((str(layer["layer"]), str(len(layer["unused"])), f"{layer['load_cv']:.3f}", *bits, f"{layer['load_bits']:.3f}"))
    return lines


def _pruning(pruning: dict[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("zeroed", "functions", "loss", "95% interval of the rise", "order")]
    lines.append(("0%", "0", f"{pruning['loss']:.4f}", "", ""))
    for row in pruning["rows"]:
        interval = "" if row["interval"] is None else "{:+.4f} .. {:+.4f}".format(*row["interval"])
        loss = f"{pruning['loss'] + row['rise']:.4f}"
        lines.append((f"{row['share']:.0%}", f"{row['functions']:,}", loss, interval, ORDERS.get(row["order"], "all")))
    return lines
