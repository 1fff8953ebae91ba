"""Sharded checkpoints: boxes of global tensors in safetensors files under one manifest; any layout loads what any other saved."""

from kan_train.checkpoint.boxes import Fragment
from kan_train.checkpoint.checksum import weights_checksum
from kan_train.checkpoint.errors import CheckpointError
from kan_train.checkpoint.load import load, load_rank_tensors, load_tensors
from kan_train.checkpoint.manifest import Manifest, read_manifest
from kan_train.checkpoint.ranks import Ranks
from kan_train.checkpoint.retention import Policy, delete_checkpoint, expendable, folders, newest, prune, step_of
from kan_train.checkpoint.runs import CHECKPOINTS, checkpoint_directory, directory_of_run, find_checkpoint
from kan_train.checkpoint.save import save
from kan_train.checkpoint.valid import newest_valid

__all__ = [
    "CHECKPOINTS", "CheckpointError", "Fragment", "Manifest", "Policy", "Ranks", "checkpoint_directory", "delete_checkpoint", "directory_of_run",
    "expendable", "find_checkpoint", "folders", "load", "load_rank_tensors", "load_tensors", "newest", "newest_valid", "prune", "read_manifest",
    "save", "step_of", "weights_checksum",
]  # fmt: skip
