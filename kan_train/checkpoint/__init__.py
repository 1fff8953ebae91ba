"""Sharded checkpoints: boxes of global tensors in safetensors files under one manifest; any layout loads what any other saved."""

from kan_train.checkpoint.boxes import Fragment
from kan_train.checkpoint.checksum import weights_checksum
from kan_train.checkpoint.errors import CheckpointError
from kan_train.checkpoint.load import load, load_rank_tensors, load_tensors
from kan_train.checkpoint.manifest import Manifest, read_manifest
from kan_train.checkpoint.retention import newest, prune
from kan_train.checkpoint.runs import CHECKPOINTS, find_checkpoint
from kan_train.checkpoint.save import save

__all__ = [
    "CHECKPOINTS", "CheckpointError", "Fragment", "Manifest", "find_checkpoint", "load", "load_rank_tensors", "load_tensors", "newest",
    "prune", "read_manifest", "save", "weights_checksum",
]  # fmt: skip
