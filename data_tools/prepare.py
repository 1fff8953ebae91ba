"""`kan data prepare`: documents -> text shards -> tokenizer -> token shards -> manifest.

<root>/<name>/{text/, tokenizer/, tokens/, manifest.json}: the manifest is written last, so a corpus with one is complete.
"""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kan_train.config import ConfigError, PrepareConfig
from kan_train.data_tools.files import atomic_write, named_errors, sha256_of, sole_writer, write_json
from kan_train.data_tools.shards import SPLITS, Part, cut_into_parts, read_documents, write_part
from kan_train.data_tools.sources import Source, open_source
from kan_train.data_tools.tokenizer import BOUNDARY, Tokenizer, require_exact, train_tokenizer
from kan_train.data_tools.tokens import LONGEST, token_dtype, write_token_shard

FORMAT = 1


def prepare(config: PrepareConfig, console: Console | None = None) -> Path:
    """Prepare the corpus that `config` describes and return its folder; a complete one of the same settings is left as it is.

    ConfigError when a complete or interrupted one of other settings is there, when a source cannot be read, or when the disk is full; what was finished
    is kept, and the same call continues.
    """
    config.validate()
    console = console or Console(stderr=True)
    folder = Path(config.root) / config.corpus.name
    with sole_writer(folder):
        if _already_there(config, folder):
            console.print(f"{folder} is prepared already", soft_wrap=True)
        else:
            _prepare(config, folder, console)
    return folder


