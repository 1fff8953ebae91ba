"""Training: the engines that turn batches into optimizer steps, and the loop around them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kan_train.config import Config
    from kan_train.engine.engine import Engine
    from kan_train.model.lm import LanguageModel
    from kan_train.parallel.runtime import Runtime

__all__ = ["build_engine"]


def build_engine(config: "Config", model: "LanguageModel", runtime: "Runtime") -> "Engine":
    """The engine that `config` asks for: plain PyTorch in one fp32 process, DeepSpeed for every ZeRO stage.

    `model` has its fp32 weights on runtime.device, the same on every rank. DeepSpeed and Megatron take seconds to import: only runs
    that use them pay.
    """
    from kan_train.parallel.runtime import zero_stage

    if zero_stage(config, runtime.world_size) is None:
        from kan_train.engine.plain import PlainEngine

        return PlainEngine(config, model, runtime)
    from kan_train.engine.zero import ZeroEngine

    return ZeroEngine(config, model, runtime)
