"""Tokens for training: memory-mapped shards, a global order that no layout changes, micro-batches."""

from kan_train.data.index import CorpusIndex
from kan_train.data.loader import Batch, Loader, TrainingData, open_training_data

__all__ = ["Batch", "CorpusIndex", "Loader", "TrainingData", "open_training_data"]
