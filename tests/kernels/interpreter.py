"""Repairs of triton's interpreter (3.6 to 3.9), without which its answers are wrong. Tests alone use them; `repair()` comes before the first launch.

1. The interpreter holds bf16 as the bits of a uint16, and adds, multiplies, compares and sums those integers. Here operands are widened to fp32, and results
   rounded to the nearest bf16 (ties to even) where triton says that the result is bf16.
2. Its cast from fp32 to bf16 cuts off, or loses the carry of a rounding. Here it rounds to nearest even.
3. triton 3.6 with numpy 2.4: range(0, n) with a runtime n refuses the array of one element.
4. tl.dot(fp32, fp32, input_precision="tf32") multiplies in full fp32. Here operands are rounded to TF32 as on a GPU.
"""

from typing import Any

import numpy as np


def repair() -> None:
    """Patch the interpreter of this process, once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    builder.repaired = True
    handle_type = interpreter.TensorHandle

    def is_bf16(handle: Any) -> bool:
        return isinstance(handle, handle_type) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16

    def wide(handle: Any) -> Any:
        return handle_type(_widen(handle.data), tl.float32) if is_bf16(handle) else handle

    def wrap(name: str) -> None:
        original = getattr(builder, name)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            if not any(map(is_bf16, arguments)):
                return original(self, *arguments, **options)
            result = original(self, *map(wide, arguments), **options)
            # A comparison gives truth values, which stay what they are.
            return handle_type(_narrow(result.data), tl.bfloat16) if result.data.dtype.kind == "f" else result

        setattr(builder, name, call)

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_clampf", "create_fabs"):
        if hasattr(builder, name):
            wrap(name)
    _repair_casts(builder, handle_type, tl, is_bf16)
    _repair_dot(builder, handle_type, wide)
    _repair_index(interpreter)
    for operations in (interpreter.ReduceOps, interpreter.ScanOps):
        _repair_reductions(operations, handle_type, tl, wide)


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """fp32 -> bits of bf16, to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _repair_casts(builder: Any, handle_type: Any, tl: Any, is_bf16: Any) -> None:
    cast, to_float = builder.cast_impl, builder.create_fp_to_fp

    def converted(source: Any, to: Any) -> Any:
        """The cast of bf16 to or from another floating type by way of fp32, None for any other cast."""
        if is_bf16(source) and to.scalar in (tl.float16, tl.float32, tl.float64):
            return handle_type(_widen(source.data).astype({tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}[to.scalar]), to.scalar)
        if to.scalar == tl.bfloat16 and source.data.dtype.kind == "f":
            return handle_type(_narrow(source.data.astype(np.float32)), tl.bfloat16)
        if to.scalar == tl.bfloat16 and source.data.dtype.kind in "iub" and not is_bf16(source):
            return handle_type(_narrow(source.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(source) and to.scalar.is_int():
            return cast(builder, handle_type(_widen(source.data), tl.float32), to)
        return None

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        result = converted(source, to)
        return cast(self, source, to) if result is None else result

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        result = converted(source, to)
        return to_float(self, source, to, rounding) if result is None else result

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.get_bf16 = lambda self, value: handle_type(_narrow(np.array([value], np.float32)), tl.bfloat16)


def _repair_dot(builder: Any, handle_type: Any, wide: Any) -> None:
    original = builder.create_dot

    def tf32(handle: Any) -> Any:
        if handle.data.dtype != np.float32:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint32)
        rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
        return handle_type(rounded.view(np.float32), handle.dtype)

    def create_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, *others: Any) -> Any:
        narrow = str(precision).upper().endswith("TF32") and a.dtype.scalar == b.dtype.scalar and a.data.dtype == np.float32
        a, b = (tf32(a), tf32(b)) if narrow else (wide(a), wide(b))
        return original(self, a, b, total, precision, *others)

    builder.create_dot = create_dot


def _repair_index(interpreter: Any) -> None:
    original = interpreter._patch_lang_tensor

    def patch(*arguments: Any) -> None:
        original(*arguments)
        tensor, scope = arguments[0], arguments[-1]

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if hasattr(scope, "set_attr"):
            scope.set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch


def _repair_reductions(operations: Any, handle_type: Any, tl: Any, wide: Any) -> None:
    """tl.sum, tl.cumsum, ... of bf16."""
    original = operations.apply

    def tensor(handle: Any, scalar: Any, like: Any) -> Any:
        return tl.core.tensor(handle, tl.block_type(scalar, list(like.shape)) if like.type.is_block() else scalar)

    def apply(self: Any, inputs: Any) -> Any:
        if not isinstance(inputs, tuple):
            return self.apply((inputs,))[0]
        narrow = [isinstance(x, tl.core.tensor) and x.dtype.scalar == tl.bfloat16 for x in inputs]
        if not any(narrow):
            return original(self, inputs)
        results = original(self, tuple(tensor(wide(x.handle), tl.float32, x) if yes else x for x, yes in zip(inputs, narrow, strict=True)))
        rounded = zip(results, (*narrow, *[False] * (len(results) - len(narrow))), strict=False)
        return tuple(
            tensor(handle_type(_narrow(x.handle.data), tl.bfloat16), tl.bfloat16, x) if yes and x.dtype.scalar == tl.float32 else x for x, yes in rounded
        )

    operations.apply = apply
