"""What benchmarks/decode.py measures: models with random weights of their real sizes, the contexts that they go on from, and what a step must read.

B rows, G key-value heads, S tokens of context, d head width.
"""

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor
from whole_models import shipped

from kan_train.accounting.flops import flops_per_token
from kan_train.inference.engine import PREFILL_TOKENS
from kan_train.model.ada import AdaState
from kan_train.model.attention import SoftmaxAttention
from kan_train.model.cache import BLOCK, KeyValueCache, Room
from kan_train.model.decoder import Decoder
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.params import spec_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Contestant:
    """A model with random weights, made ready to decode."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype, self.config = name, dtype, shipped(name)
        self.model = materialise(LanguageModel(self.config), seed=0, dtype=DTYPES[dtype]).eval()
        for parameter_name, parameter in self.model.named_parameters():
            if parameter_name.endswith("coefficients"):
                parameter.data.normal_(std=0.1)  # splines start at zero
        self.ready()

    def ready(self, active_groves: int | None = None) -> None:
        """Make the decoder, for K active groves in the place of the model's own where it is given."""
        for layer in self.model.grove_layers():
            layer.router.active = active_groves or self.config.grove.active_groves
        self.decoder = Decoder(self.model)

    def tokens(self, *shape: int) -> Tensor:
        """Random ones."""
        return torch.randint(self.config.vocab_size, shape)

    def first_token_seconds(self, length: int) -> float:
        """Seconds from a prompt of `length` tokens to the first of its continuation: read in pieces, as the engine does."""
        prompt, state = self.tokens(1, length), self.model.init_state(1)
        started = time.perf_counter()
        for first in range(0, length, PREFILL_TOKENS):
            logits, state = self.model.prefill(prompt[:, first : first + PREFILL_TOKENS], state)
        logits.argmax().item()
        return time.perf_counter() - started

    def parameter_bytes(self) -> tuple[int, int]:
        """(bytes of what every step reads, of one grove in every layer); of the embedding a step reads a row a token, which is counted there."""
        always = groves = 0
        for name, parameter in self.model.named_parameters():
            size = parameter.numel() * parameter.element_size()
            if spec_of(name, parameter).grove:
                groves += size // self.config.grove.num_groves
            elif not name.startswith("embedding"):
                always += size
        return always, groves


