"""Typed configuration: every value has one documented home here. `kan_train.config.compose` fills it through Hydra."""

from kan_train.config.data import CorpusConfig, DataConfig, PrepareConfig, TokenizerConfig
from kan_train.config.errors import ConfigError
from kan_train.config.generate import GenerateConfig
from kan_train.config.model import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig, ModelConfig
from kan_train.config.run import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RecoveryConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "AdaConfig", "AttentionConfig", "CheckpointConfig", "ClusterConfig", "Config", "ConfigError", "CorpusConfig", "DataConfig",
    "EdgeConfig", "GenerateConfig", "GroveConfig", "LoggingConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig",
    "PrepareConfig", "RecoveryConfig", "RunConfig", "ScheduleConfig", "TokenizerConfig", "TrainConfig",
]  # fmt: skip
