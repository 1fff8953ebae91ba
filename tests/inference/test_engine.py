"""Requests that are decoded together are what each is alone; states joined, forked and kept are what reading everything again gives."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.config import EdgeConfig, GroveConfig
from kan_train.inference import engine as engine_module
from kan_train.inference.engine import Engine, evaluating
from kan_train.inference.requests import Request, StopTexts
from kan_train.inference.sample import Sampling
from kan_train.inference.states import Prefixes, Read, State, _tensors, bytes_of, joined, rows_of

MODELS = {
    "ada": {},
    "hybrid": {"attention_pattern": 2},
    "softmax": {"attention_pattern": 1, "ffn": "swiglu", "ffn_width": 48},
}

PROMPTS = ["", "def main():\n    print('hello world')", "for", "the quick brown fox jumps over the lazy dog; the quick"]


def finished(engine: Engine, rows: list) -> list[tuple[str, list[int], str | None]]:
    while not engine.idle:
        engine.step()
    return [(row.text, row.tokens, row.finish) for row in rows]


def requests(count: int, seed: int, **changes) -> list[Request]:
    """Different prompts, lengths, samplings and seeds."""
    chance = random.Random(seed)
    return [
        Request(
            prompt=chance.choice(PROMPTS), max_tokens=chance.randint(1, 14), seed=number,
            sampling=Sampling(temperature=chance.choice([0, 0.7, 1.5]), top_k=chance.choice([0, 5]), repetition_penalty=chance.choice([1.0, 1.3])),
            **changes,
        )
        for number in range(count)
    ]


def narrow_groves():
    return GroveConfig(num_groves=8, active_groves=2, width=16, edge=EdgeConfig(group_size=8), capacity_factor=0.5)


@pytest.mark.parametrize("name", [*MODELS, "capacity"])
def test_requests_that_come_and_go_are_what_each_is_alone(make_model, tokenizer, name):
    """Four rows for nine requests, which join at different steps: in float64 no token differs."""
    model = make_model(**MODELS.get(name, {"grove": narrow_groves()}))
    asked = requests(9, seed=len(name))
    alone = []
    for request in asked:
        engine = Engine(model, tokenizer)
        alone += finished(engine, [engine.add(request)])
    engine = Engine(model, tokenizer, max_rows=4)
    rows = [engine.add(request) for request in asked[:5]]
    for request in asked[5:]:
        engine.step()
        assert len(engine.rows) <= 4
        rows.append(engine.add(request))
    assert finished(engine, rows) == alone
    assert len({tuple(tokens) for _, tokens, _ in alone}) > 5


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(2, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def left_by(model, tokens: list[int], pieces: list[int]) -> tuple[torch.Tensor, list]:
    """Logits and state after reading `tokens` in pieces that end at `pieces`."""
    state, first, logits = model.init_state(1), 0, None
    for last in [*pieces, len(tokens)]:
        if len(tokens[first:last]):
            logits, state = model.prefill(torch.tensor([tokens[first:last]]), state)
        first = max(first, last)
    return logits, state


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", MODELS)
def test_steps_of_rows_of_any_length_are_the_training_forward(make_model, name, dtype, tolerance):
    """Read in pieces, joined, stepped, some taken out and forked, stepped on: the logits of every row are those of its whole sequence."""
    # All groves run, so that in low precision no choice can fall the other way.
    model = make_model(dtype, **MODELS[name], **({} if name == "softmax" or dtype == torch.float64 else {"grove": all_groves()}))
    for seed in range(4):
        chance = random.Random(seed)
        sequences = [random_tokens(chance.randint(1, 40), 10 * seed + row) for row in range(3)]
        with evaluating(model):
            read = [left_by(model, tokens, sorted(chance.sample(range(41), 2))) for tokens in sequences]
            state = joined([left for _, left in read])
            for step in range(12):
                if step in (4, 8):
                    rows = [chance.randrange(len(sequences)) for _ in range(chance.randint(1, 4))]
                    sequences, state = [[*sequences[row]] for row in rows], rows_of(state, rows)
                new = random_tokens(len(sequences), 100 * seed + step)
                logits, state = model.step(torch.tensor(new), state)
                for row, token in enumerate(new):
                    sequences[row].append(token)
                whole = torch.cat([model.logits(torch.tensor([tokens]))[:, -1] for tokens in sequences])
                scale = whole.double().abs().max()
                assert (logits - whole).double().abs().max() <= tolerance * scale


def all_groves():
    return GroveConfig(num_groves=2, active_groves=2, width=16, edge=EdgeConfig(group_size=8))


@pytest.mark.parametrize("name", MODELS)
def test_two_futures_of_one_state_do_not_touch_each_other(make_model, name):
    model = make_model(**MODELS[name])
    tokens = random_tokens(9, 1)
    with evaluating(model):
        _, state = left_by(model, tokens, [])
        _, state = model.step(torch.tensor([5]), state)  # it has room behind it now
        one, other = (random_tokens(6, seed) for seed in (2, 3))
        futures = [state, state]
        for step in range(6):
            for number, future in enumerate((one, other)):
                logits, futures[number] = model.step(torch.tensor([future[step]]), futures[number])
                whole = model.logits(torch.tensor([[*tokens, 5, *future[: step + 1]]]))[:, -1]
                torch.testing.assert_close(logits, whole, rtol=1e-9, atol=1e-10)


def test_what_ada_remembers_does_not_grow(make_model):
    model = make_model()
    with evaluating(model):
        sizes = {bytes_of(left_by(model, random_tokens(count, 0), [])[1]) for count in (1, 7, 300)}
        cache = [bytes_of(left_by(make_model(**MODELS["softmax"]), random_tokens(count, 0), [])[1]) for count in (10, 20)]
    assert len(sizes) == 1
    assert cache[1] == 2 * cache[0]


def test_a_cancelled_request_frees_its_row_and_leaves_the_others_alone(make_model, tokenizer):
    model = make_model()
    asked = [Request(prompt=prompt, max_tokens=12, sampling=Sampling(temperature=0)) for prompt in PROMPTS]
    engine = Engine(model, tokenizer)
    whole = finished(engine, [engine.add(request) for request in asked])
    engine = Engine(model, tokenizer, max_rows=2)
    rows = [engine.add(request) for request in asked]
    engine.step()
    rows[0].cancel()
    rows[2].cancel()  # it has no row yet
    engine.step()
    assert rows[0] not in engine.rows
    found = finished(engine, rows)
    assert [found[1], found[3]] == [whole[1], whole[3]]
    assert (found[0][2], found[2][2], found[2][1]) == ("cancelled", "cancelled", [])


def test_prompts_are_read_once_and_forked(make_model, tokenizer):
    """A prompt that another begins with is not read again, and what comes out is the same."""
    model = make_model()
    long = Request(prompt="the quick brown fox jumps", max_tokens=8)
    first = Request(prompt="the quick brown", max_tokens=8)
    plain = Engine(model, tokenizer)
    expected = finished(plain, [plain.add(long)])
    engine = Engine(model, tokenizer, prefix_bytes=10**8)
    finished(engine, [engine.add(first)])
    begins = [tokenizer.boundary, *tokenizer.encode(first.prompt)]
    wanted = [tokenizer.boundary, *tokenizer.encode(long.prompt)]
    assert wanted[: len(begins)] == begins, "the tokens of one must begin with those of the other"
    assert finished(engine, [engine.add(long)]) == expected
    assert engine.speed.kept_tokens == len(begins)
    assert finished(engine, [engine.add(long)]) == expected
    assert engine.speed.kept_tokens == len(begins) + len(wanted)


def test_kept_prefixes_stay_within_their_memory():
    """The least recently used go first; what is larger than all of it is not kept."""

    def read(numbers: int) -> Read:
        return Read(torch.zeros(numbers, dtype=torch.float64), [])

    prefixes = Prefixes(max_bytes=240)
    for token in (1, 2, 3):
        prefixes.keep([token], read(10))
    assert prefixes.longest([1, 9])[0] == 1
    prefixes.keep([4], read(10))
    assert [prefixes.longest([token])[0] for token in (1, 2, 3, 4)] == [1, 0, 1, 1]
    prefixes.keep([5], read(31))
    assert prefixes.longest([5]) == (0, None)
    assert prefixes.bytes == 240


def held_by(state: State) -> int:
    """Bytes of memory that cannot be freed while the state is there, room to grow into included."""
    tensors = [tensor for layer in state for part in (layer, getattr(layer, "room", None)) if part is not None for tensor in _tensors(part)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_holds_no_more_memory_than_is_counted(make_model, tokenizer, name):
    """Not the keys of all that was read, nor a cache's room to grow."""
    engine = Engine(make_model(**MODELS[name]), tokenizer, prefix_bytes=10**8)
    with evaluating(engine.model):
        reads = [engine.read(random_tokens(count, count)) for count in (3, 300)]
    kept = engine.prefixes._kept.values()
    assert sum(held_by(read.state) + read.logits_V.untyped_storage().nbytes() for read in kept) == engine.prefixes.bytes == sum(read.bytes for read in reads)


