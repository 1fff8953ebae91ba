"""The key-value cache of softmax attention.  B batch, T new tokens, S tokens so far, G key-value heads, d head width."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
"""Tokens by which a cache's memory grows."""


@dataclass
class Room:
    """Memory that caches share which grew out of one another; each sees its own first tokens of it."""

    keys: Tensor
    values: Tensor
    filled: int
    """Tokens that some cache has written."""


@dataclass
class KeyValueCache:
    """Keys (rotated) and values of the tokens read so far, each [B, G, S, d]. A cache never changes: `append` gives a new one."""

    keys: Tensor
    values: Tensor
    lengths_B: Tensor | None = None
    """int64: how many of the S each sequence has, the last ones of its row; None: all S."""
    room: Room | None = None

    def append(self, keys_BGTd: Tensor, values_BGTd: Tensor) -> "KeyValueCache":
        """The cache after T more tokens."""
        used = self.keys.shape[2]
        after = used + keys_BGTd.shape[2]
        lengths_B = None if self.lengths_B is None else self.lengths_B + keys_BGTd.shape[2]
        if not torch.is_inference_mode_enabled():  # with gradients nothing may be written over
            return KeyValueCache(torch.cat((self.keys, keys_BGTd), dim=2), torch.cat((self.values, values_BGTd), dim=2), lengths_B)
        room = self.room
        # Two caches may have grown out of this one: the first to write behind it has the room, the other takes room of its own.
        if room is None or room.filled != used or after > room.keys.shape[2]:
            room = Room(_grown(self.keys, after), _grown(self.values, after), used)
        room.keys[:, :, used:after], room.values[:, :, used:after], room.filled = keys_BGTd, values_BGTd, after
        return KeyValueCache(room.keys[:, :, :after], room.values[:, :, :after], lengths_B, room)

    def positions(self, time: int) -> Tensor:
        """Positions of the next `time` tokens in their sequences: int64 [T], or [B, T] where lengths differ."""
        new_T = torch.arange(time, device=self.keys.device)
        return new_T + self.keys.shape[2] if self.lengths_B is None else new_T + self.lengths_B[:, None]

    def mask(self, time: int) -> Tensor:
        """bool [T, S], or [B, 1, T, S] where lengths differ: True where the t-th of the last `time` tokens may see column j."""
        keys = self.keys.shape[2]
        past_TS = past_mask(time, keys, self.keys.device)
        if self.lengths_B is None:
            return past_TS
        own_BS = torch.arange(keys, device=self.keys.device) >= keys - self.lengths_B[:, None]
        return past_TS & own_BS[:, None, None]


def past_mask(time: int, keys: int, device: torch.device) -> Tensor:
    """bool [T, S]: True where row t, the S-T+t-th token, may see column j, that is j <= S-T+t."""
    return torch.ones(time, keys, dtype=torch.bool, device=device).tril(keys - time)


def _grown(old_BGSd: Tensor, tokens: int) -> Tensor:
    batch, heads, used, width = old_BGSd.shape
    new_BGSd = old_BGSd.new_empty(batch, heads, -(-(tokens + 1) // BLOCK) * BLOCK, width)
    new_BGSd[:, :, :used] = old_BGSd
    return new_BGSd
