"""Which tiles a kernel runs with, and what it knows when it is compiled: tables by target and shape, so that results do not depend on a search at start-up.

The tables come from compile reports (registers, spills, shared memory); no configuration has been timed on a GPU yet (docs/kernels/edge_spline.md).
The ahead-of-time test compiles every entry that can be chosen.
"""

from dataclasses import dataclass

from kan_train.kernels.edge_spline.functions import Functions

FEW_ROWS = 64  # rows a grove, on average, up to which a tile of 128 rows would be half empty
BASE_INPUTS = 16  # inputs of a step of the product with base: the fewest that tensor cores take; 32 made the widest tile spill
_MOST_PARTS = 16


@dataclass(frozen=True)
class Tiles:
    """Shape of a tile and how it is run."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_R": self.rows, "BLOCK_O": self.outputs, "BLOCK_I": self.inputs}


def forward_tiles(target: str, itemsize: int, outputs: int, octets: int, few_rows: bool) -> Tiles:
    """Wide tiles: the basis of an input is evaluated once for all outputs of a tile, so that few outputs a tile would leave tensor cores waiting for it."""
    if target == "interpreter":
        return Tiles(rows=32, outputs=32, inputs=4, warps=4, stages=1)
    if itemsize == 4:
        return Tiles(rows=64, outputs=64, inputs=4, warps=4, stages=2)
    stages = 2 if _family(target) == "gfx942" else 3
    if few_rows or outputs <= 128:
        return Tiles(rows=64, outputs=128, inputs=8, warps=4, stages=stages)
    # Where an input takes several eights, the widest tile spills.
    return Tiles(rows=128, outputs=256 if _family(target) == "sm_90" and octets == 1 else 128, inputs=8, warps=8, stages=stages)


def grad_input_tiles(target: str, itemsize: int, octets: int, few_rows: bool) -> Tiles:
    """16 inputs: the fewest columns that a product with base may have. Sums over several eights need the registers of eight warps for 64 rows."""
    if target == "interpreter":
        return Tiles(rows=32, outputs=32, inputs=16, warps=4, stages=1)
    if itemsize == 4:
        return Tiles(rows=64, outputs=32, inputs=16, warps=8, stages=2)
    if _family(target) == "gfx942":
        return Tiles(rows=64, outputs=64, inputs=16, warps=4, stages=2)
    if octets > 1:
        return Tiles(rows=64, outputs=32 if _family(target) == "sm_80" else 64, inputs=16, warps=8, stages=3)
    return Tiles(rows=64, outputs=64, inputs=16, warps=4, stages=3) if few_rows else Tiles(rows=128, outputs=64, inputs=16, warps=8, stages=3)


def grad_weights_tiles(target: str, itemsize: int) -> Tiles:
    """`rows` is the length of a step of the sum, `inputs` and `outputs` the tile of the result."""
    if target == "interpreter":
        return Tiles(rows=32, outputs=32, inputs=16, warps=4, stages=1)
    if itemsize == 4:
        return Tiles(rows=32, outputs=64, inputs=16, warps=8, stages=2)
    return Tiles(rows=64, outputs=128, inputs=16, warps=8, stages=2 if _family(target) == "gfx942" else 3)


def decode_tiles(target: str) -> Tiles:
    """No tile is shared between rows; 64 outputs are the 128 bytes that a line of memory holds in 16 bits."""
    if target == "interpreter":
        return Tiles(rows=1, outputs=32, inputs=8, warps=4, stages=1)
    return Tiles(rows=1, outputs=64, inputs=16, warps=4, stages=1)


def layer_constants(functions: Functions) -> dict[str, int | bool]:
    """What a kernel knows of the functions. LAST: see cells.py."""
    return {
        "SPLINE": functions.kind == "bspline",
        "ORDER": functions.order,
        "GRID": functions.grid,
        "COUNT": functions.count,
        "OCTETS": functions.octets,
        "LAST": (functions.grid - 1) * functions.stride if functions.octets == 1 else -1,
    }


def activation_constants(target: str, functions: int, cells: int, powers: int, columns: int) -> dict[str, int]:
    """64 columns: lanes that are neighbours then look up few functions, whose polynomials share lines of cache."""
    rows, block = (16, 32) if target == "interpreter" else (32, 64)
    return {"CELLS": cells, "POWERS": powers, "FUNCTIONS": functions, "WIDTH": columns // functions, "BLOCK_R": rows, "BLOCK_M": block}


def activation_sum_constants(functions: int, cells: int, powers: int, columns: int) -> dict[str, int]:
    """64 columns: whole functions where they are narrower, else one function's, 64 at a time. One warp, so that its sums need no barrier."""
    width = min(power_of_two(columns // functions), 64)
    block = min(64 // width, power_of_two(functions))
    return {
        "CELLS": cells, "POWERS": powers, "FUNCTIONS": functions, "WIDTH": columns // functions,
        "BLOCK_R": 8, "BLOCK_F": block, "BLOCK_W": width, "SUMS": power_of_two(cells * powers),
    }  # fmt: skip


def parts(programs: int, processors: int, units: int) -> int:
    """Into how many parts to cut a reduction of which `programs` tiles run at once: enough for four waves, no more parts than `units` of work, nor than 16.

    Depends on shapes and the device alone, so that sums are the same every time.
    """
    return max(1, min(-(-4 * processors // max(programs, 1)), units, _MOST_PARTS))


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def grove_lanes(groves: int) -> int:
    """GROVES, the length of the vector of tiles until every grove."""
    return max(2, power_of_two(groves))


def _family(target: str) -> str:
    """The compiled target whose table a device uses: sm_80 serves older and smaller NVIDIA GPUs, sm_90 newer ones, gfx942 all of AMD's."""
    if target.startswith("gfx"):
        return "gfx942"
    return "sm_90" if int(target.removeprefix("sm_")) >= 90 and target != "sm_120" else "sm_80"
