"""What a client gets is what decoding gives: alone, in a stream, beside others."""

import asyncio

import openai
import pytest

from kan_train.inference.decode import generate
from kan_train.inference.sample import Sampling

PROMPT = "for i in range"
PROMPTS = ["def main():\n", "", "the quick brown fox", "Grüße aus Köln: 你好"]


def expected(model, tokenizer, prompt: str, **settings) -> list[str]:
    sampling = settings.pop("sampling", Sampling(temperature=0))
    return generate(model, tokenizer, prompt, sampling=sampling, **settings)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completion_is_what_decoding_gives(served, model, tokenizer, prompt):
    answer = served.complete(prompt, max_tokens=24, temperature=0)
    assert answer.choices[0].text == expected(model, tokenizer, prompt, max_tokens=24)[0]
    assert (answer.object, answer.model, answer.choices[0].index, answer.choices[0].logprobs) == ("text_completion", "tiny", 0, None)
    assert answer.usage.prompt_tokens == 1 + len(tokenizer.encode(prompt))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 24
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.completion_tokens == 24


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_pieces_of_a_stream_join_to_the_completion(served, prompt):
    settings = {"max_tokens": 24, "temperature": 1.3, "seed": 5}
    whole = served.complete(prompt, **settings)
    chunks = list(served.complete(prompt, **settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [whole.choices[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4, "it comes piece by piece"


def test_the_bytes_of_a_stream(served):
    """As the format has it: data lines, empty lines between, [DONE] at the end."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "temperature": 0, "stream": True}
    answer = served.http.post("/v1/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith('data: {"id": "cmpl-') for event in events[:-2])


def test_a_seed_and_its_samples(served, model, tokenizer):
    """Choices are the samples of `generate`; other settings reach the sampling; without a seed every call is another."""
    settings = {"temperature": 0.9, "top_p": 0.8, "seed": 11}
    answer = served.complete("def f(", n=3, max_tokens=20, **settings, extra_body={"top_k": 20, "repetition_penalty": 1.2})
    sampling = Sampling(temperature=0.9, top_p=0.8, top_k=20, repetition_penalty=1.2)
    texts = expected(model, tokenizer, "def f(", max_tokens=20, sampling=sampling, seed=11, samples=3)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    drawn = {served.complete("def f(", max_tokens=20, temperature=1.5).choices[0].text for _ in range(3)}
    assert len(drawn) > 1


def test_several_prompts_with_their_echo(served, model, tokenizer):
    prompts, settings = ["x = ", "for i"], {"max_tokens": 8, "temperature": 0, "n": 2, "echo": True}
    texts = [prompt + expected(model, tokenizer, prompt, max_tokens=8)[0] for prompt in prompts for _ in range(2)]
    answer = served.complete(prompts, **settings)
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage.prompt_tokens == sum(1 + len(tokenizer.encode(prompt)) for prompt in prompts)
    streamed = [""] * 4
    for chunk in served.complete(prompts, **settings, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_stop_texts_end_a_completion_and_are_not_given(served):
    whole = served.complete(PROMPT, max_tokens=40, temperature=0).choices[0]
    assert whole.finish_reason == "length"
    for stop in (whole.text[7:10], [whole.text[7:10], "never in it"]):
        before = whole.text[: whole.text.find(whole.text[7:10])]
        stopped = served.complete(PROMPT, max_tokens=40, temperature=0, stop=stop).choices[0]
        assert (stopped.text, stopped.finish_reason) == (before, "stop")
        chunks = [chunk.choices[0] for chunk in served.complete(PROMPT, max_tokens=40, temperature=0, stop=stop, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == before
        assert chunks[-1].finish_reason == "stop"


def test_sixteen_at_a_time_are_what_each_is_alone(served, monkeypatch):
    asked = [
        {"prompt": PROMPTS[number % 4] + "ab " * (number % 5), "max_tokens": 8 + 2 * number, "seed": number, "temperature": [0, 0.8, 1.5][number % 3]}
        for number in range(16)
    ]
    alone = [served.complete(**settings).choices[0] for settings in asked]
    engine, widest = served.worker._engine, []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (widest.append(len(engine.rows)), step())[1])

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(client.completions.create(model="tiny", **settings) for settings in asked))

    answers = [answer.choices[0] for answer in asyncio.run(together())]
    assert answers == alone
    assert len({choice.text for choice in alone}) > 8
    assert max(widest) > 4, "they were decoded together"
    served.wait_for("kan_rows", 0)


def test_a_request_that_does_not_say_gets_sixteen_tokens(served):
    assert served.complete(PROMPT, temperature=0).usage.completion_tokens == 16


def test_the_coldest_temperature_is_the_likeliest_token(served):
    """Logits divided by it are infinite."""
    texts = {served.complete(PROMPT, temperature=temperature, max_tokens=30).choices[0].text for temperature in (0, 5e-324, 1e-300)}
    assert len(texts) == 1


def test_models_and_health(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").owned_by == "kan-train"
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        served.client.models.retrieve("gpt-4")
    assert served.http.get("/health").json() == {"status": "ok", "model": "tiny"}


def test_the_metrics_count_what_was_done(serve):
    """On a server that has done nothing else, in the format of Prometheus."""
    server = serve(max_rows=4, max_queue=2, prefix_megabytes=8)
    usage = [server.complete("the quick brown fox", max_tokens=9, temperature=0, n=2).usage for _ in range(2)]
    assert server.metric('kan_http_responses_total{path="/v1/completions",status="200"}') == 2
    # Equal prompts of one request are read once, and the second request finds what the first has kept.
    assert server.metric("kan_prompt_tokens_total") == 2 * usage[0].prompt_tokens
    assert server.metric("kan_prompt_kept_tokens_total") == usage[1].prompt_tokens
    assert server.metric("kan_tokens_total") == sum(each.completion_tokens for each in usage)
    # The first token of each continuation comes from its prompt. (None of these ends at the end of the document.)
    assert server.metric("kan_stepped_tokens_total") == sum(each.completion_tokens for each in usage) - 4
    assert sum(server.metric(f'kan_continuations_total{{finish="{finish}"}}') for finish in ("stop", "length")) == 4
    assert (server.metric("kan_rows"), server.metric("kan_rows_limit")) == (0, 4)
    assert (server.metric("kan_queue"), server.metric("kan_queue_limit")) == (0, 2)
    assert server.metric("kan_request_seconds_count") == server.metric("kan_first_token_seconds_count") == 2
    assert server.metric("kan_request_seconds_sum") > server.metric("kan_first_token_seconds_sum") > 0
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = [line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE ")]
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert float(value) >= 0
            assert any(name.partition("{")[0] in (family, f"{family}_sum", f"{family}_count") for family in families)
