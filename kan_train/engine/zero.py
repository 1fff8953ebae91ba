"""The whole depth of the model in every process: one micro-batch after the other through a DeepSpeed engine, for every ZeRO stage."""

from typing import TYPE_CHECKING

from torch import Tensor

from kan_train.config import Config
from kan_train.engine.engine import MicroBatchEngine
from kan_train.engine.sharded import ShardedEngine, fill_and_partition, start_libraries
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.layout import Layout
from kan_train.parallel.place import Place, at
from kan_train.parallel.runtime import Runtime

if TYPE_CHECKING:
    from kan_train.data import Batch


def build_zero(config: Config, runtime: Runtime, layout: Layout, seed: int) -> "ZeroEngine":
    """This process's part of the model, without pipeline stages, in a DeepSpeed engine."""
    place = start_libraries(config, runtime, layout)
    with at(place):
        model = LanguageModel(config.model)
    if layout.zero_stage == 3:
        fill_and_partition(model, config, layout, seed=seed, device=runtime.device)
    else:
        materialise(model, seed=seed, device=runtime.device)
    return ZeroEngine(config, model, runtime, layout, place)


class ZeroEngine(MicroBatchEngine, ShardedEngine):
    """Training through a DeepSpeed engine without pipeline stages."""

    def __init__(self, config: Config, model: LanguageModel, runtime: Runtime, layout: Layout, place: Place) -> None:
        if layout.zero_stage == 3:
            import deepspeed

            # ZeRO-3 gathers a module's parameters around its calls, and finds the backward call by the tensors that the module returns.
            # The parts of a mixer or a feed-forward layer return other things too: each layer is gathered as a whole.
            deepspeed.utils.set_z3_leaf_modules(model, list({type(part) for layer in model.layers for part in (layer.mixer, layer.ffn)}))
        accumulation = config.train.global_batch_size // (config.train.micro_batch_size * layout.data_parallel)
        super().__init__(config, model, [model], runtime, layout, place, accumulation=accumulation)

    def _forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        return self.engine(batch.tokens, batch.targets, batch.resets)

    def _backward(self, loss: Tensor, micro_batches: int, *, last: bool) -> None:
        if micro_batches != self.engine.gradient_accumulation_steps():
            raise ValueError(
                f"{micro_batches} micro-batches in a step; this engine was built for {self.engine.gradient_accumulation_steps()}"
            )
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # counts the micro-batch; the optimizer steps at the last one