def _prepare(config: PrepareConfig, folder: Path, console: Console) -> None:
    for part in ("text", "tokenizer", "tokens"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", _settings(config))
    source = open_source(config.corpus, folder / "download")
    with _progress(console) as progress:
        text = _text_stage(config, source, folder / "text", progress)
        tokenizer = _tokenizer_stage(config, text, folder, progress)
        tokens = _token_stage(config, text, tokenizer, folder, progress)
    write_json(folder / "manifest.json", _manifest(config, source, text, tokenizer, tokens))
    shutil.rmtree(folder / "download", ignore_errors=True)


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the corpus's content; where it lies and how many workers make it do not."""
    settings = asdict(config)
    for setting in ("root", "workers", "force"):
        del settings[setting]
    return settings


def _already_there(config: PrepareConfig, folder: Path) -> bool:
    settings_file = folder / "settings.json"
    with named_errors(folder):
        if not settings_file.exists():
            return False
        if config.force:
            shutil.rmtree(folder)
            return False
        before, now = json.loads(settings_file.read_text()), _settings(config)
    begun = (folder / "manifest.json").exists() or any((folder / "text").glob("part-*.json"))
    if before != now and begun:
        changed = ", ".join(_differences(before, now))
        raise ConfigError(
            f"{folder} was prepared with other settings ({changed}); add force=true to prepare it again, or corpus.name=OTHER to keep both"
        )
    return (folder / "manifest.json").exists()


def _differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[str]:
    for key in now:
        if isinstance(now[key], dict) and isinstance(before.get(key), dict):
            yield from _differences(before[key], now[key], f"{path}{key}.")
        elif before.get(key) != now[key]:
            yield f"{path}{key}: {before.get(key)} then, {now[key]} now"


def _text_stage(config: PrepareConfig, source: Source, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    # A number of documents is counted over the whole source, which only one process can do.
    parts = cut_into_parts(source, int(config.shard_megabytes * 1e6)) if config.corpus.max_documents is None else [Part(0, source.units)]
    records = _in_parallel(config.workers, write_part, [(config, part, folder) for part in parts], progress, "text")
    if not any(record["shards"] for record in records):
        raise ConfigError(f"corpus={config.corpus.kind}: every document is empty ({sum(r['empty_documents'] for r in records)} of them); name another source")
    _require_both_splits(config, [shard for record in records for shard in record["shards"]])
    return records


def _require_both_splits(config: PrepareConfig, shards: list[dict[str, Any]]) -> None:
    """A few documents may all fall on one side: better said now than at a run's first validation."""
    documents = {split: sum(shard[split]["documents"] for shard in shards) for split in SPLITS}
    if not documents["train"] or (config.heldout > 0 and not documents["heldout"]):
        empty = "heldout" if documents["train"] else "train"
        raise ConfigError(
            f"heldout={config.heldout} leaves none of the {sum(documents.values())} documents to the {empty} split; use another share such as "
            f"heldout={0.3 if empty == 'heldout' else 0.02} force=true, more documents (a long text in several files, or a jsonl file of its chapters), or "
            "heldout=0 force=true to hold none out (then train with train.validate_every=0)"
        )


def _tokenizer_stage(config: PrepareConfig, text: list[dict[str, Any]], folder: Path, progress: Progress) -> Path:
    path = folder / "tokenizer" / "tokenizer.model"
    task = progress.add_task("tokenizer", total=1)
    if not path.exists():
        if config.tokenizer.path:
            given = Path(config.tokenizer.path)
            require_exact(Tokenizer(given), given)
            data = given.read_bytes()
        else:
            training = path.with_suffix(".training")
            train_tokenizer(_training_texts(config, text, folder / "text"), config.tokenizer, training)
            data = training.read_bytes()
            training.unlink()
        with atomic_write(path) as file:
            file.write(data)
    progress.advance(task)
    return path


def _training_texts(config: PrepareConfig, text: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    """Documents of the training split, every n-th so that about train_megabytes are read from all over the corpus."""
    total = sum(shard["train"]["bytes"] for record in text for shard in record["shards"])
    share = min(1.0, config.tokenizer.train_megabytes * 1e6 / max(1, total))
    due = 0.0
    for record in text:
        for shard in record["shards"]:
            for document, facts in read_documents(folder / shard["file"]):
                if facts["split"] == "train":
                    due += share
                    if due >= 1:
                        due -= 1
                        yield document


def _token_stage(config: PrepareConfig, text: list[dict[str, Any]], tokenizer: Path, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    jobs = [(folder / "text" / shard["file"], tokenizer, folder / "tokens") for record in text for shard in record["shards"]]
    return _in_parallel(config.workers, write_token_shard, jobs, progress, "tokens")


def _manifest(config: PrepareConfig, source: Source, text: list[dict[str, Any]], tokenizer_path: Path, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    tokenizer = Tokenizer(tokenizer_path)
    with atomic_write(tokenizer_path.with_name("bytes.npy")) as file:
        np.save(file, np.array(tokenizer.bytes_of_tokens(), dtype=np.uint16))
    shards = [shard for record in text for shard in record["shards"]]
    members = [member for record in tokens for member in record["members"]]
    counts = {
        split: {
            "documents": sum(shard[split]["documents"] for shard in shards),
            "bytes": sum(shard[split]["bytes"] for shard in shards),
            "tokens": sum(member["tokens"] for member in members if member["split"] == split),
        }
        for split in SPLITS
    }
    return {
        "format": FORMAT,
        "name": config.corpus.name,
        "source": source.description,
        "licence": source.licence,
        "counts": counts,
        "empty_documents": sum(record["empty_documents"] for record in text),
        "longest_documents": sorted((fact for record in tokens for fact in record["longest"]), key=lambda fact: -fact["tokens"])[:LONGEST],
        "text": shards,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "boundary": BOUNDARY},
        "bytes_of_tokens": {"file": "tokenizer/bytes.npy", "sha256": sha256_of(tokenizer_path.with_name("bytes.npy"))},
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "tokens": members,
    }


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:10s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _in_parallel(workers: int, work: Callable[..., Any], jobs: list[tuple[Any, ...]], progress: Progress, label: str) -> list[Any]:
    """Results in the order of the jobs. The first failure stops the rest; what is finished stays on disk."""
    task = progress.add_task(label, total=len(jobs))
    if workers == 1 or len(jobs) == 1:
        results = []
        for job in jobs:
            results.append(work(*job))
            progress.advance(task)
        return results
    # Forks of a fresh interpreter, which imports once for all: a fork of this process would copy the locks of the progress display's threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kan_train.data_tools.tokens"])
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = [pool.submit(work, *job) for job in jobs]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            progress.advance(task, len(done))
            if any(future.exception() for future in done):
                pool.shutdown(cancel_futures=True)
                break
        # Looked at in the jobs' order, so that the same failure is reported however the workers ran.
        return [future.result() for future in futures if not future.cancelled()]
