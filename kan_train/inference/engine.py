"""Decoding many requests at once: each joins when there is room, takes its own number of steps, and leaves; the others do not wait for it.

A prompt is read alone, in pieces, by the parallel form; then its row joins the batch, and every step reads one token of every row by the recurrent form. What a
request becomes depends on its own prompt, settings and seed: on its neighbours only as far as a matrix product of more rows rounds otherwise
(groves with a capacity take every token here).
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kan_train.config import ConfigError
from kan_train.inference.lockstep import ALONE, Lockstep
from kan_train.inference.requests import Continuation, Request
from kan_train.inference.sample import choose, penalised, require_finite_logits
from kan_train.inference.states import Prefixes, Read, State, joined, rows_of
from kan_train.inference.text import TextTokenizer
from kan_train.model.decoder import Decoder
from kan_train.model.grove import KalmaGrove
from kan_train.model.lm import LanguageModel
from kan_train.model.norm import at_least_fp32

PREFILL_TOKENS = 1024
"""Tokens of a prompt that are read at a time; a step that has read as many begins no other prompt."""


@dataclass
class Speed:
    """What the engine has done, and how long it took."""

    prompt_tokens: int = 0
    """Tokens of prompts, each prompt once; those of a kept prefix included."""
    kept_tokens: int = 0
    """Of them, those that a kept prefix had read already."""
    tokens: int = 0
    """Tokens given."""
    prefill_seconds: float = 0.0
    """Seconds of reading prompts."""
    stepped: int = 0
    """Tokens that took a step: all but the first of each continuation, which comes from its prompt."""
    decode_seconds: float = 0.0
    """Seconds of those steps."""

    @property
    def read_tokens(self) -> int:
        """Tokens of prompts that were read, not found in a kept prefix."""
        return self.prompt_tokens - self.kept_tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of decoding, over all rows; 0 where none took a step."""
        return self.stepped / self.decode_seconds if self.stepped else 0.0


