"""Recurrent decoding: the prompt is read once, then every token costs one step, whatever lies before it (for ADA layers).

A document begins with the boundary token, in training and here; the model ends a document by giving the boundary again.
"""

from collections.abc import Callable

from kan_train.inference.engine import Engine, Speed
from kan_train.inference.lockstep import ALONE, Lockstep
from kan_train.inference.requests import Request
from kan_train.inference.sample import Sampling
from kan_train.inference.text import TextTokenizer
from kan_train.model.lm import LanguageModel

DEFAULT = Sampling(temperature=0.8)


def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    sampling: Sampling = DEFAULT,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    samples: int = 1,
    max_rows: int = 64,
    on_text: Callable[[int, str], None] | None = None,
    speed: Speed | None = None,
    lockstep: Lockstep = ALONE,
) -> list[str]:
    """Continuations of `prompt` (without it), one a sample. An empty prompt continues the start of a document.

    on_text(sample, piece) is called with every piece of text as soon as it is certain: no piece ends inside a character, or in what may become a stop text.
    lockstep: the processes that share the model; all make the same call.
    Ends at the end of the document, before the first stop text, or after `max_tokens`. Raises ConfigError where the tokenizer is not the model's.
    """
    engine = Engine(model, tokenizer, max_rows=max_rows, lockstep=lockstep)
    engine.speed = speed or engine.speed
    asked = [Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling, seed=seed, sample=sample, stop=stop) for sample in range(samples)]
    result = [""] * samples
    for sample, piece in engine.run(asked):
        result[sample] += piece
        if on_text is not None:
            on_text(sample, piece)
    return result
