"""Every configuration that the launchers can choose, for the compile report.  Sizes as at the stated shapes, where 16 divides all of them."""

from collections.abc import Iterator
from typing import Any

import torch

from kan_train.kernels.backend import AotCase
from kan_train.kernels.grove_gemm.configurations import Tiles, columns_together, configurations, part_columns, sum_blocks
from kan_train.kernels.grove_gemm.triton_gated import gated_backward, gated_forward
from kan_train.kernels.grove_gemm.triton_products import grouped_product, weight_gradients
from kan_train.kernels.grove_gemm.triton_sums import combine, combine_gradients, sum_gate, sum_table

_GROVES, _CHOICES, _WIDTH, _CELLS, _POWERS, _GROUP = 128, 8, 2048, 7, 4, 16
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_INDEX = "*i64:16"
# Bytes that triton 3.6 spills in the epilogue of the backward kernel on sm_90, once a tile; 3.9 spills none, to which the stored report holds it.
_SPILLS_OF_3_6 = 160


def aot_cases(target: str) -> Iterator[AotCase]:
    """See `backend.AotCase`. TF32 is asked of NVIDIA alone; fp32 in full precision has no tensor cores there."""
    for name, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        if precision == "tf32" and not target.startswith("sm_"):
            continue
        tiles = configurations(target, _TYPES[name], precision)
        label = "tf32" if precision == "tf32" else name
        cores = name != "fp32" or precision == "tf32"
        yield from _products(label, f"*{name}:16", tiles, precision, cores)
        yield from _gated(label, f"*{name}:16", tiles, precision, cores)
        if precision == "ieee":
            yield from _sums(target, label, f"*{name}:16")
    yield _table_sum(configurations(target, torch.bfloat16, "ieee")["back"])


def _products(label: str, matrix: str, kinds: dict[str, Tiles], precision: str, cores: bool) -> Iterator[AotCase]:
    sizes = dict.fromkeys(("limit", "groves", "inner", "columns"), "i32:16")
    # The gathered product of `grouped_gemm`, its gradient, W_out, and the gradient of a gated grove's input.
    for name, kind, gather, two, transposed in (
        ("gathered", "product", True, False, False),
        ("rows", "product", False, False, False),
        ("few rows", "few_product", False, False, False),
        ("few gathered", "few_product", True, False, False),
        ("transposed", "product", False, False, True),
        ("two transposed", "product", False, True, True),
    ):
        absent = {} if gather else {"gather": None}
        absent |= {} if two else {"x2": None, "weight2": None}
        signature = {"x": matrix, "weight": matrix, "x2": matrix, "weight2": matrix, "y": matrix, "offsets": "*i32:16", "gather": _INDEX} | sizes
        constants = {"GATHER": gather, "TWO": two, "TRANSPOSED": transposed, "DESCRIPTORS": kinds[kind].descriptors}
        yield _case(f"product {name} {label}", grouped_product, signature, constants | _tile(kinds[kind], precision) | absent, kinds[kind], cores)
    for name, kind, gather_x, gather_grad in (
        ("of rows", "weights", False, False),
        ("of tokens", "gathered_weights", True, False),
        ("of products", "gathered_weights", False, True),
        ("two", "two_weights", True, False),
    ):
        two = kind == "two_weights"
        absent = {} if gather_x else {"x_gather": None}
        absent |= {} if gather_grad else {"grad_gather": None}
        absent |= {} if two else {"grad2": None, "out2": None}
        signature = dict.fromkeys(("x", "grad", "grad2", "out", "out2"), matrix) | {"offsets": "*i32:16", "x_gather": _INDEX, "grad_gather": _INDEX}
        signature |= dict.fromkeys(("x_limit", "grad_limit", "inner", "columns"), "i32:16")
        constants = {"GATHER_X": gather_x, "GATHER_GRAD": gather_grad, "TWO": two} | _tile(kinds[kind], precision)
        del constants["GROVES"]
        yield _case(f"weights {name} {label}", weight_gradients, signature, constants | absent, kinds[kind], cores)