class Case:
    """Steps of a model after a context of some length, for some rows."""

    def __init__(self, contestant: Contestant, batch: int, context: int, memory_bytes: int) -> None:
        self.contestant, self.batch, self.context = contestant, batch, context
        self.seconds: list[float] = []
        self.shares_cache = False
        self._layers = self._filled(memory_bytes)

    def run(self, steps: int) -> None:
        """Time each of `steps` steps, starting at the context."""
        state, decoder = self.state(), self.contestant.decoder
        for tokens_B in self.contestant.tokens(steps, self.batch):
            started = time.perf_counter()
            _, state = decoder.step(tokens_B, state)
            self.seconds.append(time.perf_counter() - started)

    def state(self) -> list[Any]:
        """The state behind the context: ADA's own copy, caches with room behind it that is written again each time."""
        return [layer() for layer in self._layers]

    def _filled(self, memory_bytes: int) -> list[Any]:
        """One maker of states a layer, with random numbers: a step does the same work whatever they are, but for the groves that it chooses."""
        model, shared = self.contestant.model, None
        empty = [state for state in model.init_state(self.batch) if isinstance(state, KeyValueCache)]
        self.shares_cache = sum(self._cache_bytes(state) for state in empty) > memory_bytes
        makers: list[Any] = []
        for state in model.init_state(self.batch):
            if isinstance(state, AdaState):
                makers.append(lambda state=state: AdaState(*(torch.randn_like(getattr(state, field.name)) for field in dataclasses.fields(state))))
                continue
            # Where not all fit, the layers share one memory: it is many times the processor's caches, so that each reads it anew.
            shared = shared if self.shares_cache and shared is not None else self._room(state)
            makers.append(lambda room=shared: self._cache(*room))
        return makers

    def _cache_bytes(self, empty: KeyValueCache) -> int:
        batch, heads, _, width = empty.keys.shape
        return 2 * batch * heads * self.context * width * empty.keys.element_size()

    def _room(self, empty: KeyValueCache) -> tuple[Tensor, Tensor]:
        batch, heads, _, width = empty.keys.shape
        length = -(-(self.context + BLOCK) // BLOCK) * BLOCK
        block = torch.randn(heads, BLOCK, width)
        memory = torch.empty(2, batch, heads, length // BLOCK, BLOCK, width, dtype=empty.keys.dtype).copy_(block[None, None, :, None])
        keys, values = memory.flatten(3, 4).unbind()
        return keys, values

    def _cache(self, keys: Tensor, values: Tensor) -> KeyValueCache:
        return KeyValueCache(keys[:, :, : self.context], values[:, :, : self.context], room=Room(keys, values, self.context))

    def groves_touched(self, steps: int = 8) -> float:
        """Groves that a step reads in a layer: the union over the rows, counted in steps of the same kind."""
        layers, counts = self.contestant.model.grove_layers(), []
        if not layers:
            return 0.0

        def record(_: Tensor, index_TK: Tensor) -> Tensor:
            counts.append(index_TK.unique().numel())
            return index_TK

        for layer in layers:
            layer.router.selector = record
        state = self.state()
        for tokens_B in self.contestant.tokens(steps, self.batch):
            _, state = self.contestant.model.step(tokens_B, state)
        for layer in layers:
            layer.router.selector = None
        return sum(counts) / len(counts)

    def facts(self) -> dict[str, Any]:
        """Bytes that a step must move, by kind, and its FLOPs."""
        always, grove = self.contestant.parameter_bytes()
        touched, config = self.groves_touched(), self.contestant.config
        state = 0
        for layer in self.state():
            tensors = (layer.keys, layer.values) if isinstance(layer, KeyValueCache) else (layer.memory_BHdd, layer.keys_BwHd)
            # ADA's state is written whole, a cache one token of it.
            state += (1 if isinstance(layer, KeyValueCache) else 2) * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        rows = self.batch * config.width * self.contestant.model.embedding.weight.element_size()
        softmax = any(isinstance(layer.mixer, SoftmaxAttention) for layer in self.contestant.model.layers)
        counted = dataclasses.replace(config, sequence_length=self.context + 1, grove=dataclasses.replace(config.grove, **self._active()))
        flops = self.batch * flops_per_token(counted, counting="full" if softmax else "causal").forward
        return {
            "groves_touched": touched, "weight_bytes": always + round(touched * grove) + rows, "state_bytes": state,
            "bytes": always + round(touched * grove) + rows + state, "flops": flops, "layers_share_a_cache": self.shares_cache,
        }  # fmt: skip

    def _active(self) -> dict[str, int]:
        layers = self.contestant.model.grove_layers()
        return {"active_groves": layers[0].router.active} if layers else {}


def read_bandwidth(byte_count: int, repeats: int = 5) -> float:
    """Bytes a second of a sum over that many: the best of some passes."""
    numbers, best = torch.ones(byte_count // 4), 0.0
    for _ in range(repeats + 1):
        started = time.perf_counter()
        numbers.sum()
        best = max(best, byte_count / (time.perf_counter() - started))
    return best


def product_bandwidth(rows: int, width: int, repeats: int = 5) -> float:
    """Bytes a second of a matrix times a vector in fp32, as of a head: what plain torch makes of the memory."""
    matrix, vector, best = torch.randn(rows, width), torch.randn(1, width), 0.0
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.nn.functional.linear(vector, matrix)
        best = max(best, matrix.numel() * 4 / (time.perf_counter() - started))
    return best