class Engine:
    """Decodes with one model. Not for several threads at once."""

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, *, max_rows: int = 64, prefix_bytes: int = 0, lockstep: Lockstep = ALONE
    ) -> None:
        """max_rows: requests that are decoded at once. prefix_bytes: memory for prompts that were read, of which others may be the beginning.
        lockstep: the processes that share the model; all make the same calls of `add` and `step`.

        Raises ConfigError where the tokenizer is not the model's.
        """
        if lockstep.size > 1 and lockstep.max_rows < max_rows:
            raise ValueError(f"max_rows={max_rows} tokens do not go into messages of {lockstep.max_rows}")
        self.lockstep = lockstep
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.prefixes, self.speed = Prefixes(prefix_bytes), Speed()
        self.waiting: deque[Continuation] = deque()
        """Requests without a row, in order."""
        self.rows: list[Continuation] = []
        """Requests that are decoded, in the order of the batch."""
        self._hidden_V = not_text(tokenizer, model.config.vocab_size).to(model.head.weight.device)
        self._tokens_B: Tensor | None = None  # given last, and not read yet
        self._logits_BV: Tensor | None = None  # of the rows' next tokens; one of the two is there where there are rows
        self._state: State = []
        self._decoder: Decoder | None = None  # of the weights as they were when the first of the rows was read

    @property
    def idle(self) -> bool:
        """Whether nothing is asked of it."""
        return not self.waiting and not self.rows

    def add(self, request: Request) -> Continuation:
        """Take a request; it is begun when a row is free."""
        continuation = Continuation(request, self.tokenizer)
        self.waiting.append(continuation)
        return continuation

    def step(self) -> list[tuple[Continuation, str]]:
        """Give every row its next token; returns each row that took one, with the text that is certain now, often empty. Rows that have ended leave."""
        self.lockstep.begin(len(self.waiting), len(self.rows), self.speed.tokens)
        self._keep([number for number, row in enumerate(self.rows) if row.finish is None])  # others were cancelled since
        with evaluating(self.model), dropless(self.model):
            self._read_tokens()
            self._admit()
            if not self.rows:
                return []
            started = time.perf_counter()
            tokens_B = self.lockstep.tokens(self._choose, len(self.rows))
            given = [(row, row.add(token, self.tokenizer.boundary)) for row, token in zip(self.rows, tokens_B.tolist(), strict=True)]
            self.speed.tokens += int((tokens_B != self.tokenizer.boundary).sum())
            # Read in the next step: what is given now does not wait for it, and of a row that has ended it never is.
            self._tokens_B, self._logits_BV = tokens_B, None
            self._keep([number for number, row in enumerate(self.rows) if row.finish is None])
            self.speed.decode_seconds += time.perf_counter() - started
        return given

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """(number of the request, piece of its text) as they come, until all have ended."""
        numbers = {self.add(request).number: number for number, request in enumerate(requests)}
        while not self.idle:
            for continuation, piece in self.step():
                if piece and continuation.number in numbers:
                    yield numbers[continuation.number], piece

    def read(self, tokens: Sequence[int]) -> Read:
        """Read one sequence after the longest of its prefixes that was kept, and keep what it leaves."""
        length, kept = self.prefixes.longest(tokens)
        self.speed.prompt_tokens += len(tokens)
        self.speed.kept_tokens += length
        state = kept.state if kept is not None else self.model.init_state(1)
        logits_BV = kept.logits_V[None] if kept is not None else None
        device = self.model.embedding.weight.device
        for first in range(length, len(tokens), PREFILL_TOKENS):
            piece_1T = torch.tensor([list(tokens[first : first + PREFILL_TOKENS])], device=device)
            logits_BV, state = self.model.prefill(piece_1T, state)
        if logits_BV is None:
            raise ValueError("nothing to read: a document begins with the boundary token")
        read = Read(logits_BV[0], state)
        self.prefixes.keep(tokens, read)
        return read

    def _admit(self) -> None:
        """Read prompts of waiting requests while there are free rows, up to one that brings PREFILL_TOKENS or more; several of one prompt read it once."""
        started, logits, states, tokens, before = time.perf_counter(), [], [], None, None
        # Counted in tokens, not in seconds: processes in lockstep must agree.
        enough = self.speed.read_tokens + PREFILL_TOKENS
        while self.waiting and len(self.rows) < self.max_rows:
            row = self.waiting.popleft()
            if row.finish is not None:
                continue
            if before is None or tokens != row.prompt:
                if self.speed.read_tokens >= enough:
                    self.waiting.appendleft(row)
                    break
                tokens, before = row.prompt, self.read(row.prompt)
            self.rows.append(row)
            logits.append(before.logits_V[None])
            states.append(before.state)
        if states:
            if self._logits_BV is None:
                self._decoder = Decoder(self.model)
            old = ([], []) if self._logits_BV is None else ([self._logits_BV], [self._state])
            self._logits_BV, self._state = torch.cat(old[0] + logits), joined(old[1] + states)
            self.speed.prefill_seconds += time.perf_counter() - started

    def _read_tokens(self) -> None:
        """Read the tokens that were given last."""
        if self._tokens_B is not None:
            started = time.perf_counter()
            assert self._decoder is not None
            self._logits_BV, self._state = self._decoder.step(self._tokens_B.to(self._hidden_V.device), self._state)
            self._tokens_B = None
            self.speed.stepped += len(self.rows)
            self.speed.decode_seconds += time.perf_counter() - started

    def _choose(self) -> Tensor:
        """The next token of every row: int64 [B] on CPU."""
        assert self._logits_BV is not None
        require_finite_logits(self._logits_BV)
        samplings = [row.request.sampling for row in self.rows]
        logits = [
            penalised(logits_V, row.prompt + row.tokens, row.request.sampling.repetition_penalty)
            for logits_V, row in zip(at_least_fp32(self._logits_BV), self.rows, strict=True)
        ]
        return choose(torch.stack(logits).masked_fill_(self._hidden_V, -torch.inf), samplings, [row.chance for row in self.rows])

    def _keep(self, going: list[int]) -> None:
        """Of all rows those of these numbers alone."""
        if len(going) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in going]
        if not going:
            self._tokens_B, self._logits_BV, self._state = None, None, []
            return
        with evaluating(self.model):
            self._state = rows_of(self._state, going)
            self._tokens_B = None if self._tokens_B is None else self._tokens_B[going]
            self._logits_BV = None if self._logits_BV is None else self._logits_BV[going]


def not_text(tokenizer: TextTokenizer, vocab_size: int) -> Tensor:
    """Bool [V]: entries that are no text and no boundary (the unknown token, and rows of a vocabulary larger than the tokenizer's)."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {vocab_size}: the model was trained with another one; "
            f"put the corpus's own tokenizer.model into the run directory"
        )
    hidden = torch.ones(vocab_size, dtype=torch.bool)
    hidden[: tokenizer.vocab_size] = torch.tensor(tokenizer.bytes_of_tokens()) == 0
    hidden[tokenizer.boundary] = False
    return hidden


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Inference mode for the decoding; a model in training is in training again afterwards."""
    training = model.training
    # Setting a mode visits every module: at each step it would take a quarter of a small model's time.
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


@contextmanager
def dropless(model: LanguageModel) -> Iterator[None]:
    """Inside, every grove takes all tokens that chose it: under a capacity (model.grove.capacity_factor) a sequence's figures would depend on what is
    read beside it, on padding, and on the tokens behind."""
    layers = [module for module in model.modules() if isinstance(module, KalmaGrove)] if model.config.grove.capacity_factor else []
    before = [layer.config for layer in layers]
    for layer in layers:
        layer.config = dataclasses.replace(layer.config, capacity_factor=0.0)
    try:
        yield
    finally:
        for layer, config in zip(layers, before, strict=True):
            layer.config = config
