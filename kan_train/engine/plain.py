"""One process in plain PyTorch: no process group, no DeepSpeed. What every other engine must agree with."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from kan_train.checkpoint.boxes import Fragment
from kan_train.config import Config
from kan_train.engine.engine import MicroBatchEngine, replicated_fragments
from kan_train.engine.norm import clip_gradients, gradient_norm
from kan_train.engine.optimizer import build_optimizer, ensure_state, state_tensors
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.runtime import Runtime

if TYPE_CHECKING:
    from kan_train.data import Batch


def build_plain(config: Config, runtime: Runtime, seed: int) -> "PlainEngine":
    """The whole model in this process."""
    return PlainEngine(config, materialise(LanguageModel(config.model), seed=seed, device=runtime.device), runtime)


class PlainEngine(MicroBatchEngine):
    """fp32 training in one process."""

    def __init__(self, config: Config, model: LanguageModel, runtime: Runtime) -> None:
        super().__init__(config, [model], runtime)
        self.optimizer = build_optimizer(config.optimizer, [model])

    def named_fragments(self) -> Iterator[Fragment]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                yield Fragment.whole(f"param/{name}", parameter)
                for kind, tensor in state_tensors(ensure_state(self.optimizer, group, parameter)).items():
                    yield Fragment.whole(f"{kind}/{name}", tensor)
        yield from replicated_fragments(self.parts, self.place)

    def after_load(self) -> None:
        """Nothing to do: the masters are the weights."""

    def _forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        return self.model(batch.tokens, batch.targets, batch.resets)

    def _backward(self, loss: Tensor, micro_batches: int, *, last: bool) -> None:
        (loss / micro_batches).backward()

    def _update(self) -> tuple[float, bool]:
        parameters = list(self.model.parameters())
        norm = gradient_norm(parameters)
        finite = bool(norm.isfinite())
        if finite:
            clip_gradients(parameters, norm.item(), self.config.optimizer.clip_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item(), not finite
