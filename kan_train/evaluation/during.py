"""Evaluation of a model in training: the questions spread over the ranks that hold it, on every layout whose ranks hold all layers.

Ranks that share a sequence or differ in sequences hold the same dense parameters and answer different questions; tensor ranks answer the same ones
together, and so do, in effect, the ranks that hold different groves: none may leave the exchange of tokens before the others have read everything.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from kan_train.config import Config, ConfigError, EvaluateConfig, TrainConfig
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.engine.engine import Engine
from kan_train.engine.examination import TaskScore
from kan_train.evaluation.choice import baselines, portions, score
from kan_train.evaluation.score import read
from kan_train.evaluation.tasks import main_metric, questions_of
from kan_train.inference.engine import evaluating
from kan_train.parallel.layers import GroveRegion, TensorRegion
from kan_train.parallel.place import Axis
from kan_train.parallel.runtime import Runtime


def task_evaluator(config: Config, tokenizer: Path) -> "TaskEvaluator":
    """What measures train.evaluate_tasks, all questions read. ConfigError where some are missing."""
    return TaskEvaluator(config.train, Tokenizer(tokenizer))


def settings_of(train: TrainConfig) -> EvaluateConfig:
    """`kan evaluate`'s settings that ask the same questions."""
    return EvaluateConfig(
        run="", tasks=list(train.evaluate_tasks), limit=train.evaluate_limit, shots=train.evaluate_shots, lengths=list(train.evaluate_lengths),
        recall_questions=train.evaluate_recall_questions, batch_size=train.evaluate_batch_size, questions=train.evaluate_questions,
    )  # fmt: skip


class TaskEvaluator:
    """The questions of every task, and how a model in training answers them: kan_train.engine.examination.Evaluator."""

    def __init__(self, train: TrainConfig, tokenizer: Tokenizer) -> None:
        self.settings, self.tokenizer = settings_of(train), tokenizer
        try:
            self.questions = {task: questions_of(self.settings, task, tokenizer) for task in self.settings.tasks}
        except ConfigError as error:
            # The same settings have other names here.
            raise ConfigError(re.sub(r"\b(tasks|limit|shots|lengths|questions)=", r"train.evaluate_\1=", str(error))) from None
        # The order in which they are read, each portion by one rank.
        self.work = [(task, portion) for task, questions in self.questions.items() for portion in portions(questions)]

    def run(self, engine: Engine, stopped: Callable[[], bool], alive: Callable[[], None]) -> Mapping[str, TaskScore] | None:
        """See kan_train.engine.examination.Evaluator."""
        readers, tasks = engine.place.replicas, list(self.questions)
        right = torch.zeros(len(tasks), dtype=torch.float64, device=engine.runtime.device)
        with whole_tokens(engine.model):
            for start in range(0, len(self.work), readers.size):
                if start and stopped():
                    return None
                own = self.work[start + readers.rank : start + readers.rank + 1] if start + readers.rank < len(self.work) else []
                with in_step(engine, alive):
                    for task, portion in own:
                        right[tasks.index(task)] += self._right(engine, task, portion, alive)
        counts = readers.sum(right).tolist()
        return {task: self._score(task, int(count)) for task, count in zip(tasks, counts, strict=True)}

    def _right(self, engine: Engine, task: str, portion: list[int], alive: Callable[[], None]) -> int:
        questions = [self.questions[task][number] for number in portion]
        # A model that has diverged has no answer right here: training goes on as it would, and on one rank alone an error would stop the others.
        scored = score(engine.model, self.tokenizer, questions, batch_size=self.settings.batch_size, advance=lambda _: alive(), finite=False)
        return sum(one.right(main_metric(task)) for one in scored)

    def _score(self, task: str, right: int) -> TaskScore:
        questions = self.questions[task]
        return TaskScore(metric=main_metric(task), right=right, questions=len(questions), **baselines(questions))


@contextmanager
def whole_tokens(model: nn.Module) -> Iterator[None]:
    """Inside, every tensor rank holds all tokens between the layers and sends them to the groves itself, so that any number can be read.

    The layers were built for sequences whose length the ranks divide. Without gradients only: their sums are those of split tokens.
    """
    regions = [module for module in model.modules() if isinstance(module, TensorRegion | GroveRegion)]
    before = [(region.axis, region.sequence_parallel) for region in regions]
    for region in regions:
        region.sequence_parallel = False
        if isinstance(region, GroveRegion) and region.inside.size == 1:
            region.axis = Axis()
    try:
        yield
    finally:
        for region, (axis, sequence_parallel) in zip(regions, before, strict=True):
            region.axis, region.sequence_parallel = axis, sequence_parallel


@contextmanager
def in_step(engine: Engine, alive: Callable[[], None]) -> Iterator[None]:
    """Inside, ranks that hold different groves read as often as one another, whatever each has to read. Collective where there are any.

    Every reading begins with the embedding; a rank that has read everything goes on with a single token until all have, and calls `alive` each time.
    """
    if engine.place.expert.size == 1:
        yield
        return
    runtime, model = engine.runtime, engine.model
    hook = model.embedding.register_forward_pre_hook(lambda *_: _announce(runtime))
    try:
        yield
    finally:
        hook.remove()
    with evaluating(model):
        while runtime.largest(0):
            alive()
            read(model, torch.zeros(1, 1, dtype=torch.int64), model.init_state(1))


def _announce(runtime: Runtime) -> None:
    """Tell the others that this rank reads once more."""
    runtime.largest(1)
