"""`kan generate`: continue a prompt with a trained run as it is written, or many prompts as lines of JSON."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kan_train.config import ConfigError, GenerateConfig
from kan_train.config.generate import require_unicode
from kan_train.inference.decode import generate
from kan_train.inference.engine import Engine, Speed
from kan_train.inference.load import LoadedRun, load_run
from kan_train.inference.lockstep import ALONE, Ended, Lockstep
from kan_train.inference.requests import Request
from kan_train.inference.sample import Sampling
from kan_train.parallel.runtime import launch_size


def run_generate(config: GenerateConfig) -> int:
    """Write what is generated to standard output as it comes, and the speed to standard error. Returns the exit status.

    Called in every process that torchrun started; the first one reads and writes.
    """
    config.validate()
    if launch_size() == 1 and config.parallel.is_alone:
        return _run(config, ALONE, _load)
    from kan_train.inference.shares import load_share
    from kan_train.inference.together import together

    return together(config, lambda device, lockstep: _run(config, lockstep, lambda own: load_share(own, device, lockstep)))


def samples(config: GenerateConfig) -> list[str]:
    """The texts that `kan generate` would write, prompt included, one a sample, in this process alone. Raises ConfigError as `load_run` does."""
    config.validate()
    return [config.prompt + text for text in _generate(config, _load(config), ALONE)]


def _run(config: GenerateConfig, lockstep: Lockstep, load: Callable[[GenerateConfig], LoadedRun]) -> int:
    # What is asked for is the first process's, whatever command line, files and standard input the others have.
    config, prompts = lockstep.first(lambda: (config, _read_prompts(config.prompts) if config.prompts else []))
    loaded = load(config)
    speed = Speed()
    try:
        _write_all(config, loaded, prompts, speed, lockstep)
        read = True
    except BrokenPipeError:
        # The reader has enough (kan generate | head): no more is written, and Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        read = False
    except Ended:
        return 0
    lockstep.end()
    if lockstep.is_first and read:
        print(
            f"{loaded.checkpoint}: {speed.tokens} tokens, {speed.tokens_per_second:,.0f} tokens/s "
            f"(prompt: {speed.prompt_tokens} tokens in {speed.prefill_seconds:.2f} s)",
            file=sys.stderr,
        )
    return 0


def _write_all(config: GenerateConfig, loaded: LoadedRun, prompts: list[dict[str, Any]], speed: Speed, lockstep: Lockstep) -> None:
    write = _write if lockstep.is_first else _say_nothing
    if config.prompts:
        _generate_many(config, loaded, prompts, speed, lockstep)
    elif config.samples == 1:
        write(config.prompt)
        _generate(config, loaded, lockstep, on_text=lambda _, piece: write(piece), speed=speed)
        write("\n")
    else:
        # Samples are decoded together, so their pieces come in turns: each is written when all are whole.
        for number, text in enumerate(_generate(config, loaded, lockstep, speed=speed), start=1):
            write(f"--- sample {number} of {config.samples}\n{config.prompt}{text}\n")


def _load(config: GenerateConfig) -> LoadedRun:
    return load_run(config.run, config.root, config.device, config.dtype, config.active_groves)


def _sampling(config: GenerateConfig) -> Sampling:
    return Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, repetition_penalty=config.repetition_penalty)


def _generate(
    config: GenerateConfig, loaded: LoadedRun, lockstep: Lockstep, on_text: Callable[[int, str], None] | None = None, speed: Speed | None = None
) -> list[str]:
    return generate(
        loaded.model, loaded.tokenizer, config.prompt, max_tokens=config.max_tokens, sampling=_sampling(config), stop=tuple(config.stop), seed=config.seed,
        samples=config.samples, max_rows=config.max_rows, on_text=on_text, speed=speed, lockstep=lockstep,
    )  # fmt: skip


def _generate_many(config: GenerateConfig, loaded: LoadedRun, prompts: list[dict[str, Any]], speed: Speed, lockstep: Lockstep) -> None:
    """A line of JSON for every sample of every prompt, in their order, each as soon as it and those before it are whole."""
    engine = Engine(loaded.model, loaded.tokenizer, max_rows=config.max_rows, lockstep=lockstep)
    engine.speed = speed
    rows = [
        (given, engine.add(Request(
            prompt=given["prompt"], max_tokens=config.max_tokens, sampling=_sampling(config), seed=config.seed, sample=sample, stop=tuple(config.stop),
        )))
        for given in prompts for sample in range(config.samples)
    ]  # fmt: skip
    written = 0
    while written < len(rows):
        engine.step()
        while written < len(rows) and rows[written][1].finish is not None:
            given, row = rows[written]
            written += 1
            if not lockstep.is_first:
                continue
            fields = given | {"sample": row.request.sample, "text": row.text, "finish": row.finish, "tokens": len(row.tokens)}
            _write(json.dumps(fields, ensure_ascii=False) + "\n")
            if sys.stderr.isatty():
                print(f"\r{written} of {len(rows)}", end="\n" if written == len(rows) else "", file=sys.stderr, flush=True)


def _read_prompts(name: str) -> list[dict[str, Any]]:
    """The prompts of a file or of standard input, each with the other fields of its line. ConfigError where they cannot be read."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"prompts={name} cannot be read ({error}); use a text in UTF-8 with a prompt a line, or JSON lines in NAME.jsonl") from None
    # Not splitlines: it also ends lines at characters that a prompt may hold, such as a form feed.
    lines = text.removesuffix("\n").split("\n") if text else []
    prompts = []
    for number, line in enumerate(lines, start=1):
        if name.endswith(".jsonl"):
            prompts += [_parsed(name, number, line)] if line.strip() else []
        else:
            prompts.append({"prompt": line})
    for given in prompts:
        require_unicode("prompts", given["prompt"])
    return prompts


def _parsed(name: str, number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"prompts={name}: line {number} is no JSON ({error}); write {{\"prompt\": \"text\"}}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ConfigError(f'prompts={name}: line {number} has no text under "prompt"; write {{"prompt": "text"}}')
    return fields


def _say_nothing(text: str) -> None:
    del text


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        # A terminal that is not UTF-8 still shows what it can.
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
