"""Training: the engines that turn batches into optimizer steps, and the loop around them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kan_train.config import Config
    from kan_train.engine.engine import Engine
    from kan_train.parallel.runtime import Runtime

__all__ = ["build_engine"]


def build_engine(config: "Config", runtime: "Runtime", *, seed: int | None = None) -> "Engine":
    """The model that `config` describes, as far as this process holds it, with its initial weights, in the engine that `config` asks for.

    Plain PyTorch in one fp32 process, DeepSpeed for every ZeRO stage, Megatron's schedules for a pipeline. seed: of the weights; unset: run.seed.
    Collective. DeepSpeed and Megatron take seconds to import: only runs that use them pay.
    """
    from kan_train.parallel.layout import layout_of

    seed = config.run.seed if seed is None else seed
    layout = layout_of(config, runtime.world_size)
    if layout.zero_stage is None:
        from kan_train.engine.plain import build_plain

        return build_plain(config, runtime, seed)
    if layout.pipeline_parallel > 1:
        from kan_train.engine.pipeline import build_pipeline

        return build_pipeline(config, runtime, layout, seed)
    from kan_train.engine.zero import build_zero

    return build_zero(config, runtime, layout, seed)
