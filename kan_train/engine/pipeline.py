"""Pipeline parallelism: the layers cut in stages, Megatron's schedules between them, a DeepSpeed ZeRO-1 or ZeRO-2 engine around what this process holds."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kan_train.accounting.flops import layer_flops
from kan_train.config import Config
from kan_train.engine.sharded import ShardedEngine, compute_dtype, start_libraries
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel, Part
from kan_train.parallel.layout import Layout, given_stages, split_stages
from kan_train.parallel.place import Place, at
from kan_train.parallel.runtime import Runtime

if TYPE_CHECKING:
    from kan_train.data import Batch


def stage_parts(config: Config, layout: Layout) -> list[Part]:
    """What each of the pp * vpp stages holds: as parallel.stage_layers says, else so that the most expensive stage costs least (FLOPs, head included)."""
    stages = layout.pipeline_parallel * layout.virtual_pipeline
    if config.parallel.stage_layers is not None:
        layers = given_stages(config.parallel.stage_layers, config.model.num_layers, stages)
    else:
        layers = split_stages(layer_flops(config.model), stages)
    return [Part(own, is_first=index == 0, is_last=index == stages - 1) for index, own in enumerate(layers)]


def build_pipeline(config: Config, runtime: Runtime, layout: Layout, seed: int) -> "PipelineEngine":
    """This process's stages of the model in a DeepSpeed engine."""
    place = start_libraries(config, runtime, layout)
    from kan_train.parallel.pipeline import chunk_stages

    parts = stage_parts(config, layout)
    with at(place):
        models = [LanguageModel(config.model, parts[stage]) for stage in chunk_stages(layout)]
    for model in models:
        materialise(model, seed=seed, device=runtime.device)
    return PipelineEngine(config, models, runtime, layout, place)


class PipelineEngine(ShardedEngine):
    """Training over pipeline stages: a step is one schedule over all micro-batches, then one reduction of gradients."""

    def __init__(self, config: Config, models: Sequence[LanguageModel], runtime: Runtime, layout: Layout, place: Place) -> None:
        from kan_train.parallel.pipeline import Stage, schedule_config

        dtype = compute_dtype(config)
        schedule = schedule_config(layout, config.model.width, dtype)
        chunked = layout.virtual_pipeline > 1
        self.stages = [
            Stage(model, self._stage_run(model), schedule, chunk if chunked else None, is_last=model.part.is_last) for chunk, model in enumerate(models)
        ]
        super().__init__(config, nn.ModuleList(self.stages), models, runtime, layout, place, accumulation=1)
        # The schedule adds the gradients of micro-batches in the dtype of the weights, which loses most of a small one in bf16.
        self.sums = GradientSums(self.names) if dtype != torch.float32 else None
        self._micro_batches = 1
        self._losses = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        self._seen: list[Tensor] = []

    def _forward_backward(self, batches: "list[Batch]") -> Tensor:
        self._losses.zero_()
        self._micro_batches = len(batches)
        with self.engine.coalesce_grad_reduction():
            self._run(batches)
            losses = self.place.pipeline.sum(self._mean_losses(self._losses, len(batches)))
            if self.sums is not None:
                self.sums.give_back()
            if not losses.isfinite().all():
                for parameter in self.names:
                    if parameter.grad is not None:
                        parameter.grad.fill_(torch.nan)
        return losses

    def _cross_entropies(self, batches: "list[Batch]") -> Iterable[Tensor]:
        # The interleaved schedule takes a multiple of the stages' ranks: the rest is filled with a micro-batch whose result is not used.
        ranks = self.layout.pipeline_parallel
        filled = batches + batches[-1:] * (-len(batches) % ranks if self.layout.virtual_pipeline > 1 else 0)
        self._run(filled, forward_only=True)
        seen = torch.stack(self._seen) if self._seen else torch.zeros(len(filled), device=self.runtime.device)
        return self.place.pipeline.sum(seen)[: len(batches)].unbind()

    def _run(self, batches: "list[Batch]", *, forward_only: bool = False) -> None:
        from kan_train.parallel.pipeline import run_schedule

        self._seen = []
        sequences, tokens = batches[0].tokens.shape
        run_schedule(
            self.stages, batches, tokens=tokens * self.place.context.size, sequences=sequences, forward_only=forward_only
        )

    def _stage_run(self, model: LanguageModel) -> "Callable[[Batch, Tensor | None], Tensor]":
        """The computation of one stage, which also notes this rank's losses."""
        from kan_train.parallel.pipeline import attach_loss

        def run(batch: "Batch", stream: Tensor | None) -> Tensor:
            out = model.stream(batch.tokens if stream is None else stream, batch.resets)
            auxiliary = model.auxiliary_loss()
            if auxiliary is not None:
                self._losses[1] += auxiliary.detach()
            if not model.part.is_last:
                return out if auxiliary is None else attach_loss(out, auxiliary, self._micro_batches)
            cross_entropy = model.cross_entropy(out, batch.targets)
            self._losses[0] += cross_entropy.detach()
            self._seen.append(cross_entropy.detach())
            return cross_entropy if auxiliary is None else cross_entropy + auxiliary

        return run


class GradientSums:
    """fp32 sums of gradients that arrive in a narrower dtype, one backward pass after the other. 4 bytes a parameter."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.sums: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if parameter in self.sums:
            self.sums[parameter] += parameter.grad
        else:
            self.sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def give_back(self) -> None:
        """Put the sums, rounded once, where the optimizer looks for gradients, and forget them."""
        for parameter, total in self.sums.items():
            parameter.grad = total.to(parameter.dtype)
        self.sums.clear()
