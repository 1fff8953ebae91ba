"""Tokens a second that the loader gives one core: global shuffle, packing, int64 inputs and targets and document resets, as the training loop gets them.

One thread, nothing read ahead, the corpus in the page cache after a first pass; timed by processor time of the process, so that other work on the machine
does not count against it. `copy` beside it is the ceiling on this machine: the same sequences in the order of the file, copied out of the map to int64.

    python benchmarks/loader.py                      # on corpora/stdlib, which `kan data prepare` makes
    python benchmarks/loader.py --corpora PATH --corpus NAME
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import write_result

from kan_train.config import DataConfig
from kan_train.data import TrainingData, open_training_data

SHAPES = ((512, 8), (512, 64), (1024, 32), (2048, 32), (4096, 64))  # (sequence length, global batch size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=Path("corpora"), help="folder of prepared corpora")
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="processor time of a round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [_row(arguments, length, batch) for length, batch in SHAPES]
    config = {"corpus": arguments.corpus, "rounds": arguments.rounds, "seconds": arguments.seconds, "prefetch": 0, "threads": 1}
    write_result("loader", claim="the loader gives at least 50 million tokens a second a core, global shuffle and packing included", config=config, rows=rows)


def _row(arguments: argparse.Namespace, length: int, batch: int) -> dict:
    config = DataConfig(root=str(arguments.corpora), blend={arguments.corpus: 1.0}, prefetch=0, verify=False)
    data = open_training_data(config, sequence_length=length, seed=1, vocab_size=2**31)
    loader = data.loader(batch, min(batch, 8), 0, 1)
    copy = _copier(data, length, batch)
    for _ in range(max(1, data.corpora[0].stream("train").tokens // (length * batch))):
        loader.next_step()
    rates: dict[str, list[float]] = {"loader": [], "copy": []}
    for _ in range(arguments.rounds):  # one after the other, so that the machine's moods meet both
        rates["loader"].append(_rate(loader.next_step, length * batch, arguments.seconds))
        rates["copy"].append(_rate(copy, length * batch, arguments.seconds))
    median = {name: statistics.median(values) / 1e6 for name, values in rates.items()}
    print(f"T = {length}, global batch {batch}: {median['loader']:.1f} million tokens/s, copying alone {median['copy']:.1f}")
    return {
        "name": f"sequence_length {length}, global_batch_size {batch}",
        "million_tokens_per_second": median["loader"],
        "spread": [min(rates["loader"]) / 1e6, max(rates["loader"]) / 1e6],
        "copy_million_tokens_per_second": median["copy"],
        "share_of_copy": median["loader"] / median["copy"],
    }


def _copier(data: TrainingData, length: int, batch: int) -> Callable[[], None]:
    stream = data.corpora[0].stream("train")
    rows, position = np.empty((batch, length + 1), dtype=np.int64), 0

    def copy() -> None:
        nonlocal position
        for row in rows:
            if position + length + 1 > stream.tokens:
                position = 0
            stream.read(position, row)
            position += length

    return copy


def _rate(work: Callable[[], object], tokens: int, seconds: float) -> float:
    started, done = time.process_time(), 0
    while (spent := time.process_time() - started) < seconds:
        work()
        done += tokens
    return done / spent


if __name__ == "__main__":
    main()
