"""A prepared corpus holds exactly the source's documents, is the same however it was made, and is complete or not there."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from kan_train.config import ConfigError, DataConfig, PrepareConfig, TokenizerConfig
from kan_train.data import open_training_data
from kan_train.data.index import CorpusIndex
from kan_train.data_tools.commands import run_inspect, run_prepare
from kan_train.data_tools.files import sha256_of, sole_writer
from kan_train.data_tools.prepare import prepare
from kan_train.data_tools.shards import read_documents, split_of
from kan_train.data_tools.tokenizer import Tokenizer

Texts = tuple[Path, dict[str, str]]


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, out of the token stream that training reads."""
    index = CorpusIndex(folder, verify=True)
    stream = index.stream(split)
    tokens = np.empty(stream.tokens, dtype=np.int64)
    stream.read(0, tokens)
    tokenizer = Tokenizer(index.tokenizer_path)
    starts = np.flatnonzero(tokens == index.boundary)
    return [tokenizer.decode(document.tolist()) for document in np.split(tokens, starts[1:])]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_token_streams_hold_every_document_exactly_once(make_config: Callable, folder_of_texts: Texts, compression: str) -> None:
    folder = prepare(make_config(compression=compression))
    contents = list(folder_of_texts[1].values())
    for split in ("train", "heldout"):
        expected = [text for text in contents if split_of(text, 0.2) == split]
        assert sorted(decoded(folder, split)) == sorted(expected)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sum(counts["documents"] for counts in manifest["counts"].values()) == len(contents)
    assert sum(counts["bytes"] for counts in manifest["counts"].values()) == sum(len(text.encode()) for text in contents)
    assert len(manifest["text"]) > 3, "many shards, or the test shows little"
    for kind in ("text", "tokens"):
        for shard in manifest[kind]:
            assert sha256_of(folder / kind / shard["file"]) == shard["sha256"]
            assert (folder / kind / shard["file"]).stat().st_size == shard["size"]


def test_the_split_is_by_text_and_near_its_share() -> None:
    texts = [f"document {number}" for number in range(20_000)]
    heldout = np.array([split_of(text, 0.1) == "heldout" for text in texts])
    assert heldout.mean() == pytest.approx(0.1, abs=0.008)
    assert [split_of(text, 0.1) for text in reversed(texts)] == [split_of(text, 0.1) for text in texts][::-1]
    assert all(split_of(text, 0.2) == "heldout" for text, out in zip(texts, heldout, strict=True) if out), "a larger share holds out the same and more"


def test_a_larger_number_of_workers_makes_the_same_files(make_config: Callable, hashes: Callable, tmp_path: Path, some_texts: Callable) -> None:
    """The tokenizer too, which is trained here."""
    settings = {"tokenizer": TokenizerConfig(vocab_size=400)}
    one = prepare(make_config(root=str(tmp_path / "one"), workers=1, **settings))
    three = prepare(make_config(root=str(tmp_path / "three"), workers=3, **settings))
    assert hashes(one) == hashes(three)


