"""Models that train in turns in one process, so that the noise of the machine meets all of them alike."""

import statistics
import time
from typing import Any

import torch

from kan_train.accounting.flops import flops_per_token
from kan_train.config import Config
from kan_train.data import Batch, open_training_data
from kan_train.engine import build_engine
from kan_train.model.lm import count_parameters
from kan_train.parallel.runtime import single_process_runtime


class Contestant:
    """One model in training, and the seconds of its rounds."""

    def __init__(self, name: str, config: Config, *, batches: int = 4) -> None:
        self.name, self.config = name, config
        self.parameters = count_parameters(config.model)
        self.flops = flops_per_token(config.model).training
        self.engine = build_engine(config, single_process_runtime(config))
        data = open_training_data(config.data, sequence_length=config.model.sequence_length, seed=config.run.seed, vocab_size=config.model.vocab_size)
        loader = data.loader(config.train.global_batch_size, config.train.micro_batch_size, 0, 1)
        self.batches: list[list[Batch]] = [loader.next_step() for _ in range(batches)]
        loader.close()
        self.tokens_a_step = config.train.global_batch_size * config.model.sequence_length
        self.seconds: list[float] = []

    def run(self, steps: int) -> None:
        """Train `steps` steps and keep the seconds of one."""
        self._wait()
        start = time.perf_counter()
        for step in range(steps):
            self.engine.train_step(self.batches[step % len(self.batches)], learning_rate=1e-3)
        self._wait()
        self.seconds.append((time.perf_counter() - start) / steps)

    def tokens_per_second(self) -> float:
        """By the median round; the first one warms up."""
        return self.tokens_a_step / statistics.median(self.seconds[1:])

    def row(self) -> dict[str, Any]:
        """Figures for a result file. Needs three rounds at least."""
        return {
            "name": self.name,
            "tokens_per_second": self.tokens_per_second(),
            "step_seconds_quartiles": statistics.quantiles(self.seconds[1:], n=4),
            "training_flops_per_token": self.flops,
            "achieved_gflops": self.tokens_per_second() * self.flops / 1e9,
            "parameters_total": self.parameters[0],
            "parameters_active": self.parameters[1],
        }

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
