"""Typed configuration: every value has one documented home here. `kan_train.config.compose` fills it through Hydra."""

from kan_train.config.accounting import AccountingConfig
from kan_train.config.cluster import ClusterConfig, ContainerConfig, NetworkConfig
from kan_train.config.data import CorpusConfig, DataConfig, PrepareConfig, TokenizerConfig
from kan_train.config.errors import ConfigError
from kan_train.config.evaluate import EvaluateConfig
from kan_train.config.generate import GenerateConfig
from kan_train.config.model import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig, ModelConfig
from kan_train.config.observing import ProfileConfig, StragglerConfig
from kan_train.config.run import (
    CheckpointConfig,
    Config,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RecoveryConfig,
    RunConfig,
    ScheduleConfig,
)
from kan_train.config.serve import ServeConfig
from kan_train.config.train import TrainConfig

__all__ = [
    "AccountingConfig", "AdaConfig", "AttentionConfig", "CheckpointConfig", "ClusterConfig", "Config", "ConfigError", "ContainerConfig",
    "CorpusConfig", "DataConfig", "EdgeConfig", "EvaluateConfig", "GenerateConfig", "GroveConfig", "LoggingConfig", "ModelConfig", "NetworkConfig",
    "OptimizerConfig", "ParallelConfig", "PrepareConfig", "ProfileConfig", "RecoveryConfig", "RunConfig", "ScheduleConfig", "ServeConfig",
    "StragglerConfig", "TokenizerConfig", "TrainConfig",
]  # fmt: skip
