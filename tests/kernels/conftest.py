"""What the tests of all kernels share. Without a GPU the kernels run in triton's interpreter (tests/conftest.py asks for it).

Tests are no package: what a test file needs from here it gets as a fixture.
    device        where the kernels run
    guarded       guarded(shape, dtype) -> Guarded: an output between two guard zones
    allocations   with allocations(): every tensor that the code inside allocates lies between guard zones, and starts as NaN where it is not zeroed
    run_mutant    run_mutant(module, old, new, check, reload=()): with one textual change of a module the check must fail
    neighbour     neighbour(name): a module of this folder
    close         close(actual, reference, dtype, factor=1.0): relative error in the norm, within the tolerance of the dtype
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Relative error in the norm against float64: fp32 sums of a few hundred terms; half a unit in the last place of fp16 and bf16, with room for a rounded
# intermediate value and for the sums that enter twice.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_CANARY = 0xA5
_ZONE = 4096  # bytes: a tile of 64 fp32 columns that runs over by 16 rows stays inside


def pytest_configure() -> None:
    """Repair the interpreter once, before anything is launched."""
    if DEVICE.type == "cpu" and importlib.util.find_spec("triton") is not None:
        _neighbour("interpreter").repair()


def _neighbour(name: str) -> ModuleType:
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(f"kernels_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Guarded:
    """A tensor inside a larger allocation whose ends hold a pattern: a kernel that writes past its output overwrites it."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device = DEVICE) -> None:
        size = dtype.itemsize * torch.Size(shape).numel()
        # A start that only 16 divides: the least that the allocator of a framework would give.
        start = _ZONE + 16
        self.end = start + size
        self.memory = torch.full((self.end + _ZONE,), _CANARY, dtype=torch.uint8, device=device)
        self.start = start
        self.view = self.memory[start : self.end].view(dtype).view(*shape) if size else torch.empty(*shape, dtype=dtype, device=device)
        if dtype.is_floating_point:
            self.view.fill_(float("nan"))

    def intact(self) -> bool:
        """Whether both zones still hold their pattern."""
        return bool((self.memory[: self.start] == _CANARY).all()) and bool((self.memory[self.end :] == _CANARY).all())


@contextmanager
def guarded_allocations() -> Iterator[list[Guarded]]:
    """torch.empty, empty_like, zeros, zeros_like, full, new_empty, new_zeros, new_full give views between guard zones; on leaving, all must be intact."""
    made: list[Guarded] = []
    original = {name: getattr(torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like", "full")}
    methods = ("new_empty", "new_zeros", "new_full")
    busy = False

    def place(plain: Tensor, fill: object) -> Tensor:
        nonlocal busy
        if busy or plain.device.type not in ("cpu", "cuda") or not plain.is_contiguous():
            return plain
        busy = True
        try:
            made.append(Guarded(plain.shape, plain.dtype, plain.device))
            # An integer output has no NaN: it starts as the canary, which is no row, token or grove.
            return made[-1].view if fill is None else made[-1].view.fill_(fill)
        finally:
            busy = False

    def wrapped(function: Callable[..., Tensor], fill: object) -> Callable[..., Tensor]:
        def allocate(*arguments: object, **options: object) -> Tensor:
            plain = function(*arguments, **options)
            return place(plain, fill if fill != "full" or not plain.numel() else plain.flatten()[0].item())

        return allocate

    fills = {"empty": None, "empty_like": None, "zeros": 0, "zeros_like": 0, "full": "full", "new_empty": None, "new_zeros": 0, "new_full": "full"}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in original.items():
            patch.setattr(torch, name, wrapped(function, fills[name]))
        for name in methods:
            patch.setattr(Tensor, name, wrapped(getattr(torch.Tensor, name), fills[name]), raising=False)
        yield made
    broken = [tuple(guard.view.shape) for guard in made if not guard.intact()]
    assert not broken, f"written outside outputs of shapes {broken}"


def _assert_close(actual: Tensor, reference: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert actual.shape == reference.shape, f"{tuple(actual.shape)} instead of {tuple(reference.shape)}"
    actual, reference = actual.detach().double().cpu(), reference.detach().double().cpu()
    assert bool(actual.isfinite().all()), "values that are not finite"
    error = float((actual - reference).norm() / reference.norm().clamp(min=1e-30)) if reference.any() else float(actual.norm())
    assert error <= factor * TOLERANCE[dtype], f"relative error {error:.2e}, allowed {factor * TOLERANCE[dtype]:.2e}"


@contextmanager
def _replaced(module: str, old: str, new: str, reload: Sequence[str], folder: Path) -> Iterator[None]:
    """The module with one textual change in its place, and the modules of `reload` executed again on top of it."""
    original = importlib.import_module(module)
    assert original.__file__ is not None
    source = Path(original.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module}"
    with pytest.MonkeyPatch.context() as patch:
        # A file of its own: triton reads a kernel's source from its file.
        changed = folder / f"{module.rpartition('.')[2]}.py"
        changed.write_text(source.replace(old, new), encoding="utf-8")
        for name, path in ((module, changed), *((name, None) for name in reload)):
            before = importlib.import_module(name)
            spec = importlib.util.spec_from_file_location(name, path or before.__file__)
            assert spec is not None
            assert spec.loader is not None
            fresh = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, fresh)
            parent, _, child = name.rpartition(".")
            spec.loader.exec_module(fresh)
            patch.setattr(sys.modules[parent], child, fresh)
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU where there is one, else the CPU and its interpreter."""
    return DEVICE


@pytest.fixture(scope="session")
def guarded() -> type[Guarded]:
    """guarded(shape, dtype).view is an output, .intact() tells whether it was all that was written."""
    return Guarded


@pytest.fixture(scope="session")
def allocations() -> Callable[[], AbstractContextManager[list[Guarded]]]:
    """with allocations(): ...   checks every allocation of the code inside."""
    return guarded_allocations


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Asserts a small relative error in the norm against a float64 reference."""
    return _assert_close


@pytest.fixture(scope="session")
def neighbour() -> Callable[[str], ModuleType]:
    """neighbour(name): a module of this folder, for references that several files share."""
    return _neighbour


@pytest.fixture
def run_mutant(tmp_path: Path) -> Callable[..., None]:
    """Shows that `check` notices a change of a kernel.

    run_mutant(module, old, new, check, reload=()): `module` by its full name, which operators must look up at every call (`from room import triton` inside
    the function); `old` must occur once in its source. `reload` names modules that import from it, in the order of their imports, the operators' own never
    among them (an operator can be registered once). check() must pass unchanged and raise AssertionError with the change.
    """

    def run(module: str, old: str, new: str, check: Callable[[], None], reload: Sequence[str] = ()) -> None:
        check()
        with _replaced(module, old, new, reload, tmp_path), pytest.raises(AssertionError):
            check()

    return run
