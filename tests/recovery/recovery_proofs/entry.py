"""`kan train` in a process that a pool has forked, as a launcher starts it; what it reads is noted."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

# What the command imports when it is called is imported once instead.
import kan_train.accounting.plots
import kan_train.accounting.watch
import kan_train.commands.train
import kan_train.config.compose
import kan_train.inference.commands  # noqa: F401
from kan_train import cli
from kan_train.data import Batch, Loader

SAMPLES = "samples-{rank}.jsonl"
"""What a rank read: a line a step, appended by every start of the run."""


def command(folder: Path, overrides: list[str], samples: str) -> int:
    """`kan train` with `overrides`; its exit status. samples: folder of the SAMPLES of the run."""
    with noted(Path(samples) / SAMPLES.format(rank=os.environ["RANK"])):
        return cli.main(["train", *overrides])


@contextmanager
def noted(path: Path) -> Iterator[None]:
    """Append {"cursor", "digest"} to `path` for every global batch of which this rank is handed its part."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    next_step = Loader.next_step

    def noting(self: Loader) -> list[Batch]:
        cursor, batches = self.cursor, next_step(self)
        digest = hashlib.sha256()
        for batch in batches:
            for tensor in (batch.tokens, batch.targets, batch.resets):
                digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        # One short write each: a process that is killed leaves whole lines.
        os.write(file, json.dumps({"cursor": cursor, "digest": digest.hexdigest()}).encode() + b"\n")
        return batches

    with mock.patch.object(Loader, "next_step", noting):
        yield
