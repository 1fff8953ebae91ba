"""`kan generate`: continue a prompt with a trained run, as it is written."""

import os
import sys
from typing import Any

from kan_train.config import GenerateConfig
from kan_train.inference.decode import Speed, generate
from kan_train.inference.load import load_run


def run_generate(config: GenerateConfig) -> int:
    """Write prompt and continuation to standard output as they come, and the speed to standard error. Returns the exit status."""
    config.validate()
    loaded = load_run(config.run, config.root, config.device)
    speed = Speed()
    try:
        if config.samples == 1:
            _write(config.prompt)
            generate(loaded.model, loaded.tokenizer, **_settings(config), on_text=lambda _, piece: _write(piece), speed=speed)
            _write("\n")
        else:
            # Samples are decoded together, so their pieces come in turns: each is written when all are whole.
            for number, text in enumerate(generate(loaded.model, loaded.tokenizer, **_settings(config), speed=speed), start=1):
                _write(f"--- sample {number} of {config.samples}\n{config.prompt}{text}\n")
    except BrokenPipeError:
        # The reader has enough (kan generate | head): no more is written, and Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(
        f"{loaded.checkpoint}: {speed.tokens} tokens, {speed.tokens_per_second:,.0f} tokens/s "
        f"(prompt: {speed.prompt_tokens} tokens in {speed.prefill_seconds:.2f} s)",
        file=sys.stderr,
    )
    return 0


def samples(config: GenerateConfig) -> list[str]:
    """The texts that `kan generate` would write, prompt included, one a sample. Raises ConfigError as `load_run` does."""
    config.validate()
    loaded = load_run(config.run, config.root, config.device)
    return [config.prompt + text for text in generate(loaded.model, loaded.tokenizer, **_settings(config))]


def _settings(config: GenerateConfig) -> dict[str, Any]:
    names = ("prompt", "max_tokens", "temperature", "top_k", "top_p", "seed", "samples")
    return {name: getattr(config, name) for name in names}


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        # A terminal that is not UTF-8 still shows what it can.
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
