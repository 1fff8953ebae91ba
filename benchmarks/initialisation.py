"""Initialisation without the whole tensors: numbers a second on one core, for shards of several shapes, and the shard of one rank of a large model.

    python benchmarks/initialisation.py                                    # kan_340b, rank 0 of 1,024: tensor 8, pipeline 8, expert 16
    python benchmarks/initialisation.py --rank 1023 --layers 9             # all nine layers of the last stage for real

Times are processor seconds of one thread: on a machine that others use, the wall clock would count their work too. Of the large model `--layers` blocks of
the rank's stage are filled for real, each module freed before the next one as ZeRO-3 partitions it; the time of the whole stage is extrapolated from them
by the number of elements, and labelled so.
"""

import argparse
import math
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import psutil
import torch
from common import write_result
from torch import Tensor, nn

from kan_train.checkpoint import Fragment
from kan_train.checkpoint.checksum import weights_checksum
from kan_train.config import ModelConfig
from kan_train.config.compose import compose_train
from kan_train.config.layout import Layout
from kan_train.model.init import initial_values, materialise
from kan_train.model.lm import LanguageModel, Part, count_parameters
from kan_train.parallel.params import Box, Normal
from kan_train.parallel.place import at, place_of

SHARDS = {
    "contiguous (rows)": ((16384, 4096), Box((2048, 0), (1024, 4096))),
    "strided (columns, an eighth of the width)": ((8192, 4096), Box((0, 512), (8192, 512))),
    "strided, odd length and start": ((8191, 4095), Box((0, 511), (8191, 511))),
    "strided, 5 columns": ((500_000, 4095), Box((0, 511), (500_000, 5))),
    "strided, one column": ((1_000_000, 4095), Box((0, 511), (1_000_000, 1))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kan_340b")
    parser.add_argument("--world-size", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--tensor", type=int, default=8)
    parser.add_argument("--pipeline", type=int, default=8)
    parser.add_argument("--expert", type=int, default=16)
    parser.add_argument("--layers", type=int, default=1, help="blocks of the rank's stage to fill for real")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    # In a process of its own, whose peak of resident memory is then the initialisation's.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        rank = fresh.submit(_rank_row, arguments).result()
    torch.set_num_threads(1)
    rows = _shard_rows(arguments.repeats)
    for row in rows:
        row["cost_a_number_against_contiguous"] = rows[0]["numbers_a_second"] / row["numbers_a_second"]
        print(f"{row['name']:45s} {row['numbers_a_second'] / 1e6:6.1f} M numbers/s, {row['cost_a_number_against_contiguous']:.2f} times a contiguous one")
    rows += [_checksum_row(arguments.repeats), rank]
    filled, elements, peak, largest = (rank[key] / 1e6 for key in ("filled_elements", "rank_elements", "peak_bytes", "largest_module_bytes"))
    print(
        f"{rank['name']}: filled {filled:.0f} M of the rank's {elements:.0f} M elements in {rank['core_seconds']:.1f} core-seconds; peak {peak:.0f} MB, "
        f"largest module {largest:.0f} MB; the whole rank, extrapolated: {rank['extrapolated_core_seconds_of_the_rank']:.0f} core-seconds"
    )
    claim = "a rank fills its own shard: a strided box costs at most about 4 times a contiguous one a number, and the peak is one module, not the model"
    config = {name: value for name, value in vars(arguments).items() if name != "repeats"} | {"threads": 1, "dtype": "float32"}
    write_result("initialisation", claim=claim, config=config, rows=rows)


def _shard_rows(repeats: int) -> list[dict]:
    """All shards in turn, over and over, so that the noise of the machine meets them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in SHARDS}
    for repeat in range(repeats + 1):
        for name, (shape, box) in SHARDS.items():
            taken = _core_seconds(partial(initial_values, Normal(0.02), 0, "layers.0.weight", shape, box=box))
            if repeat:  # the first is warm-up
                seconds[name].append(taken)
    return [
        {
            "name": name,
            "global_shape": shape,
            "offset": box.offset,
            "size": box.size,
            "core_seconds": sorted(seconds[name]),
            "numbers_a_second": box.numel / statistics.median(seconds[name]),
        }
        for name, (shape, box) in SHARDS.items()
    ]


def _checksum_row(repeats: int) -> dict:
    weights = torch.randn(1 << 23)
    fragments = [Fragment.whole("param/w", weights)]
    work = partial(weights_checksum, fragments, {"w": tuple(weights.shape)}, _alone)
    seconds = [_core_seconds(work) for _ in range(repeats + 1)][1:]
    rate = weights.numel() / statistics.median(seconds)
    print(f"{'checksum':45s} {rate / 1e6:6.1f} M numbers/s")
    return {"name": "checksum of contiguous weights", "core_seconds": sorted(seconds), "numbers_a_second": rate}


def _alone(totals: Tensor) -> Tensor:
    return totals


def _core_seconds(work: Callable[[], object]) -> float:
    """Seconds of one core: the processor time of this one-threaded process, which waiting for a core that others use does not lengthen."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _rank_row(arguments: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    model = compose_train([f"model={arguments.model}"], []).model
    layout = Layout(
        world_size=arguments.world_size,
        tensor_parallel=arguments.tensor,
        sequence_parallel=arguments.tensor > 1,
        pipeline_parallel=arguments.pipeline,
        expert_parallel=arguments.expert,
        zero_stage=1,
    )
    with at(place_of(layout, arguments.rank)):
        stage = _part(model, layout.coordinates(arguments.rank).pipeline, layout.pipeline_parallel)
        elements = sum(parameter.numel() for parameter in LanguageModel(model, stage).parameters())
        some = LanguageModel(model, Part(stage.layers[: arguments.layers], is_first=stage.is_first, is_last=stage.is_last))
    sizes = [sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in some.modules()]
    before = psutil.Process().memory_info().rss
    seconds = _core_seconds(partial(materialise, some, seed=0, after_module=_free))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "name": f"{arguments.model}, rank {arguments.rank} of {arguments.world_size}, {layout}",
        "model_elements": count_parameters(model)[0],
        "rank_elements": elements,
        "rank_layers": [stage.layers.start, stage.layers.stop],
        "filled_elements": sum(sizes),
        "filled_layers": min(arguments.layers, len(stage.layers)),
        "core_seconds": seconds,
        "numbers_a_second": sum(sizes) / seconds,
        "largest_module_bytes": 4 * max(sizes),
        "rank_bytes": 4 * elements,
        "peak_bytes": peak,
        "peak_means": "most resident memory above that before the initialisation, modules freed one by one",
        "extrapolated_core_seconds_of_the_rank": seconds * elements / sum(sizes),
        "extrapolated_means": "core_seconds times rank_elements / filled_elements: not measured",
    }


def _part(model: ModelConfig, stage: int, stages: int) -> Part:
    """An even split of the blocks; the embedding is with the first stage, the head with the last."""
    ends = [math.ceil(model.num_layers * number / stages) for number in range(stages + 1)]
    return Part(range(ends[stage], ends[stage + 1]), is_first=stage == 0, is_last=stage == stages - 1)


def _free(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.empty(0)


if __name__ == "__main__":
    main()
