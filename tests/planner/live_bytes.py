"""Live tensor bytes of a process, counted where memory is given out: every storage that any operator sees, from its birth to its end.

Knows nothing of the planner. Storages are counted once whatever views of them there are, also those that only autograd or DeepSpeed holds; what an operator
takes and gives back inside itself is not seen.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages on `device_type` that are alive; enter it before anything is built."""

    def __init__(self, device_type: str = "cpu", describe: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.device_type, self.describe = device_type, describe
        self.now = self.peak = 0
        self.live: dict[int, tuple[int, Any]] = {}
        self.at_peak: list[tuple[int, Any]] = []
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: Tensor) -> None:
        """Count the storage behind `tensor`, unless it is counted."""
        if tensor.device.type != self.device_type or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = storage.nbytes()
        self.live[key] = (size, self.describe() if self.describe else None)
        self._references[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            if self.describe:
                self.at_peak = list(self.live.values())

    def see_all(self) -> None:
        """Count what came into being where no operator was called."""
        for found in gc.get_objects():
            if isinstance(found, Tensor):
                self.see(found)

    def restart(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        self.see_all()
        self.peak = self.now
        self.at_peak = list(self.live.values())

    def _gone(self, key: int) -> None:
        size, _ = self.live.pop(key)
        self._references.pop(key)
        self.now -= size
