"""Every configuration that the launchers can choose, for the compile report.

Shapes of a kan_1b grove where a shape is compiled in: N 128, n = 8 (cubic splines on 5 cells), activations of 16 columns a function over 1,024. A grid that
needs several eights (independent cubics on 5 cells, n = 20) has tiles of its own in the forward pass and for the gradient of u; for those of the weights it
has the same tile and takes fewer registers, so that it is left out, as is fp16, which compiles as bf16 does.
"""

from collections.abc import Iterator
from typing import Any

from kan_train.kernels.backend import AotCase
from kan_train.kernels.edge_spline import configurations as choose
from kan_train.kernels.edge_spline.functions import Functions
from kan_train.kernels.edge_spline.triton_activation import activation_backward, activation_forward
from kan_train.kernels.edge_spline.triton_decode import edge_decode
from kan_train.kernels.edge_spline.triton_layer import edge_forward, edge_grad_input, edge_grad_weights, sum_parts

_GROVES, _COLUMNS, _FUNCTIONS = 128, 1024, 64
_CUBIC = Functions("bspline", 3, 5, -3.0, 3.0)
_INDEPENDENT = Functions("piecewise_poly", 3, 5, -3.0, 3.0)
_SCALARS = {"low": "fp32", "inverse_step": "fp32"}


def aot_cases(target: str) -> Iterator[AotCase]:
    """The configurations of `target`."""
    yield from _forward(target)
    yield from _grad_input(target)
    yield from _grad_weights(target)
    yield from _others(target)


def _forward(target: str) -> Iterator[AotCase]:
    signature = _pointers("u", "base", "coefficients", "y") | _integers("groves", "inputs", "outputs") | _SCALARS
    constants = {"BASE_I": choose.BASE_INPUTS, "GROVES": choose.grove_lanes(_GROVES)}
    chosen = dict.fromkeys(choose.forward_tiles(target, 2, outputs, 1, few) for outputs in (128, 1024) for few in (False, True))
    cases = [("bf16", tiles, _CUBIC) for tiles in chosen] + [("bf16", choose.forward_tiles(target, 2, 1024, 3, False), _INDEPENDENT)]
    for dtype, tiles, functions in cases + _full(target, choose.forward_tiles(target, 4, 1024, 1, False)):
        yield _layer_case("edge_forward", edge_forward, signature, dtype, tiles, functions, constants)


def _grad_input(target: str) -> Iterator[AotCase]:
    signature = _pointers("grad", "u", "base", "coefficients", "grad_u") | _integers("groves", "inputs", "outputs") | _SCALARS
    constants = {"GROVES": choose.grove_lanes(_GROVES)}
    chosen = dict.fromkeys(choose.grad_input_tiles(target, 2, 1, few) for few in (False, True))
    cases = [("bf16", tiles, _CUBIC) for tiles in chosen] + [("bf16", choose.grad_input_tiles(target, 2, 3, False), _INDEPENDENT)]
    for dtype, tiles, functions in cases + _full(target, choose.grad_input_tiles(target, 4, 1, False)):
        yield _layer_case("edge_grad_input", edge_grad_input, signature, dtype, tiles, functions, constants)


def _grad_weights(target: str) -> Iterator[AotCase]:
    """bf16 as groves have it, in one stage (a launch makes a constant of the 1); fp32 as a layer of one grove has it, in parts."""
    signature = _pointers("grad", "u", "grad_base", "grad_coefficients") | _integers("inputs", "outputs") | _SCALARS
    tiles, of_groves = choose.grad_weights_tiles(target, 2), signature | _integers("groves")
    yield _layer_case("edge_grad_weights", edge_grad_weights, of_groves, "bf16", tiles, _CUBIC, {"splits": 1})
    for dtype, tiles, functions in _full(target, choose.grad_weights_tiles(target, 4)):
        yield _layer_case("edge_grad_weights", edge_grad_weights, signature | {"splits": "i32"}, dtype, tiles, functions, {"groves": 1})


def _others(target: str) -> Iterator[AotCase]:
    decode = choose.decode_tiles(target)
    known = choose.layer_constants(_CUBIC)
    constants = {name: known[name] for name in ("SPLINE", "ORDER", "GRID", "COUNT")} | {"BLOCK_I": decode.inputs, "BLOCK_O": decode.outputs}
    signature = _pointers("u", "base", "coefficients", "y") | {"grove_of_row": "*i64:16"} | _integers("rows", "groves", "inputs", "outputs", "share")
    yield AotCase("edge_decode bf16", edge_decode, _of(signature | _SCALARS, "bf16"), constants, decode.warps, decode.stages, tensor_cores=False)

    table = (_FUNCTIONS, _CUBIC.grid + 2, _CUBIC.order + 1, _COLUMNS)
    signature = _pointers("h", "y") | {"table": "*fp32:16", "offsets": "*i32:16"} | _integers("groves", "columns") | _SCALARS
    constants = choose.activation_constants(target, *table) | {"GROVES": choose.grove_lanes(_GROVES)}
    yield AotCase("activation_forward bf16", activation_forward, _of(signature, "bf16"), constants, 4, 1, tensor_cores=False)

    signature = _pointers("grad", "h", "grad_h") | {"table": "*fp32:16", "grad_table": "*fp32:16", "offsets": "*i32:16", "splits": "i32"}
    signature |= _integers("groves", "columns") | _SCALARS
    yield AotCase("activation_backward bf16", activation_backward, _of(signature, "bf16"), choose.activation_sum_constants(*table), 1, 1, tensor_cores=False)

    signature = {"parts": "*fp32:16", "out": "*bf16:16", "elements": "i32:16", "count": "i32"}
    yield AotCase("sum_parts bf16", sum_parts, signature, {"BLOCK": 1024}, 4, 1, tensor_cores=False)


def _layer_case(name: str, kernel: Any, signature: dict[str, str], dtype: str, tiles: choose.Tiles, functions: Functions, more: dict[str, int]) -> AotCase:
    title = f"{name} {dtype} {tiles.rows}x{tiles.outputs}x{tiles.inputs} n{functions.count}"
    constants = choose.layer_constants(functions) | tiles.constants | {"PRECISION": "tf32" if dtype == "tf32" else "ieee"} | more
    types = _of(signature | {"offsets": "*i32:16"}, "bf16" if dtype == "bf16" else "fp32")
    return AotCase(title, kernel, types, constants, tiles.warps, tiles.stages, tensor_cores=dtype != "fp32")


def _full(target: str, tiles: choose.Tiles) -> list[tuple[str, choose.Tiles, Functions]]:
    """fp32, and fp32 rounded to TF32, which a user can allow on NVIDIA's GPUs; compiled for the one that asks most of a TF32 operand's layout."""
    return [("fp32", tiles, _CUBIC)] + ([("tf32", tiles, _CUBIC)] if target == "sm_90" else [])


def _pointers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*{dtype}:16")


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32:16")


def _of(signature: dict[str, str], dtype: str) -> dict[str, str]:
    return {name: kind.format(dtype=dtype) for name, kind in signature.items()}
