"""A prepared corpus, memory-mapped: one long stream of tokens a split, cut into sequences.

A corpus is a folder with manifest.json, tokenizer/ and tokens/ (webdataset tars), as `kan data prepare` leaves it. Every document begins with the
boundary token. Sequence s of a split covers the tokens s * T .. s * T + T of its stream: T inputs and, one later, T targets.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kan_train.config import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class Stream:
    """The tokens of one split: its members end to end."""

    members: list[np.ndarray]
    """Memory maps of uint16 or uint32."""
    starts: np.ndarray
    """int64 [members + 1]: position of each member's first token, and the end."""

    @property
    def tokens(self) -> int:
        """Length of the stream."""
        return int(self.starts[-1])

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (int64) with the tokens from position `start` on."""
        member = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - int(self.starts[member])
            piece = self.members[member][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            member += 1


class CorpusIndex:
    """One prepared corpus. ConfigError when it is missing, incomplete, damaged, or its files may not be read."""

    def __init__(self, folder: Path, *, verify: bool) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.tokenizer_path = folder / "tokenizer" / "tokenizer.model"
        self.boundary: int = self.manifest["tokenizer"]["boundary"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.tokenizer_sha256: str = self.manifest["tokenizer"]["sha256"]
        for member in self.manifest["tokens"]:
            self._check(folder / "tokens" / member["file"], member["size"], member["sha256"] if verify else None)
        self._check(self.tokenizer_path, None, self.tokenizer_sha256)
        table = self.manifest["bytes_of_tokens"]
        self._check(folder / table["file"], None, table["sha256"])
        self.bytes_of_tokens: np.ndarray = np.load(folder / table["file"], allow_pickle=False)
        self.hash = hashlib.sha256(json.dumps([self.manifest["tokenizer"], self.manifest["tokens"]], sort_keys=True).encode()).hexdigest()

    def stream(self, split: str) -> Stream:
        """The stream of "train" or "heldout"."""
        dtype = np.dtype(self.manifest["dtype"])
        members = [member for member in self.manifest["tokens"] if member["split"] == split]
        # As plain arrays, which keep the map alive: a slice of a np.memmap costs more than the copy of a sequence.
        maps = [
            np.asarray(np.memmap(self.folder / "tokens" / member["file"], dtype=dtype, mode="r", offset=member["offset"], shape=(member["tokens"],)))
            for member in members
        ]
        return Stream(maps, np.cumsum([0] + [len(tokens) for tokens in maps], dtype=np.int64))

    def _check(self, path: Path, size: int | None, sha256: str | None) -> None:
        again = f"make the corpus again with `{_prepare_command(self.folder)} force=true`"
        try:
            if size is not None and path.stat().st_size != size:
                raise ConfigError(f"{path} has {path.stat().st_size} bytes and should have {size}; {again}")
            with path.open("rb") as file:
                if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ConfigError(f"{path} is damaged: its SHA-256 is not the manifest's; {again}")
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing; {again}") from error
        except PermissionError as error:
            raise ConfigError(f"{path}: permission denied; give this user the right to read it") from error


def _prepare_command(folder: Path) -> str:
    """The command that makes this corpus, as far as its name or the settings that `kan data prepare` keeps beside it tell."""
    try:
        settings = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        settings = {"corpus": {"kind": folder.name if folder.name in ("stdlib", "debian_docs") else "directory"}, "tokenizer": {}}
    corpus, tokenizer = settings["corpus"], settings["tokenizer"]
    words = [f"kan data prepare corpus={corpus['kind']}"]
    if (needed := {"directory": "path", "huggingface": "dataset"}.get(corpus["kind"])) is not None:
        words.append(f"corpus.{needed}={corpus.get(needed) or 'TEXTS'}")
    if corpus["kind"] != folder.name:
        words.append(f"corpus.name={folder.name}")
    words += [f"tokenizer.{setting}={tokenizer[setting]}" for setting in ("vocab_size", "path") if tokenizer.get(setting)]
    return " ".join([*words, f"root={folder.parent}"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        state = "is not completely prepared" if folder.exists() else "does not exist"
        raise ConfigError(f"data.blend.{folder.name}: the corpus {folder} {state}; run `{_prepare_command(folder)}`, or set data.root") from error
    except PermissionError as error:
        raise ConfigError(f"{path}: permission denied; give this user the right to read it") from error
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise ConfigError(f"{path} is damaged ({error}); prepare the corpus again with force=true") from error
    if not isinstance(manifest, dict):
        raise ConfigError(f"{path} is damaged (no JSON object); prepare the corpus again with force=true")
    if manifest.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}; prepare the corpus again with force=true")
    return manifest