def _gated(label: str, matrix: str, kinds: dict[str, Tiles], precision: str, cores: bool) -> Iterator[AotCase]:
    sizes = dict.fromkeys(("tokens", "choices", "groves", "width", "own_width", "hidden", "per_function", "kept"), "i32:16")
    sizes |= {"low": "fp32", "inverse_step": "fp32"}
    index = {"offsets": "*i32:16", "token_of_row": _INDEX, "choice_of_row": _INDEX}
    for name, kind, reuse, table in (
        ("spline", "gated", False, True),
        ("silu", "gated", False, False),
        ("spline reuse", "gated", True, True),
        ("silu reuse", "gated", True, False),
        ("spline, few rows", "few_gated", False, True),
        ("silu, few rows", "few_gated", False, False),
        ("spline reuse, few rows", "few_gated", True, True),
        ("silu reuse, few rows", "few_gated", True, False),
    ):
        absent = {} if table else {"table": None}
        absent |= {} if reuse else {"own": None}
        signature = dict.fromkeys(("x", "own", "up", "value", "product", "h_out", "v_out"), matrix) | {"table": "*fp32:16"} | index | sizes
        constants = {"REUSE": reuse, "TABLE": table, "DESCRIPTORS": kinds[kind].descriptors} | _table_sizes(table)
        yield _case(f"gated {name} {label}", gated_forward, signature, constants | _tile(kinds[kind], precision) | absent, kinds[kind], cores)
    for name, table in (("spline", True), ("silu", False)):
        absent = {} if table else {"table": None, "table_parts": None}
        signature = dict.fromkeys(("grad_y", "out", "h_in", "v_in", "grad_h", "grad_v", "product"), matrix) | index | sizes
        signature |= dict.fromkeys(("gate", "table", "gate_parts", "table_parts"), "*fp32:16")
        del signature["own_width"], signature["kept"]
        tiles = kinds["back"]
        constants = {"TABLE": table, "TOGETHER": columns_together(_GROUP, tiles), "DESCRIPTORS": tiles.descriptors}
        constants |= _table_sizes(table) | {"PART": part_columns(tiles)}
        case = _case(f"gated backward {name} {label}", gated_backward, signature, constants | _tile(tiles, precision) | absent, tiles, cores)
        yield case._replace(spill_bytes=_SPILLS_OF_3_6 if tiles.descriptors else 0)


def _sums(target: str, label: str, matrix: str) -> Iterator[AotCase]:
    block = sum_blocks(target, _WIDTH)
    for gate in (True, False):
        signature = {"y": matrix, "rows": matrix, "gate": "*fp32:16", "row_of_choice": _INDEX, "tokens": "i32:16", "limit": "i32:16", "width": "i32:16"}
        constants = {"GATE": gate, "CHOICES": _CHOICES, "TOKENS": block.rows, "COLUMNS": block.columns} | ({} if gate else {"gate": None})
        yield _case(f"combine {'gated' if gate else 'plain'} {label}", combine, signature, constants, block, False)
    signature = dict.fromkeys(("grad_y", "rows", "grad_rows"), matrix) | dict.fromkeys(("gate", "gate_parts"), "*fp32:16") | {"choice_of_row": _INDEX}
    signature |= dict.fromkeys(("count", "choices", "width"), "i32:16")
    yield _case(
        f"combine gradients {label}", combine_gradients, signature, {"CHOICES": _CHOICES, "ROWS": block.rows, "COLUMNS": block.columns}, block, False
    )
    gate_sum = {"grad_gate": matrix, "gate_parts": "*fp32:16", "row_of_choice": _INDEX, "choices": "i32:16", "limit": "i32:16", "parts": "i32"}
    yield AotCase(f"sum of the gate {label}", sum_gate, gate_sum, {"BLOCK": 256}, 4, 2, tensor_cores=False)


def _table_sum(tiles: Tiles) -> AotCase:
    signature = {"grad_table": "*fp32:16", "table_parts": "*fp32:16", "offsets": "*i32:16", "groves": "i32:16", "functions": "i32:16"}
    constants = {"together": 1, "SLOTS": _CELLS * _POWERS, "ROWS": tiles.rows, "GROVES": _GROVES, "BLOCK": 16, "WIDE": 32}
    return AotCase("sum of the table", sum_table, signature, constants, 1, 2, tensor_cores=False)


def _table_sizes(table: bool) -> dict[str, int]:
    return {"CELLS": _CELLS, "POWERS": _POWERS} if table else {"CELLS": 1, "POWERS": 1}


def _tile(tiles: Tiles, precision: str) -> dict[str, Any]:
    return {"PRECISION": precision, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "INNER": tiles.inner, "GROVES": _GROVES}


def _case(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], tiles: Tiles, cores: bool) -> AotCase:
    left = {argument: kind for argument, kind in signature.items() if argument not in constants}
    return AotCase(name, kernel, left, constants, tiles.warps, tiles.stages, tensor_cores=cores)
