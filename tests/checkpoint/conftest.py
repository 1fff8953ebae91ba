"""A small state of several types and shapes, cut into fragments as ZeRO and tensor parallelism cut it."""

import os
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kan_train.checkpoint import Fragment, save


def make_state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every kind a run has, with values whose bits are easily lost: signed zeros, subnormals, infinities, NaN payloads."""
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0x7FC00001, 0x80000000 - 2**32, 1, 0x7F800000, 0xFF800000 - 2**32], dtype=torch.int32).view(torch.float32)
    weight = torch.randn(12, 10, generator=generator)
    weight.view(-1)[7:12] = odd
    return {
        "param/head.weight": weight,
        "param/groves.up": torch.randn(4, 6, 5, generator=generator),
        "moment/groves.up": torch.randn(4, 6, 5, generator=generator).double(),
        "param/half": torch.randn(33, generator=generator).bfloat16(),
        "param/scalar": torch.randn((), generator=generator),
        "buffer/counts": torch.randint(-(2**62), 2**62, (7, 3), generator=generator),
        "buffer/mask": torch.rand(5, generator=generator) > 0.5,
        "buffer/empty": torch.empty(0, 4),
    }


def cut(name: str, tensor: Tensor, cuts: list[int], axis: int = 0, parts: int = 1) -> list[Fragment]:
    """Fragments of `tensor`: `parts` shards along `axis` (as tensor parallelism), each cut flat at the shares `cuts` / 12 (as ZeRO)."""
    shards = tensor.chunk(parts, axis) if tensor.dim() > axis else [tensor]
    fragments, position = [], 0
    for shard in shards:
        offset = [0] * tensor.dim()
        if len(shards) > 1:
            offset[axis] = position
            position += shard.shape[axis]
        edges = [0, *(shard.numel() * c // 12 for c in sorted(cuts)), shard.numel()]
        for start, stop in pairwise(edges):
            flat = shard.reshape(-1)[start:stop].clone()
            place = {"global_shape": tuple(tensor.shape), "local_offset": tuple(offset), "local_shape": tuple(shard.shape)}
            fragments.append(Fragment(name=name, **place, start=start, flat=flat))
    return fragments


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits (NaN payloads and signed zeros too)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # PyTorch gives empty tensors strides that a view as bytes refuses.
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def in_child(work: Callable[[], object], *, ordinary_user: bool = False) -> int:
    """Run `work` in a forked process, as the user nobody if wanted, and return its exit status (1 if it raised)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if ordinary_user and os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Kit:
    """The helpers above, for test modules (which cannot import each other)."""

    make_state = staticmethod(make_state)
    cut = staticmethod(cut)
    same_bits = staticmethod(same_bits)
    in_child = staticmethod(in_child)

    @staticmethod
    def whole(state: dict[str, Tensor]) -> list[Fragment]:
        """Every tensor as one fragment over its own memory."""
        return [Fragment.whole(name, tensor) for name, tensor in state.items()]

    @staticmethod
    def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to load into."""
        return {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    @classmethod
    def equal(cls, a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        """Whether two states have the same names and bits."""
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A thousand small saves would wait minutes for a busy disk. That fsync is called where it must be is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a checkpoint (step 7, in three data files) and the state it holds."""
    state = make_state()
    path = save(tmp_path / "checkpoints", step=7, fragments=Kit.whole(state), state={"step": 7}, max_file_bytes=1200)
    assert len(list(path.glob("*.safetensors"))) >= 3
    return path, state
