"""Where tokens come from: prepared corpora and how they are blended (DataConfig), and how a corpus is prepared (PrepareConfig)."""

import os
from dataclasses import dataclass, field

from kan_train.config.errors import ConfigError, require_at_least, require_between, require_choice

CORPUS_KINDS = ("stdlib", "debian_docs", "directory", "huggingface")
COMPRESSIONS = ("none", "zstd")


@dataclass(kw_only=True)
class DataConfig:
    """The prepared corpora that a run reads."""

    root: str = "corpora"
    """Folder of prepared corpora: one folder each, as `kan data prepare` leaves it."""
    blend: dict[str, float] = field(default_factory=lambda: {"stdlib": 1.0})
    """Corpus name -> weight: the share of training sequences drawn from it (weights are normalised)."""
    shuffle: bool = True
    """Permute the global order of sequences by (seed, epoch); off: in the order of the index."""
    reset_at_documents: bool = True
    """Reset ADA's state and mask softmax attention at document boundaries inside a packed sequence."""
    prefetch: int = 2
    """Global batches read ahead in a background thread; 0 reads in the step."""
    verify: bool = True
    """Check every token shard's size (always) and SHA-256 (once a run start) against the manifest."""

    def validate(self) -> None:
        if not self.blend:
            raise ConfigError("data.blend names no corpus; use data=stdlib, or '+data.blend.NAME=1.0'")
        for name, weight in self.blend.items():
            if not weight > 0:
                setting = f"data.blend.{name}"
                raise ConfigError(f"{setting}={weight} must be positive; use {setting}=1.0, or remove it with '~{setting}'")
        require_at_least("data.prefetch", self.prefetch, 0)


@dataclass(kw_only=True)
class CorpusConfig:
    """A source of documents (conf/corpus)."""

    kind: str = "stdlib"
    """stdlib, debian_docs, directory or huggingface."""
    name: str = "stdlib"
    """Name of the prepared corpus: the folder below `root`, and the key in data.blend."""
    path: str | None = None
    """directory: the folder (or one file) with .txt, .md, .jsonl or .parquet files, also .gz, .bz2, .xz or .zst."""
    text_field: str = "text"
    """directory and huggingface: the field of a jsonl or parquet row that holds the text."""
    dataset: str | None = None
    """huggingface: the dataset's name."""
    subset: str | None = None
    """huggingface: the dataset's configuration name."""
    split: str = "train"
    """huggingface: the split to stream."""
    max_documents: int | None = None
    """Stop after this many documents."""
    licence: str | None = None
    """Licence written to the manifest; the shipped corpora know theirs."""
    encoding: str = "utf-8"
    """directory: the files' encoding; a file that is not valid in it is refused by name."""


@dataclass(kw_only=True)
class TokenizerConfig:
    """The sentencepiece tokenizer trained for a corpus."""

    vocab_size: int = 4096
    """Pieces, byte fallback and control symbols included; model.vocab_size must be at least this."""
    path: str | None = None
    """Use this sentencepiece .model file instead of training one."""
    train_megabytes: float = 12.0
    """Text that the tokenizer is trained on: documents chosen by hash until this much is read."""
    character_coverage: float = 0.9995
    """Share of the characters with a piece of their own; the others fall back to bytes."""


@dataclass(kw_only=True)
class PrepareConfig:
    """`kan data prepare`: documents -> text shards -> tokenizer -> token shards with an index."""

    root: str = "corpora"
    """Folder that the prepared corpus's folder is made in."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """What to prepare."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How to tokenise it."""
    heldout: float = 0.02
    """Share of the documents held out for validation, chosen by a hash of their text."""
    shard_megabytes: float = 16.0
    """Size of a text shard before compression, and of a token shard."""
    compression: str = "none"
    """Compression of the text shards: none or zstd."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1, metadata={"default": "one a core"})
    """Processes that read, tokenise and write."""
    force: bool = False
    """Prepare again from the start, also when a complete corpus is there."""

    def validate(self) -> None:
        require_choice("corpus.kind", self.corpus.kind, CORPUS_KINDS)
        require_choice("compression", self.compression, COMPRESSIONS)
        require_at_least("workers", self.workers, 1)
        require_between("heldout", self.heldout, 0.0, 0.5)
        require_at_least("tokenizer.vocab_size", self.tokenizer.vocab_size, 300)
        require_between("tokenizer.character_coverage", self.tokenizer.character_coverage, 0.9, 1.0)
        for setting, value in (("shard_megabytes", self.shard_megabytes), ("tokenizer.train_megabytes", self.tokenizer.train_megabytes)):
            if value <= 0:
                raise ConfigError(f"{setting}={value} must be positive; use {setting}=16")
        if self.corpus.kind == "directory" and not self.corpus.path:
            raise ConfigError("corpus=directory needs the folder with your files; add corpus.path=/path/to/texts")
        if self.corpus.kind == "huggingface" and not self.corpus.dataset:
            example = "corpus.dataset=HuggingFaceFW/fineweb corpus.subset=sample-10BT"
            raise ConfigError(f"corpus=huggingface needs the name of a dataset; add for example {example}")
        if not self.corpus.name or "/" in self.corpus.name or self.corpus.name.startswith("."):
            raise ConfigError(f"corpus.name={self.corpus.name!r} must be a plain folder name; use corpus.name=mycorpus")