def test_a_step_begins_no_more_prompts_once_it_has_read_enough(make_model, tokenizer, monkeypatch):
    """Who waits for a token waits for one prompt, not for all that have a free row; equal prompts are one, and what was kept is not read."""
    model = make_model()
    prompts = ["the quick brown fox", "def main():\n    print('hello", "def main():\n    print('hello", "for i in range(10):\n\tif i", "x", "y"]
    asked = [Request(prompt=prompt, max_tokens=9, seed=number) for number, prompt in enumerate(prompts)]
    plain = Engine(model, tokenizer)
    whole = finished(plain, [plain.add(request) for request in asked])
    engine = Engine(model, tokenizer, prefix_bytes=10**8)
    rows = [engine.add(request) for request in asked]
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 5)
    begun = []
    for _ in range(4):
        engine.step()
        begun.append(len(rows) - len(engine.waiting))
    assert begun == [1, 3, 4, 6]
    assert finished(engine, rows) == whole
    rows = [engine.add(request) for request in asked]
    engine.step()
    assert not engine.waiting
    assert finished(engine, rows) == whole


def test_a_penalty_ends_no_request_beside_it(make_model, tokenizer):
    """Logits that overflow by it are no sign of weights that have diverged."""
    engine = Engine(make_model(torch.float32), tokenizer)
    rows = [engine.add(Request(prompt="the", max_tokens=4, sampling=Sampling(repetition_penalty=penalty))) for penalty in (1.0, 1e-300)]
    texts = finished(engine, rows)
    assert [(len(tokens), finish) for _, tokens, finish in texts[:1]] == [(4, "length")]
    assert texts[1][2] in ("length", "stop")


