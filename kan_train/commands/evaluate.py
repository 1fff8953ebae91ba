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
from kan_train.config import Config, ConfigError, EvaluateConfig
from kan_train.evaluation import choice, perplexity
from kan_train.evaluation.results import (
    EVALUATIONS,
    Result,
    compared,
    digest_of,
    read_result,
    require_comparable,
    require_folder,
    shown,
    write_result,
)
from kan_train.evaluation.score import longest_context
from kan_train.evaluation.tasks import PERPLEXITY, main_metric, origin_of, questions_of, shots_of
from kan_train.inference.layout import require_one_process
from kan_train.inference.load import LoadedRun, Source, find_source, load_run
from kan_train.parallel.runtime import launch_size


def run_evaluate(config: EvaluateConfig) -> int:
    """Measure every task, write its result, print the table. Returns the exit status."""
    config.validate()
    require_one_process("kan evaluate", launch_size())
    source = find_source(config.run, config.root)
    folder = Path(config.output) if config.output else results_folder(source)
    require_folder(folder, "output")
    # All data are looked at first: what is missing or does not fit is told before an hour of measuring.
    trained = _wandb_config(config, source) if config.wandb != "off" else None
    others = {task: _other(config, task) for task in config.tasks} if config.against else {}
    loaded = load_run(config.run, config.root, config.device, config.dtype, config.active_groves)
    work = [_prepared(config, loaded, task) for task in config.tasks]
    for task, (_, digest) in zip(config.tasks, work, strict=True):
        if task in others:
            require_comparable(task, digest, others[task])
    results = []
    for task, (measure, _) in zip(config.tasks, work, strict=True):
        result = _facts(config, loaded, task) | measure()
        if task in others:
            result["against"] = {"run": config.against, "step": others[task].get("step")} | compared(result, others[task])
        write_result(folder, result)
        results.append(result)
    print(table(results))
    print(f"{loaded.checkpoint}: results in {folder}", file=sys.stderr)
    if trained is not None:
        _to_wandb(config, source.run_dir, trained, results, folder)
    return 0


def results_folder(source: Source) -> Path:
    """Where the results of a run or an exported file go, unless `output` says otherwise."""
    return source.path.with_name(f"{source.path.stem}.{EVALUATIONS}") if source.exported else source.run_dir / EVALUATIONS


def _prepared(config: EvaluateConfig, loaded: LoadedRun, task: str) -> tuple[Callable[[], Result], str | None]:
    """What measures `task`, its data read, and the digest of its questions; None where it has none."""
    if task == PERPLEXITY:
        corpus = perplexity.open_corpus(config.text, loaded.tokenizer.sha256)
        if config.reading == "packed":
            perplexity.require_a_sequence(corpus, loaded.model.config.sequence_length, "use reading=documents, another text")
        return lambda: _perplexity(config, loaded, corpus), None
    questions = questions_of(config, task, loaded.tokenizer)
    digest = digest_of(questions)
    return lambda: _choices(config, loaded, task, questions) | {"questions_sha256": digest}, digest


def _perplexity(config: EvaluateConfig, loaded: LoadedRun, corpus: Any) -> Result:
    if config.reading == "packed":
        with _progress(PERPLEXITY, corpus.stream("heldout").tokens) as advance:
            resets = loaded.reset_at_documents
            losses = perplexity.packed_documents(
                loaded.model, corpus, config.limit, resets=resets, batch_size=config.batch_size, advance=advance
            )  # fmt: skip
    else:
        documents = perplexity.heldout_documents(corpus, config.limit)
        with _progress(PERPLEXITY, sum(map(len, documents))) as advance:
            losses = perplexity.whole_documents(loaded.model, documents, corpus.bytes_of_tokens, batch_size=config.batch_size, advance=advance)
    facts: Result = {"reading": config.reading, "corpus": str(corpus.folder), "corpus_sha256": corpus.hash}
    if config.reading == "packed":
        facts["reset_at_documents"] = loaded.reset_at_documents
    return facts | perplexity.summary(losses, seed=config.seed)


def _choices(config: EvaluateConfig, loaded: LoadedRun, task: str, questions: list[Any]) -> Result:
    with _progress(task, len(questions)) as advance:
        scored = choice.score(loaded.model, loaded.tokenizer, questions, batch_size=config.batch_size, advance=advance)
    metric = main_metric(task)
    right = "".join("1" if one.right(metric) else "0" for one in scored)
    return choice.summary(scored, metric) | {"shots": shots_of(config, task), "questions_from": origin_of(config, task), "right": right}


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
    """The result of `task` that `against` names. ConfigError where there is none, or it is of another step than the checkpoint or file named."""
    source = find_source(config.against, config.root, "against")
    path, command = results_folder(source) / f"{task}.json", f"`kan evaluate run={config.against} tasks=[{task}]`"
    if not path.is_file():
        raise ConfigError(f"against={config.against}: {path} is missing; measure it first with {command}")
    other = read_result(path)
    named = source.exported or str(source.path) in (config.against, str(Path(config.against)), str(Path(config.root) / config.against))
    if named and (other.get("step"), Path(str(other.get("checkpoint"))).name) != (source.step(), source.path.name):
        raise ConfigError(
            f"against={config.against} is of step {source.step()}, but {path} is of step {other.get('step')} ({other.get('checkpoint')}); "
            f"measure it again with {command}"
        )
    return other


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


def _wandb_config(config: EvaluateConfig, source: Source) -> Config:
    """The settings of the run whose W&B page is to have the results. ConfigError where it is not known."""
    from kan_train.config.compose import from_yaml

    if source.exported:
        raise ConfigError(f"wandb={config.wandb}: {source.path} is an exported file, whose W&B run is not known; use wandb=off, or run=RUN")
    saved = source.run_dir / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"wandb={config.wandb}: {saved} is missing, without which the W&B run is not known; use wandb=off, or restore it")
    return from_yaml(saved.read_text(encoding="utf-8"))


def _to_wandb(config: EvaluateConfig, run_dir: Path, trained: Config, results: list[Result], folder: Path) -> None:
    """Into the summary of the run's own W&B page: W&B's steps must only grow, and those of a run that goes on are its own."""
    from kan_train.accounting.sinks import wandb

    try:
        run = wandb.begin(run_dir, trained.run.name, trained, online=config.wandb == "online")
        run.summary.update({name: value for result in results for name, value in shown(result).items()})
        wandb.end(run, 0)
    except Exception as error:  # of W&B's many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"wandb={config.wandb}: W&B failed ({reason}), the results are in {folder}; use `wandb login` first, or wandb=offline"
        ) from error


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
