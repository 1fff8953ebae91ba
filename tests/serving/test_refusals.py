"""Bad requests are refused in OpenAI's format, with the field and what would work, and leave the server as it was."""

import json

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.config import ServeConfig
from kan_train.serving.errors import ApiError
from kan_train.serving.protocol import CompletionBody, parsed, requests_of

GOOD = {"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": 0}

BAD_FIELDS = [
    ({"prompt": 5}, "prompt", "must be a text such as"),
    ({"prompt": ["x", 5]}, "prompt", "or a list of texts"),
    ({"prompt": [1, 2, 3]}, "prompt", "or a list of texts"),
    ({"prompt": None}, "prompt", "prompt=None must be"),
    ({"prompt": []}, "prompt", 'use prompt=""'),
    ({"prompt": "a\0b"}, "prompt", "NUL character"),
    ({"prompt": "ab " * 400}, "prompt", "use one of at most 200"),
    ({"prompt": ["x"] * 17}, "prompt", "ask for at most 16"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0 must be a whole number of at least 1"),
    ({"max_tokens": 100_001}, "max_tokens", "use max_tokens=100000"),
    ({"max_tokens": "12"}, "max_tokens", "max_tokens='12' must be a whole number"),
    ({"max_tokens": 2.5}, "max_tokens", "whole number"),
    ({"max_tokens": True}, "max_tokens", "whole number"),
    ({"max_tokens": 10**400}, "max_tokens", "... must be a whole number"),
    ({"n": 10**4200}, "n", "must be a whole number"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2"),
    ({"temperature": 2.1}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", "such as 0.8"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_k": -1}, "top_k", "0: all tokens"),
    ({"repetition_penalty": 0}, "repetition_penalty", "from 0.01 to 100, such as 1.1"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty", "from 0.01 to 100, such as 1.1"),
    ({"repetition_penalty": 101}, "repetition_penalty", "from 0.01 to 100, such as 1.1"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 17}, "n", "ask for at most 16"),
    ({"seed": 2**63}, "seed", "64 bits"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "use at most 4"),
    ({"stop": ["a", ""]}, "stop", "empty text"),
    ({"stop": "\0"}, "stop", "NUL"),
    ({"stop": "a" * 257}, "stop", "use a shorter one"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"stream_options": {"usage": True}}, "stream_options", "include_usage"),
    ({"logprobs": 1}, "logprobs", "leave it out"),
    ({"logprobs": 0}, "logprobs", "leave it out"),
    ({"suffix": "end"}, "suffix", "does not fill gaps"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias", "leave it out"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "use repetition_penalty"),
    ({"presence_penalty": 0.5}, "presence_penalty", "use repetition_penalty"),
    ({"best_of": 3}, "best_of", "use n=3"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"messages": []}, "messages", "leave it out"),
    ({"model": 7}, "model", "GET /v1/models"),
]


def post(served, content, **headers: str) -> httpx.Response:
    return served.http.post("/v1/completions", content=content, headers={"content-type": "application/json", **headers})


def refusal(answer: httpx.Response, status: int = 400) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400, "what was sent is not sent back"
    return error


@pytest.mark.parametrize(("fields", "param", "words"), BAD_FIELDS, ids=[f"{next(iter(fields))}-{number}" for number, (fields, _, _) in enumerate(BAD_FIELDS)])
def test_a_bad_field_is_named_with_what_would_work(served, fields, param, words):
    error = refusal(post(served, json.dumps(GOOD | fields).encode()))
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named(served, missing):
    error = refusal(post(served, json.dumps({name: value for name, value in GOOD.items() if name != missing}).encode()))
    assert error["param"] == missing
    assert error["message"].startswith(f"{missing} is missing: it must be")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"prompt=x", b'{"model": "tiny", "prompt": "a\0b"}', b'{"model": "tiny", "prompt": "\xff"}', b'{"model": "tiny", "prompt": "\\ud800"}',
        b"[" * 50_000, b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "n": 1' + b"0" * 6000 + b"}", b"[]", b"null", b'"text"', b"5",
    ],
    ids=lambda content: ascii(content[:50]),
)  # fmt: skip
def test_what_is_no_json_object(served, content):
    refusal(post(served, content))


def test_a_body_that_is_not_said_to_be_json(served):
    assert "content-type: application/json" in refusal(post(served, json.dumps(GOOD).encode(), **{"content-type": "text/plain"}), 415)["message"]


def test_huge_bodies_are_refused_by_what_they_say_and_by_what_comes(served):
    """With a length in front, and in chunks without one."""
    huge = json.dumps(GOOD | {"prompt": "x" * 5_000_000}).encode()
    assert refusal(post(served, huge), 413)["code"] == "body_too_large"
    chunked = post(served, (huge[at : at + 65536] for at in range(0, len(huge), 65536)))
    assert "at most 100000 bytes" in refusal(chunked, 413)["message"]


def test_the_client_raises_its_own_errors(served):
    with pytest.raises(openai.NotFoundError, match="use model='tiny'") as missing:
        served.client.completions.create(model="gpt-4", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="max_tokens=0 must be"):
        served.complete("x", max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="use one of at most 200") as long:
        served.complete("ab " * 400, stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="logprobs=3 is not supported"):
        served.complete("x", logprobs=3)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        served.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])


OTHERS = [("GET", "/v1/completions", 405), ("POST", "/v1/embeddings", 404), ("GET", "/", 404), ("GET", "/docs", 404)]


@pytest.mark.parametrize(("method", "path", "status"), OTHERS)
def test_what_is_not_served(served, method, path, status):
    error = refusal(served.http.request(method, path), status)
    assert "/v1/completions" in error["message"]


def test_neutral_values_of_what_is_not_supported_are_taken(served):
    """Clients send them by themselves."""
    neutral = {"logprobs": None, "suffix": None, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1, "user": "me"}
    neutral |= {"stop": None, "seed": None, "top_k": None, "stream_options": None}
    answer = post(served, json.dumps(GOOD | neutral).encode())
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == post(served, json.dumps(GOOD).encode()).json()["choices"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from([*CompletionBody.model_fields, "unknown", "", "\0"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, VALUES, max_size=6), st.booleans())
def test_any_object_is_a_request_or_a_refusal(tokenizer, fields, on_good):
    """Never another exception, and what is taken is within the limits."""
    limits = ServeConfig(run="tiny", max_prompt_tokens=50)
    refused, asked = None, []
    try:
        body = parsed(json.dumps((GOOD if on_good else {}) | fields).encode(), "tiny")
        asked = requests_of(body, limits, tokenizer)
    except ApiError as error:
        refused = error
    if refused is not None:
        assert refused.status in (400, 404)
        assert len(json.dumps(refused.body())) < 1000
        return
    assert 1 <= len(asked) <= limits.max_rows
    for request in asked:
        assert 1 <= request.max_tokens <= limits.max_tokens
        assert "" not in request.stop
        assert 0 < request.sampling.top_p <= 1
        assert request.sampling.temperature == 0 or 1e-6 <= request.sampling.temperature <= 2
        assert 0.01 <= request.sampling.repetition_penalty <= 100


def test_after_all_this_it_answers(served):
    assert served.complete("x", max_tokens=2, temperature=0).choices[0].finish_reason in ("length", "stop")
    assert served.metric("kan_engine_failures_total") == 0
    served.wait_for("kan_rows", 0)
