"""Megabytes of text a second that one core tokenises, and how long a tokenizer takes to train.

The text is that of a prepared corpus, with the tokenizer of that corpus; documents are encoded in batches of 64 in one thread, to arrays of the token
shards' type, as `kan data prepare` does. Timed by processor time of the process, so that other work on the machine does not count against it.

    python benchmarks/tokenizer.py                    # on corpora/stdlib, which `kan data prepare` makes
    python benchmarks/tokenizer.py --train            # also the training of the default tokenizer (wall-clock)
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import write_result

from kan_train.config import TokenizerConfig
from kan_train.data_tools.shards import read_documents
from kan_train.data_tools.tokenizer import Tokenizer, train_tokenizer

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpora/stdlib"), help="folder of a prepared corpus")
    parser.add_argument("--megabytes", type=float, default=8.0, help="text encoded a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="also time the training of a tokenizer")
    arguments = parser.parse_args()
    rows = [_encoding(arguments)]
    if arguments.train:
        rows.append(_training(arguments.corpus))
    config = {"corpus": arguments.corpus.name, "megabytes": arguments.megabytes, "rounds": arguments.rounds, "documents_a_call": BATCH}
    write_result("tokenizer", claim="tokenising runs at 15 MB/s a core or more", config=config, rows=rows)


def _encoding(arguments: argparse.Namespace) -> dict:
    tokenizer = Tokenizer(arguments.corpus / "tokenizer" / "tokenizer.model")
    texts = list(_some(_documents(arguments.corpus), arguments.megabytes))
    size = sum(len(text.encode()) for text in texts)
    tokens, rates = 0, []
    for _ in range(arguments.rounds):
        started, tokens = time.process_time(), 0
        for start in range(0, len(texts), BATCH):
            for encoded in tokenizer.encode_batch(texts[start : start + BATCH]):
                tokens += len(np.array(encoded, dtype=np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32))
        rates.append(size / 1e6 / (time.process_time() - started))
    median = statistics.median(rates)
    print(f"vocabulary {tokenizer.vocab_size}: {median:.1f} MB/s, {median * tokens / size:.2f} million tokens/s, {size / tokens:.3f} bytes a token")
    return {
        "name": f"encode, vocabulary {tokenizer.vocab_size}",
        "megabytes_per_second": median,
        "spread": [min(rates), max(rates)],
        "million_tokens_per_second": median * tokens / size,
        "bytes_a_token": size / tokens,
        "text_megabytes": size / 1e6,
    }


def _training(corpus: Path) -> dict:
    config = TokenizerConfig(**json.loads((corpus / "settings.json").read_text())["tokenizer"])
    config.path = None
    texts = list(_some(_documents(corpus), config.train_megabytes))
    with tempfile.TemporaryDirectory() as folder:
        started, processor = time.perf_counter(), time.process_time()
        train_tokenizer(texts, config, Path(folder) / "tokenizer.model")
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor
    print(f"training, vocabulary {config.vocab_size}, {config.train_megabytes} MB: {seconds:.1f} s, {processor_seconds:.1f} s of processor time")
    return {"name": f"train, vocabulary {config.vocab_size}", "seconds": seconds, "processor_seconds": processor_seconds, "megabytes": config.train_megabytes}


def _documents(corpus: Path) -> Iterator[str]:
    """Training documents from all shards in turn, so that the first few megabytes are of every part of the corpus."""
    shards = [read_documents(path) for path in sorted((corpus / "text").glob("text-*.tar*"))]
    for group in itertools.zip_longest(*shards):
        yield from (text for text, facts in (document for document in group if document) if facts["split"] == "train")


def _some(texts: Iterator[str], megabytes: float) -> Iterator[str]:
    read = 0
    for text in texts:
        if read >= megabytes * 1e6:
            return
        read += len(text)
        yield text


if __name__ == "__main__":
    main()