def test_webdataset_reads_both_kinds_of_shards(make_config: Callable, folder_of_texts: Texts) -> None:
    folder = prepare(make_config())
    text_shards = [str(path) for path in sorted((folder / "text").glob("*.tar"))]
    samples = list(webdataset.WebDataset(text_shards, shardshuffle=False).decode())
    assert sorted(sample["txt"] for sample in samples) == sorted(folder_of_texts[1].values())
    assert {sample["json"]["source"] for sample in samples} == set(folder_of_texts[1])
    token_shards = [str(path) for path in sorted((folder / "tokens").glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(token_shards, shardshuffle=False))
    tokens = np.concatenate([np.frombuffer(sample["tokens"], dtype=json.loads(sample["json"])["dtype"]) for sample in samples])
    stream = CorpusIndex(folder, verify=True).stream("train")
    mapped = np.empty(stream.tokens, dtype=np.int64)
    stream.read(0, mapped)
    assert np.array_equal(tokens, mapped)


def test_the_training_reads_what_was_prepared(make_config: Callable) -> None:
    """Across the border of the two rooms: bytes a token of the whole held-out split, and a loader over it."""
    folder = prepare(make_config())
    data = open_training_data(DataConfig(root=str(folder.parent), blend={"mine": 1.0}), sequence_length=32, seed=0, vocab_size=512)
    data.heldout(10**6, 4, 0, 1)
    counts = json.loads((folder / "manifest.json").read_text())["counts"]["heldout"]
    # The two differ by the cut ends of the stream, and by the escapes of U+2581.
    assert data.bytes_per_token_heldout == pytest.approx(counts["bytes"] / counts["tokens"], rel=0.05)
    loader = data.loader(4, 4, 0, 1)
    assert loader.next_step()[0].tokens.shape == (4, 32)
    loader.close()


def test_a_corrupt_shard_is_refused_with_the_command_that_made_the_corpus(make_config: Callable, folder_of_texts: Texts, tokenizer_path: Path) -> None:
    folder = prepare(make_config())
    shard = next((folder / "tokens").glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    command = f"kan data prepare corpus=directory corpus.path={folder_of_texts[0]} corpus.name=mine tokenizer.vocab_size=4096 tokenizer.path={tokenizer_path}"
    with pytest.raises(ConfigError, match=f"{shard} is damaged.*{command} root={folder.parent} force=true"):
        CorpusIndex(folder, verify=True)


def test_a_complete_corpus_is_left_as_it_is(make_config: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare(make_config())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare(make_config(workers=2)) == folder, "the number of workers is no setting of the corpus"
    assert "is prepared already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_settings_are_refused_by_name_unless_forced(make_config: Callable) -> None:
    prepare(make_config())
    with pytest.raises(ConfigError, match=r"heldout: 0\.2 then, 0\.3 now.*force=true.*corpus\.name=OTHER"):
        prepare(make_config(heldout=0.3))
    with pytest.raises(ConfigError, match=r"corpus\.encoding: utf-8 then, latin-1 now"):
        prepare(make_config(corpus={"encoding": "latin-1"}))
    folder = prepare(make_config(heldout=0.3, force=True))
    assert json.loads((folder / "settings.json").read_text())["heldout"] == 0.3


def test_a_wrong_path_may_be_corrected_without_force(make_config: Callable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        prepare(make_config(corpus={"path": str(tmp_path / "txets")}))
    assert (prepare(make_config()) / "manifest.json").exists()


def test_a_number_of_documents_is_counted_over_the_whole_source(make_config: Callable, folder_of_texts: Texts) -> None:
    folder = prepare(make_config(corpus={"max_documents": 25}))
    texts = [text for shard in sorted((folder / "text").glob("*.tar")) for text, _ in read_documents(shard)]
    assert texts == [folder_of_texts[1][name] for name in sorted(folder_of_texts[1])][:25]


def test_empty_documents_are_left_out_and_counted(make_config: Callable, folder_of_texts: Texts) -> None:
    for number, text in enumerate(["", " \n\t ", "\n"]):
        (folder_of_texts[0] / f"empty{number}.txt").write_text(text)
    manifest = json.loads((prepare(make_config()) / "manifest.json").read_text())
    assert manifest["empty_documents"] == 3
    assert sum(counts["documents"] for counts in manifest["counts"].values()) == 60


def test_a_source_of_empty_documents_is_refused(make_config: Callable, tmp_path: Path) -> None:
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"every document is empty \(1 of them\)"):
        prepare(make_config(corpus={"path": str(tmp_path / "blank")}))


def test_a_split_without_documents_is_refused_with_a_share_that_works(make_config: Callable, folder_of_texts: Texts) -> None:
    one = folder_of_texts[0] / "a" / "000.txt"
    with pytest.raises(ConfigError, match=r"heldout=0\.0001 leaves none of the 1 documents to the heldout split.*heldout=0 force=true"):
        prepare(make_config(corpus={"path": str(one)}, heldout=0.0001))
    folder = prepare(make_config(corpus={"path": str(one)}, heldout=0.0, force=True))
    assert json.loads((folder / "manifest.json").read_text())["counts"]["heldout"]["documents"] == 0


def test_half_a_surrogate_pair_is_refused_by_row(make_config: Callable, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good"}\n{"text": "ab\\ud800"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: character 2 is \\ud800, half of a surrogate pair"):
        prepare(make_config(corpus={"path": str(rows)}))


def test_a_failure_in_a_worker_is_the_same_error(make_config: Callable, folder_of_texts: Texts) -> None:
    (folder_of_texts[0] / "b" / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"b/bad\.txt is not valid utf-8"):
        prepare(make_config(workers=2))


def test_two_at_once_do_not_write_one_corpus(make_config: Callable, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "corpora" / "mine"):
        with pytest.raises(ConfigError, match="another process is preparing"):
            prepare(make_config())
    assert (prepare(make_config()) / "manifest.json").exists()


# --- interruptions ---

KILLED = """
import os, sys
from kan_train.data_tools import files, prepare, shards, tokens
left = int(sys.argv[1])
whole = files.os.fsync

def fsync_or_die(descriptor):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    whole(descriptor)

files.os.fsync = fsync_or_die
from kan_train.config import CorpusConfig, PrepareConfig, TokenizerConfig
prepare.prepare(PrepareConfig(
    root=sys.argv[2], workers=1, heldout=0.2, shard_megabytes=0.01, tokenizer=TokenizerConfig(path=sys.argv[4]),
    corpus=CorpusConfig(kind="directory", name="mine", path=sys.argv[3])))
"""


@pytest.mark.parametrize("files", [0, 4, 15, 26, 34])
def test_a_killed_preparation_continues_to_the_same_corpus(
    make_config: Callable, folder_of_texts: Texts, tokenizer_path: Path, hashes: Callable, tmp_path: Path, files: int
) -> None:
    """Killed (-9) in the middle of its n-th file: no manifest is there, a run refuses it, and the same call makes what an undisturbed one makes."""
    root = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(files), str(root), str(folder_of_texts[0]), str(tokenizer_path)], check=False)
    assert done.returncode == -9
    assert not (root / "mine" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="not completely prepared"):
        CorpusIndex(root / "mine", verify=True)
    finished = {path: path.stat().st_mtime_ns for path in root.glob("mine/text/text-*.tar")}
    for path in finished:
        tarfile.open(path).close()
    recorded = {root / "mine/text" / shard["file"] for record in root.glob("mine/text/part-*.json") for shard in json.loads(record.read_text())["shards"]}
    config = make_config()
    continued = prepare(replace(config, root=str(root)))
    assert hashes(continued) == hashes(prepare(config))
    assert all(path.stat().st_mtime_ns == finished[path] for path in recorded), "a shard that is recorded as complete is not made again"
    assert len(recorded) >= files // 4 or files > 26


def test_files_that_changed_since_the_interruption_are_read_again(make_config: Callable, folder_of_texts: Texts) -> None:
    folder = prepare(make_config())
    (folder / "manifest.json").unlink()
    changed = folder_of_texts[0] / "b" / "001.txt"
    changed.write_text("Changed since, and of another length.")
    prepare(make_config())
    streams = decoded(folder, "train") + decoded(folder, "heldout")
    assert "Changed since, and of another length." in streams
    assert len(streams) == 60


# --- disks and permissions ---


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A file system of 200 kB."""
    where = tmp_path / "disk"
    where.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", where], capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk, and not everywhere")
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_full_disk_is_named_and_a_larger_one_continues(make_config: Callable, small_disk: Path, hashes: Callable) -> None:
    config = make_config()
    with pytest.raises(ConfigError, match=rf"{small_disk}/mine/.*no space left on the disk.*it continues"):
        prepare(replace(config, root=str(small_disk)))
    assert not (small_disk / "mine" / "manifest.json").exists()
    assert not list(small_disk.rglob("*.tmp")), "what did not fit is removed"
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert hashes(prepare(replace(config, root=str(small_disk)))) == hashes(prepare(config))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, and only another user can be denied")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    for folder in [tmp_path, *tmp_path.parents[:2]]:
        folder.chmod(0o755)
    program = (
        "import os, sys; from kan_train.config import ConfigError, PrepareConfig; from kan_train.data_tools.prepare import prepare\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: prepare(PrepareConfig(root=sys.argv[1], workers=1))\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "corpora")], capture_output=True, text=True, check=False)
    assert "corpora" in done.stdout, done.stderr
    assert "permission denied for user 65534" in done.stdout


# --- what the commands show ---


def test_the_commands_print_what_there_is(make_config: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    config: PrepareConfig = make_config()
    started = time.perf_counter()
    assert run_prepare(config) == 0
    assert time.perf_counter() - started < 60
    printed = capsys.readouterr()
    folder = Path(config.root) / "mine"
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    for split in ("train", "heldout"):
        for fact in ("documents", "bytes", "tokens"):
            assert f"{counts[split][fact]:,}" in printed.out
    assert "largest documents: " in printed.out
    assert "\r" not in printed.err, "no progress bar where nobody watches"
    assert run_inspect(folder) == 0
    assert capsys.readouterr().out == printed.out


def test_inspecting_nothing_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prepared corpus; make one with `kan data prepare`"):
        run_inspect(tmp_path)
