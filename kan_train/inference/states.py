"""States of a model as values: what a prompt left can be kept, forked, and decoded beside others.

A state is what `LanguageModel.prefill` and `step` return: one entry a layer, whose tensors have sequences in their first dimension. None is ever changed,
but by `Decoder.step`, which overwrites the one that it is given: `joined` and `rows_of` give it one of its own.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kan_train.model.cache import KeyValueCache

State = list[Any]


def rows_of(state: State, rows: Sequence[int]) -> State:
    """The sequences `rows` of a state, in this order; one may be there several times: a fork."""
    return [_rows(layer, torch.tensor(list(rows), device=_tensors(layer)[0].device)) for layer in state]


def joined(states: Sequence[State]) -> State:
    """One state of all sequences of several, in order, however many tokens each has read; to overwrite it does not touch them."""
    return [_joined(layers) for layers in zip(*states, strict=True)] if len(states) > 1 else [_own(layer) for layer in states[0]]


def bytes_of(state: State) -> int:
    """Bytes of the state's tensors; for ADA the same after any number of tokens."""
    return sum(tensor.numel() * tensor.element_size() for layer in state for tensor in _tensors(layer))


def compact(state: State) -> State:
    """The same state in `bytes_of(state)` bytes: without the memory around tensors that are parts of larger ones, and without room to grow into."""
    return [type(layer)(*map(_alone, _tensors(layer))) for layer in state]


def _alone(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _tensors(layer: Any) -> list[Tensor]:
    return [value for field in fields(layer) if isinstance(value := getattr(layer, field.name), Tensor)]


def _rows(layer: Any, rows: Tensor) -> Any:
    if not isinstance(layer, KeyValueCache):
        return type(layer)(*(tensor[rows] for tensor in _tensors(layer)))
    if layer.lengths_B is None:
        return KeyValueCache(layer.keys[rows], layer.values[rows])
    lengths_B = layer.lengths_B[rows]
    longest = int(lengths_B.max())
    first = layer.keys.shape[2] - longest
    return _even(KeyValueCache(layer.keys[rows, :, first:], layer.values[rows, :, first:], lengths_B))


def _own(layer: Any) -> Any:
    # What a cache holds is never written over: it can be long, and is not copied.
    return layer if isinstance(layer, KeyValueCache) else type(layer)(*(tensor.clone() for tensor in _tensors(layer)))


def _joined(layers: Sequence[Any]) -> Any:
    if not isinstance(layers[0], KeyValueCache):
        return type(layers[0])(*(torch.cat(tensors) for tensors in zip(*map(_tensors, layers), strict=True)))
    longest = max(layer.keys.shape[2] for layer in layers)
    lengths = [
        torch.full((len(layer.keys),), layer.keys.shape[2], device=layer.keys.device) if layer.lengths_B is None else layer.lengths_B for layer in layers
    ]
    keys, values = (torch.cat([_behind_zeros(getattr(layer, name), longest) for layer in layers]) for name in ("keys", "values"))
    return _even(KeyValueCache(keys, values, torch.cat(lengths)))


def _behind_zeros(x_BGSd: Tensor, length: int) -> Tensor:
    # Zeros, not what memory happens to hold: what a mask hides is still multiplied by 0.
    return torch.nn.functional.pad(x_BGSd, (0, 0, length - x_BGSd.shape[2], 0))


def _even(cache: KeyValueCache) -> KeyValueCache:
    """Without lengths where all are the same."""
    assert cache.lengths_B is not None
    return KeyValueCache(cache.keys, cache.values) if bool((cache.lengths_B == cache.keys.shape[2]).all()) else cache


@dataclass(frozen=True)
class Read:
    """What reading some tokens left, for one sequence."""

    logits_V: Tensor
    """Logits of the next token."""
    state: State
    """The state after them."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return bytes_of(self.state) + self.logits_V.numel() * self.logits_V.element_size()


class Prefixes:
    """What was read before, by its tokens: a prompt that begins with it need not read it again. The least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[tuple[int, ...], Read] = OrderedDict()

    def longest(self, tokens: Sequence[int]) -> tuple[int, Read | None]:
        """(length, what it left) of the longest kept prefix of `tokens`; (0, None) where there is none."""
        for length in sorted({len(kept) for kept in self._kept if len(kept) <= len(tokens)}, reverse=True):
            key = tuple(tokens[:length])
            if key in self._kept:
                self._kept.move_to_end(key)
                return length, self._kept[key]
        return 0, None

    def keep(self, tokens: Sequence[int], read: Read) -> None:
        """Keep it, as far as there is room."""
        key = tuple(tokens)
        if key in self._kept or read.bytes > self.max_bytes:
            return
        self._kept[key] = Read(_alone(read.logits_V), compact(read.state))
        self.bytes += read.bytes
        while self.bytes > self.max_bytes:
            _, old = self._kept.popitem(last=False)
            self.bytes -= old.bytes