def test_a_small_penalty_counts_in_bf16(make_model, tokenizer):
    """3 / 1.001 is 3 in bf16: the choice between two logits is made in fp32."""
    engine = Engine(make_model(torch.bfloat16), tokenizer)
    row = engine.add(Request(prompt="the", sampling=Sampling(temperature=0, repetition_penalty=1.001)))
    engine.rows = [row]
    engine._logits_BV = torch.zeros(1, 512, dtype=torch.bfloat16)
    other = next(token for token in range(row.prompt[-1] + 1, tokenizer.vocab_size) if not engine._hidden_V[token])
    engine._logits_BV[0, [row.prompt[-1], other]] = 3
    assert engine._choose().tolist() == [other]


def test_a_model_that_does_not_train_keeps_its_mode_without_being_asked(make_model, tokenizer, monkeypatch):
    """To set it, at every step, every module would be visited; one in training is in training again afterwards."""
    model = make_model()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
    model.eval()
    monkeypatch.setattr(model, "train", None)
    engine = Engine(model, tokenizer)
    finished(engine, [engine.add(Request(prompt="x", max_tokens=3))])


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=500, deadline=None)
def test_text_ends_before_the_first_stop_text(pieces, stops):
    """However the text is cut into pieces: what is given is all before the first stop text to be complete, and nothing is given too early."""
    text, given_text, stopped = "", "", False
    held = StopTexts(tuple(stops))
    for piece in pieces:
        text += piece
        given, stopped = held.add(piece)
        given_text += given
        if stopped:
            break
    if not stopped:
        assert not any(stop in text for stop in stops)
        assert given_text + held.finish() == text
    else:
        assert given_text == text[: min(text.find(stop) for stop in stops if stop in text)]
        assert not any(stop in given_text for stop in stops)


def test_a_stop_text_ends_a_request_and_is_not_given(make_model, tokenizer):
    model = make_model()
    engine = Engine(model, tokenizer)
    ((text, tokens, finish),) = finished(engine, [engine.add(Request(prompt="the", max_tokens=40, seed=2))])
    assert finish == "length"
    stop = text[6:9]
    engine = Engine(model, tokenizer)
    ((found, fewer, finish),) = finished(engine, [engine.add(Request(prompt="the", max_tokens=40, seed=2, stop=("no such text", stop)))])
    assert (found, finish) == (text[: text.index(stop)], "stop")
    assert tokens[: len(fewer)] == fewer
    assert len(fewer) < len(tokens)
