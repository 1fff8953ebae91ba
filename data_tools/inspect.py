"""`kan data inspect`: what a prepared corpus holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kan_train.config import ConfigError
from kan_train.data_tools.files import named_errors
from kan_train.data_tools.tokenizer import Tokenizer

SAMPLE_TOKENS = 160


def inspect(folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Print counts by split, bytes a token, the largest documents and a decoded sample; returns the manifest."""
    console = console or Console()
    with named_errors(folder):
        if not (folder / "manifest.json").exists():
            raise ConfigError(f"{folder} holds no prepared corpus; make one with `kan data prepare`, or name its folder")
        manifest = json.loads((folder / "manifest.json").read_text())
        sample = _sample(folder, manifest)
    console.print(f"[bold]{manifest['name']}[/]: {manifest['source']}; licence: {manifest['licence']}")
    table = Table("split", *(heading for heading in ("documents", "bytes", "tokens", "bytes a token")))
    for split, counts in manifest["counts"].items():
        ratio = counts["bytes"] / max(1, counts["tokens"] - counts["documents"])
        table.add_row(split, f"{counts['documents']:,}", f"{counts['bytes']:,}", f"{counts['tokens']:,}", f"{ratio:.3f}")
    console.print(table)
    console.print(f"vocabulary {manifest['tokenizer']['vocab_size']:,}; {manifest['empty_documents']:,} empty documents left out; "
                  f"{len(manifest['tokens'])} token shards")  # fmt: skip
    longest = ", ".join(f"{one['source']} ({one['tokens']:,} tokens)" for one in manifest.get("longest_documents", []))
    console.print(f"largest documents: {longest}", markup=False)
    console.rule("sample", align="left")
    console.print(sample, markup=False, highlight=False)
    console.rule()
    return manifest


def _sample(folder: Path, manifest: dict[str, Any]) -> str:
    """The beginning of a document from the middle of the first shard."""
    member = manifest["tokens"][0]
    tokens = np.memmap(folder / "tokens" / member["file"], dtype=manifest["dtype"], mode="r", offset=member["offset"], shape=(member["tokens"],))
    starts = np.flatnonzero(tokens == manifest["tokenizer"]["boundary"])
    start = int(starts[len(starts) // 2])
    return Tokenizer(folder / "tokenizer" / "tokenizer.model").decode(tokens[start : start + SAMPLE_TOKENS].tolist())
