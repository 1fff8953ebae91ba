"""The body of /v1/completions: what is allowed, what is refused and why, and the requests that it asks for."""

import difflib
import secrets
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kan_train.config import ServeConfig
from kan_train.config.generate import PENALTIES
from kan_train.inference.requests import Request
from kan_train.inference.sample import Sampling
from kan_train.inference.text import TextTokenizer
from kan_train.serving.errors import ApiError

DEFAULT_TOKENS = 16
"""Tokens of a request that does not say how many, as in OpenAI's interface."""
MAX_STOPS = 4
"""Stop texts of a request, as in OpenAI's interface."""
MAX_STOP_CHARACTERS = 256
"""Length of a stop text: what may still become one is compared at every token."""
MANY = 2**31
"""Bound of whole numbers that have no other."""
COLDEST = 1e-6
"""Temperatures below are 0: logits divided by them may overflow."""


class StreamOptions(BaseModel):
    """What a stream has besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None


class CompletionBody(BaseModel):
    """A request's body. The description of a field says what it must be; null is as if it were not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str = Field(description="the name of the model, as GET /v1/models has it")
    prompt: str | list[str] = Field(description='a text such as "def main():", or a list of texts')
    max_tokens: int | None = Field(None, ge=1, lt=MANY, description="a whole number of at least 1, such as 128")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2, such as 0.8")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0 and not above 1, such as 0.95")
    top_k: int | None = Field(None, ge=0, lt=MANY, description="a whole number; 0: all tokens")
    repetition_penalty: float | None = Field(None, ge=PENALTIES[0], le=PENALTIES[1], description="a number from 0.01 to 100, such as 1.1; 1: none")
    n: int | None = Field(None, ge=1, lt=MANY, description="a whole number of at least 1")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="a whole number of 64 bits, such as 7")
    stop: str | list[str] | None = Field(None, description=f'a text such as "\\n\\n", or a list of at most {MAX_STOPS}')
    echo: bool | None = Field(None, description="true or false")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(None, description='{"include_usage": true} or null')
    user: str | None = Field(None, description="a text")
    best_of: int | None = Field(None, ge=1, lt=MANY, description="the same as n, or null")
    logprobs: int | None = Field(None, description="null")
    suffix: str | None = Field(None, description="null")
    logit_bias: dict[str, float] | None = Field(None, description="null")
    frequency_penalty: float | None = Field(None, description="0 or null")
    presence_penalty: float | None = Field(None, description="0 or null")

    @property
    def prompts(self) -> list[str]:
        """Every prompt."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> tuple[str, ...]:
        """Every stop text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def samples(self) -> int:
        """Continuations of each prompt."""
        return self.n or 1


UNSUPPORTED = {
    "logprobs": "probabilities of tokens are not given",
    "suffix": "the model continues texts, it does not fill gaps",
    "logit_bias": "tokens cannot be favoured one by one",
    "frequency_penalty": "use repetition_penalty, such as 1.1",
    "presence_penalty": "use repetition_penalty, such as 1.1",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {"suffix": ("",), "logit_bias": ({},), "frequency_penalty": (0.0,), "presence_penalty": (0.0,)}


def parsed(content: bytes, model: str) -> CompletionBody:
    """The body, of the right fields and types and for `model`. ApiError 400 or 404 that says what is wrong."""
    try:
        body = CompletionBody.model_validate_json(content)
    except ValidationError as error:
        raise _explained(error) from None
    if body.model != model:
        message = f"model={_short(body.model)} is not here; use model={model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    for name, reason in UNSUPPORTED.items():
        value = getattr(body, name)
        if value is not None and value not in _NEUTRAL.get(name, ()):
            raise ApiError(400, f"{name}={_short(value)} is not supported: {reason}; leave it out", param=name, code="unsupported")
    if body.best_of is not None and body.best_of != body.samples:
        raise _wrong("best_of", f"best_of={body.best_of} is not supported: all continuations are given; use n={body.best_of}")
    if body.stream_options is not None and not body.stream:
        raise _wrong("stream_options", "stream_options is for streams; leave it out, or set stream=true")
    return body


def requests_of(body: CompletionBody, limits: ServeConfig, tokenizer: TextTokenizer) -> list[Request]:
    """One request a choice, prompt by prompt, within the limits of the server. ApiError 400 where they are not kept."""
    _check_texts(body)
    count = len(body.prompts) * body.samples
    if count > limits.max_rows:
        param = "n" if body.samples > 1 else "prompt"
        raise _wrong(param, f"{len(body.prompts)} prompts with n={body.samples} are {count} continuations; ask for at most {limits.max_rows} at a time")
    max_tokens = min(DEFAULT_TOKENS, limits.max_tokens) if body.max_tokens is None else body.max_tokens
    if max_tokens > limits.max_tokens:
        raise _wrong("max_tokens", f"max_tokens={max_tokens} is more than this server gives; use max_tokens={limits.max_tokens} or less")
    for prompt in body.prompts:
        length = 1 + len(tokenizer.encode(prompt))
        if length > limits.max_prompt_tokens:
            message = f"the prompt has {length} tokens, its start included; use one of at most {limits.max_prompt_tokens}"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    # Without a seed every call draws anew.
    seed = secrets.randbits(63) if body.seed is None else body.seed
    sampling = _sampling(body)
    return [
        Request(prompt=prompt, max_tokens=max_tokens, sampling=sampling, seed=seed, sample=sample, stop=body.stops)
        for prompt in body.prompts for sample in range(body.samples)
    ]  # fmt: skip


def _sampling(body: CompletionBody) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(
        temperature=temperature if temperature >= COLDEST else 0.0,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )


def _check_texts(body: CompletionBody) -> None:
    if not body.prompts:
        raise _wrong("prompt", 'prompt has no text; use prompt="" for the start of a document')
    for name, texts in (("prompt", body.prompts), ("stop", body.stops)):
        if any("\0" in text for text in texts):
            raise _wrong(name, f"{name} has a NUL character, which is no text; take it out")
    if len(body.stops) > MAX_STOPS:
        raise _wrong("stop", f"stop has {len(body.stops)} texts; use at most {MAX_STOPS}")
    if "" in body.stops:
        raise _wrong("stop", "stop has an empty text, which would end every continuation before it begins; leave it out")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in body.stops):
        raise _wrong("stop", f"a text of stop is longer than {MAX_STOP_CHARACTERS} characters; use a shorter one")


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    fields = CompletionBody.model_fields
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON ({first['msg'].removeprefix('Invalid JSON: ')}); send an object with model and prompt", code="invalid_json")
    if not name:
        return ApiError(400, "the body must be a JSON object with model and prompt")
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        return _wrong(name, f"{_short(name)} is not a field of a completion; {hint}", code="unknown_field")
    if first["type"] == "missing":
        return _wrong(name, f"{name} is missing: it must be {fields[name].description}")
    # Of a field with two types, the last place is the name of a type; else it is a place inside the value.
    inside = len(first["loc"]) > 1 and first["loc"][-1] not in ("str", "list[str]")
    shown = f"{name} holds {_short(first['input'])}, but" if inside else f"{name}={_short(first['input'])}"
    return _wrong(name, f"{shown} must be {fields[name].description}")


def _wrong(param: str, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param[:100], code=code)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
