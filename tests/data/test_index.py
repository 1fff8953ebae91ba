"""Corpora that are missing, damaged or do not fit are refused by name, with what to do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kan_train.config import ConfigError, DataConfig
from kan_train.data import TrainingData, open_training_data

Corpora = tuple[Path, dict[str, np.ndarray]]


def open_one(root: Path, *names: str, verify: bool = True, vocab_size: int = 256) -> TrainingData:
    config = DataConfig(root=str(root), blend=dict.fromkeys(names or ("one",), 1.0), verify=verify)
    return open_training_data(config, sequence_length=16, seed=0, vocab_size=vocab_size)


def shard(root: Path) -> Path:
    return sorted((root / "one" / "tokens").glob("train-*.tar"))[1]


@pytest.mark.parametrize(("name", "command"), [("stdlib", "kan data prepare corpus=stdlib"), ("mine", "corpus=directory corpus.path=TEXTS corpus.name=mine")])
def test_a_missing_corpus_is_named_with_the_command_that_makes_it(tmp_path: Path, name: str, command: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.blend\.{name}.*{command} root={tmp_path}"):
        open_one(tmp_path, name)


def test_an_interrupted_preparation_is_not_a_corpus(corpora: Corpora) -> None:
    (corpora[0] / "one" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="not completely prepared"):
        open_one(corpora[0])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 99}', "\x00\x01"])
def test_a_damaged_manifest_is_named(corpora: Corpora, content: str) -> None:
    (corpora[0] / "one" / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"one/manifest\.json.*force=true"):
        open_one(corpora[0])


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_cut_short_is_named(corpora: Corpora, verify: bool) -> None:
    path = shard(corpora[0])
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ConfigError, match=rf"{path}.*kan data prepare"):
        open_one(corpora[0], verify=verify)


def test_one_flipped_bit_is_found_and_named(corpora: Corpora) -> None:
    path = shard(corpora[0])
    content = bytearray(path.read_bytes())
    content[600] ^= 4
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{path} is damaged.*kan data prepare"):
        open_one(corpora[0])
    assert open_one(corpora[0], verify=False).index_hash, "data.verify=false reads it as it is"


def test_a_missing_shard_is_named(corpora: Corpora) -> None:
    path = shard(corpora[0])
    path.unlink()
    with pytest.raises(ConfigError, match=rf"{path} is missing.*kan data prepare"):
        open_one(corpora[0])


def test_another_tokenizer_in_the_corpus_is_found(corpora: Corpora) -> None:
    (corpora[0] / "one" / "tokenizer" / "tokenizer.model").write_bytes(b"another tokenizer")
    with pytest.raises(ConfigError, match=r"tokenizer\.model is damaged"):
        open_one(corpora[0])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, and only another user can be denied")
def test_a_shard_that_this_user_may_not_read_is_named(corpora: Corpora, tmp_path: Path) -> None:
    path = shard(corpora[0])
    path.chmod(0o600)
    for folder in [tmp_path, *tmp_path.parents[:2]]:
        folder.chmod(0o755)
    program = (
        "import os, sys; from kan_train.config import ConfigError, DataConfig; from kan_train.data import open_training_data\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: open_training_data(DataConfig(root=sys.argv[1], blend={'one': 1.0}), sequence_length=16, seed=0, vocab_size=256)\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(corpora[0])], capture_output=True, text=True, check=False)
    assert str(path) in done.stdout, done.stderr
    assert "permission denied" in done.stdout


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused_with_one_that_fits(corpora: Corpora) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=128 .*use model\.vocab_size=256"):
        open_one(corpora[0], vocab_size=128)


def test_a_blend_of_two_tokenizers_is_refused(corpora: Corpora, write_corpus: Callable, random_documents: Callable) -> None:
    write_corpus(corpora[0], "three", random_documents(20, seed=3), tokenizer=b"another tokenizer")
    with pytest.raises(ConfigError, match=r"different tokenizers: one and three.*tokenizer\.path="):
        open_one(corpora[0], "one", "three")


def test_the_index_hash_is_that_of_the_content_not_of_the_place(corpora: Corpora, write_corpus: Callable, random_documents: Callable, tmp_path: Path) -> None:
    write_corpus(tmp_path / "elsewhere", "one", random_documents(60, seed=1))
    assert open_one(tmp_path / "elsewhere").index_hash == open_one(corpora[0]).index_hash
    manifest = json.loads((corpora[0] / "one" / "manifest.json").read_text())
    manifest["tokens"].reverse()
    (corpora[0] / "one" / "manifest.json").write_text(json.dumps(manifest))
    assert open_one(tmp_path / "elsewhere").index_hash != open_one(corpora[0]).index_hash
