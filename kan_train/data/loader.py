"""Micro-batches in the global order. The state is a cursor, a seed and the index's hash: a run resumes exactly at any data-parallel size."""

import hashlib
import json
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kan_train.config import ConfigError, DataConfig
from kan_train.data.index import CorpusIndex, Stream
from kan_train.data.order import SampleOrder

_LOOK_AHEAD = 8192  # samples whose order is worked out at once


@dataclass
class Batch:
    """Packed sequences: B sequences of T tokens."""

    tokens: Tensor
    """int64 [B, T]."""
    targets: Tensor
    """int64 [B, T]: the next token; -1 is not counted."""
    resets: Tensor | None
    """bool [B, T]: True where a document begins, so that nothing before it may matter; None where documents run on."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        move = [None if part is None else part.to(device, non_blocking=True) for part in (self.tokens, self.targets, self.resets)]
        assert move[0] is not None and move[1] is not None  # noqa: PT018
        return Batch(move[0], move[1], move[2])

    def chunk(self, index: int, chunks: int) -> "Batch":
        """Chunk `index` of `chunks` equally long ones of every sequence."""
        if chunks == 1:
            return self
        length = self.tokens.shape[1] // chunks
        part = slice(index * length, (index + 1) * length)
        return Batch(self.tokens[:, part], self.targets[:, part], None if self.resets is None else self.resets[:, part])


class TrainingData:
    """The corpora of a run, opened and checked."""

    def __init__(self, config: DataConfig, *, sequence_length: int, seed: int, vocab_size: int) -> None:
        config.validate()
        self.config, self.sequence_length, self.seed = config, sequence_length, seed
        self.corpora = [CorpusIndex(Path(config.root) / name, verify=config.verify) for name in config.blend]
        self._check_vocabulary(vocab_size)
        self.tokenizer_path = self.corpora[0].tokenizer_path
        self.boundary = self.corpora[0].boundary
        facts = [sequence_length, config.shuffle, list(config.blend.values()), [corpus.hash for corpus in self.corpora]]
        self.index_hash = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self.bytes_per_token_heldout = float("nan")
        """UTF-8 bytes of text a target token of the last `heldout`."""

    def loader(self, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> "Loader":
        """This rank's reader of the training split."""
        return Loader(self, self._streams("train"), global_batch_size, micro_batch_size, rank, world_size)

    def heldout(self, sequences: int, micro_batch_size: int, rank: int, world_size: int) -> list[Batch]:
        """This rank's share of `sequences` held-out sequences (all where the corpora hold fewer), the same ones every time, drawn from all over the split.

        Every rank gets the same number of batches; rows that fill up the last ones have targets -1. Sets `bytes_per_token_heldout`.
        """
        streams = self._streams("heldout")
        available = sum(_sequences(stream, self.sequence_length) for stream in streams)
        count = min(sequences, available)
        # Not the first ones, which would be the first few documents; and not by run.seed, or runs could not be compared.
        order = SampleOrder([_sequences(stream, self.sequence_length) for stream in streams], list(self.config.blend.values()), seed=0, shuffle=True)
        rows = self._read(streams, *order(0, count))
        self.bytes_per_token_heldout = float(self.corpora[0].bytes_of_tokens[rows[:, 1:]].mean())
        share = micro_batch_size * world_size
        padded = np.concatenate([rows, np.full((-count % share, self.sequence_length + 1), -1, dtype=np.int64)])
        mine = padded.reshape(-1, world_size, micro_batch_size, self.sequence_length + 1)[:, rank]
        return [self._batch(part) for part in mine]

    def _streams(self, split: str) -> list[Stream]:
        streams = [corpus.stream(split) for corpus in self.corpora]
        for corpus, stream in zip(self.corpora, streams, strict=True):
            if not _sequences(stream, self.sequence_length):
                raise ConfigError(
                    f"the {split} split of {corpus.folder} has {stream.tokens} tokens, too few for one sequence of model.sequence_length="
                    f"{self.sequence_length}; use model.sequence_length={max(2, stream.tokens // 2)} or less, or prepare more text"
                    + (" (or a larger share: heldout=0.1)" if split == "heldout" else "")
                )
        return streams

    def _read(self, streams: list[Stream], corpus: np.ndarray, sequence: np.ndarray) -> np.ndarray:
        """int64 [samples, T + 1]."""
        rows = np.empty((len(corpus), self.sequence_length + 1), dtype=np.int64)
        for row, number, index in zip(rows, corpus.tolist(), sequence.tolist(), strict=True):
            streams[number].read(index * self.sequence_length, row)
        return rows

    def _batch(self, rows: np.ndarray) -> Batch:
        whole = torch.from_numpy(rows)
        tokens, targets = whole[:, :-1], whole[:, 1:]
        resets = tokens == self.boundary if self.config.reset_at_documents else None
        return Batch(tokens.clamp(min=0), targets, resets)

    def _check_vocabulary(self, vocab_size: int) -> None:
        first = self.corpora[0]
        for corpus in self.corpora[1:]:
            if corpus.tokenizer_sha256 != first.tokenizer_sha256:
                raise ConfigError(
                    f"data.blend mixes corpora of different tokenizers: {first.folder.name} and {corpus.folder.name}; prepare one with the other's: "
                    f"kan data prepare corpus.name={corpus.folder.name} tokenizer.path={first.tokenizer_path} force=true"
                )
        if first.vocab_size > vocab_size:
            padded = -(-first.vocab_size // 128) * 128
            raise ConfigError(
                f"model.vocab_size={vocab_size} is smaller than the {first.vocab_size} pieces of {first.tokenizer_path}; use model.vocab_size={padded}, "
                f"or prepare the corpus with tokenizer.vocab_size={vocab_size}"
            )


class Loader:
    """A rank's part of the global batches, one after the other; read ahead in a thread."""

    def __init__(self, data: TrainingData, streams: list[Stream], global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} must be a multiple of train.micro_batch_size={micro_batch_size} times {world_size} processes"
            )
        self.data, self.streams = data, streams
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.share = global_batch_size // world_size
        self.offset = rank * self.share
        sizes = [_sequences(stream, data.sequence_length) for stream in streams]
        self.order = SampleOrder(sizes, list(data.config.blend.values()), seed=data.seed, shuffle=data.config.shuffle)
        self.cursor = 0
        """Sequences of the global order that were handed out; those left out do not count."""
        self.left_out: list[tuple[int, int]] = []
        """Ranges [start, stop) of the global order that are never handed out, in order and apart from one another."""
        self._window: tuple[int, np.ndarray, np.ndarray] = (0, np.empty(0, np.int64), np.empty(0, np.int64))
        self._ahead: _ReadAhead | None = None

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        if self._ahead is None and self.data.config.prefetch:
            self._ahead = _ReadAhead(self, self.cursor, self.data.config.prefetch)
        try:
            batches = self._ahead.next() if self._ahead is not None else self.read(self.cursor)
        except BaseException:
            self.close()  # the thread has ended with its error: the next call starts another at the same place
            raise
        self.cursor += self.global_batch_size
        return batches

    def read(self, cursor: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins at sample `cursor`: consecutive blocks of it, in the order of the ranks."""
        parts = [self._samples(start, stop - start) for start, stop in self.stretches(cursor + self.offset, self.share)]
        corpus, sequence = (np.concatenate(column) for column in zip(*parts, strict=True))
        rows = self.data._read(self.streams, corpus, sequence)
        return [self.data._batch(rows[start : start + self.micro_batch_size]) for start in range(0, self.share, self.micro_batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: JSON, the same on every rank."""
        left_out = [list(stretch) for stretch in self.left_out]
        return {"cursor": self.cursor, "left_out": left_out, "seed": self.data.seed, "index_hash": self.data.index_hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, of any data-parallel size. ConfigError when seed, corpora, blend or sequence length are not those of the state."""
        if state["seed"] != self.data.seed:
            raise ConfigError(f"run.seed={self.data.seed} is not the seed of the run, whose sample order it decides; use run.seed={state['seed']}")
        if state["index_hash"] != self.data.index_hash:
            raise ConfigError(
                "the corpora, data.blend, data.shuffle or model.sequence_length are not those of the run, so its sample order cannot continue; "
                "restore them, or start a new run from its weights: init_from=RUN run.name=OTHER"
            )
        self.close()
        self.cursor = int(state["cursor"])
        self.left_out = [(int(start), int(stop)) for start, stop in state.get("left_out", [])]

    def stretches(self, start: int, count: int) -> list[tuple[int, int]]:
        """Ranges [start, stop) of the global order that the `count` sequences from cursor `start` on are."""
        stretches, position = [], start
        for first, stop in self.left_out:
            before = min(count, first - position)
            if before > 0:
                stretches.append((position, position + before))
                position, count = position + before, count - before
            if position >= first:
                position += stop - first
        return stretches + ([(position, position + count)] if count else [])

    def leave_out(self, stretches: list[tuple[int, int]]) -> None:
        """Never hand out these ranges of the global order; the cursor must not be beyond any of them."""
        self.close()
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.left_out, *stretches]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.left_out = merged

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def _samples(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        first, corpus, sequence = self._window
        if not first <= start <= start + count <= first + len(corpus):
            corpus, sequence = self.order(start, max(count, _LOOK_AHEAD))
            self._window = (start, corpus, sequence)
            first = start
        return corpus[start - first : start - first + count], sequence[start - first : start - first + count]


class _ReadAhead:
    """Reads the next global batches in a thread. It has a cursor of its own: the loader's counts only what was handed out."""

    def __init__(self, loader: Loader, cursor: int, depth: int) -> None:
        self.queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=depth)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(loader, cursor), name="read-ahead", daemon=True)
        self.thread.start()

    def next(self) -> list[Batch]:
        item = self.queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def _run(self, loader: Loader, cursor: int) -> None:
        while not self.stopped.is_set():
            item: list[Batch] | BaseException
            try:
                item = loader.read(cursor)
            except BaseException as error:  # handed to the training thread, which raises it
                item = error
            while not self.stopped.is_set():
                try:
                    self.queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            cursor += loader.global_batch_size


def open_training_data(config: DataConfig, *, sequence_length: int, seed: int, vocab_size: int) -> TrainingData:
    """Open and check the corpora of `config`. ConfigError when one is missing, damaged, or does not fit the model."""
    return TrainingData(config, sequence_length=sequence_length, seed=seed, vocab_size=vocab_size)


def _sequences(stream: Stream, sequence_length: int) -> int:
    return max(0, (stream.tokens - 1) // sequence_length)
