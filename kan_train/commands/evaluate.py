"""`kan evaluate`: measure a run, task by task; a table on the terminal, and a file for each task."""

import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kan_train import __version__
from kan_train.commands.output import columns
from kan_train.config import ConfigError, EvaluateConfig
from kan_train.evaluation import choice, perplexity
from kan_train.evaluation.results import EVALUATIONS, Result, compared, digest_of, read_result, shown, write_result
from kan_train.evaluation.score import longest_context
from kan_train.evaluation.tasks import PERPLEXITY, main_metric, questions_of, shots_of
from kan_train.inference.layout import require_one_process
from kan_train.inference.load import LoadedRun, load_run
from kan_train.parallel.runtime import launch_size


def run_evaluate(config: EvaluateConfig) -> int:
    """Measure every task, write its result, print the table. Returns the exit status."""
    config.validate()
    require_one_process("kan evaluate", launch_size())
    loaded = load_run(config.run, config.root, config.device, config.dtype, config.active_groves)
    folder = results_folder(config, loaded)
    # All data are looked at first: a missing file is told before an hour of measuring.
    work = [(task, _prepared(config, loaded, task)) for task in config.tasks]
    others = {task: _other(config, task) for task in config.tasks} if config.against else {}
    results = []
    for task, measure in work:
        result = _facts(config, loaded, task) | measure()
        if task in others:
            result["against"] = {"run": config.against} | compared(result, others[task])
        write_result(folder, result)
        results.append(result)
    print(table(results))
    print(f"{loaded.checkpoint}: results in {folder}", file=sys.stderr)
    if config.wandb != "off":
        _to_wandb(config, folder.parent, results)
    return 0


def results_folder(config: EvaluateConfig, loaded: LoadedRun) -> Path:
    """Where the results go."""
    if config.output:
        return Path(config.output)
    source = loaded.checkpoint
    if source.is_file():
        return source.with_name(f"{source.stem}.{EVALUATIONS}")
    return _run_dir(config.run, config.root) / EVALUATIONS


def _run_dir(run: str, root: str) -> Path:
    from kan_train.checkpoint import find_checkpoint
    from kan_train.checkpoint.stream import run_directory_of

    return run_directory_of(find_checkpoint("run", run, root), run, Path(root))


def _prepared(config: EvaluateConfig, loaded: LoadedRun, task: str) -> Callable[[], Result]:
    """What measures `task`, its data read."""
    if task == PERPLEXITY:
        corpus = perplexity.open_corpus(config.text, loaded.tokenizer.sha256)
        return lambda: _perplexity(config, loaded, corpus)
    questions = questions_of(config, task, loaded.tokenizer)
    return lambda: _choices(config, loaded, task, questions)


def _perplexity(config: EvaluateConfig, loaded: LoadedRun, corpus: Any) -> Result:
    if config.reading == "packed":
        with _progress(PERPLEXITY, corpus.stream("heldout").tokens) as advance:
            losses = perplexity.packed_documents(loaded.model, corpus, config.limit, batch_size=config.batch_size, advance=advance)
    else:
        documents = perplexity.heldout_documents(corpus, config.limit)
        with _progress(PERPLEXITY, sum(map(len, documents))) as advance:
            losses = perplexity.whole_documents(loaded.model, documents, corpus.bytes_of_tokens, batch_size=config.batch_size, advance=advance)
    return {"reading": config.reading, "corpus": str(corpus.folder), "corpus_sha256": corpus.hash} | perplexity.summary(losses, seed=config.seed)


def _choices(config: EvaluateConfig, loaded: LoadedRun, task: str, questions: list[Any]) -> Result:
    with _progress(task, len(questions)) as advance:
        scored = choice.score(loaded.model, loaded.tokenizer, questions, batch_size=config.batch_size, advance=advance)
    metric = main_metric(task)
    right = "".join("1" if one.right(metric) else "0" for one in scored)
    return choice.summary(scored, metric) | {"shots": shots_of(config, task), "questions_sha256": digest_of(questions), "right": right}


def _facts(config: EvaluateConfig, loaded: LoadedRun, task: str) -> Result:
    return {
        "task": task,
        "checkpoint": str(loaded.checkpoint), "step": loaded.step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "longest_context": longest_context(loaded.model),
        "config": dataclasses.asdict(config),
    }  # fmt: skip


def _other(config: EvaluateConfig, task: str) -> Result:
    path = _run_dir(config.against, config.root) / EVALUATIONS / f"{task}.json"
    if not path.is_file():
        raise ConfigError(f"against={config.against}: {path} is missing; measure it first with `kan evaluate run={config.against} tasks=[{task}]`")
    return read_result(path)


def table(results: list[Result]) -> str:
    """One line a task, and one for each of its categories; the interval is of 95%."""
    lines: list[tuple[str, ...]] = [("task", "metric", "value", "interval", "random", "majority", "n", "against")]
    for result in results:
        lines.append(_line(result["task"], result, result["metric"], result.get("against")))
        parts = result.get("categories") or (result.get("groups", {}) if len(result.get("groups", {})) <= 8 else {})
        lines += [_line(f"  {name}", each, result["metric"], None) for name, each in parts.items()]
    return columns(lines, right=(2, 4, 5, 6))


def _line(name: str, result: Result, metric: str, against: Result | None) -> tuple[str, ...]:
    measured, baselines = result[metric], result["baselines"]
    interval = "" if measured["interval"] is None else "{:.4f} .. {:.4f}".format(*measured["interval"])
    versus = f"{against['difference']:+.4f} (p = {against['p_value']:.3g})" if against else ""
    majority = f"{baselines['majority']:.4f}" if "majority" in baselines else ""
    count = result.get("questions", result.get("documents"))
    return name, metric, f"{measured['value']:.4f}", interval, f"{baselines['random']:.4f}", majority, f"{count:,}", versus


def _to_wandb(config: EvaluateConfig, run_dir: Path, results: list[Result]) -> None:
    """Into the summary of the run's own W&B page: W&B's steps must only grow, and those of a run that goes on are its own."""
    from kan_train.accounting.sinks.wandb import begin, end
    from kan_train.config.compose import from_yaml

    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"wandb={config.wandb}: {saved} is missing, without which the W&B run is not known; use wandb=off, or run=RUN without output")
    trained = from_yaml(saved.read_text(encoding="utf-8"))
    run = begin(run_dir, trained.run.name, trained, online=config.wandb == "online")
    run.summary.update({name: value for result in results for name, value in shown(result).items()})
    end(run, 0)


@contextlib.contextmanager
def _progress(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    parts = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True) as progress:
        number = progress.add_task(task, total=total)
        yield lambda count: progress.advance(number, count)
