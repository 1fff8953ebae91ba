"""The folder that `kan export hf` writes: what is in it, what --overwrite replaces, what is in memory meanwhile, and where it fails."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import kan_train.export.hf  # noqa: F401 (transformers then knows the class)
from kan_train.cli import main
from kan_train.config import ConfigError
from kan_train.export.folder import CODE, write_folder
from kan_train.export.source import open_source


def test_the_command_exports_runs_and_files_and_says_so(runs, tmp_path, capsys):
    file, folders = tmp_path / "first.safetensors", [tmp_path / "a", tmp_path / "b"]
    assert main(["checkpoint", "export", "first", str(file), "--root", str(runs)]) == 0
    for source, folder in zip(("first", str(file)), folders, strict=True):
        assert main(["export", "hf", source, str(folder), "--root", str(runs)]) == 0
    assert "step 20 of" in capsys.readouterr().out
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second
    assert {*CODE, "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"} == first.keys()
    assert AutoConfig.from_pretrained(folders[0]).hidden_size == 32
    assert json.loads(first["generation_config.json"])["suppress_tokens"] == [0, *range(310, 384)]


def test_only_its_own_folders_are_replaced_and_a_failure_leaves_them(runs, tmp_path, monkeypatch):
    source, folder, mine = open_source("first", runs), tmp_path / "hf", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="exists already; use another name, or --overwrite"):
        write_folder(source, mine)
    with pytest.raises(ConfigError, match="was not written by `kan export hf` and is not replaced"):
        write_folder(source, mine, overwrite=True)
    write_folder(source, folder)
    before = (folder / "config.json").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kan_train.export.folder.shutil.copyfile", fail)
    with pytest.raises(ConfigError, match="no space left to write"):
        write_folder(source, folder, overwrite=True)
    monkeypatch.undo()
    assert (folder / "config.json").read_bytes() == before
    write_folder(source, folder, overwrite=True, dtype="bf16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mine", "runs"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "checkpoint-500").mkdir(), "holds checkpoint-500, which .* move checkpoint-500 away"),
        (lambda folder: (folder / "training_args.bin").touch(), "holds training_args.bin"),
        (lambda folder: (folder / "config.json").unlink(), "was not written by"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "was not written by"),
        (lambda folder: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder), "was not written by"),
    ],
    ids=["folder", "file", "no configuration", "another's", "a trained copy"],
)
def test_what_the_command_did_not_write_is_not_replaced(change, words, runs, tmp_path):
    source, folder = open_source("first", runs), tmp_path / "hf"
    write_folder(source, folder)
    change(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(ConfigError, match=words):
        write_folder(source, folder, overwrite=True)
    assert sorted(folder.iterdir()) == before


def test_a_link_is_followed_and_the_working_directory_is_kept(runs, tmp_path, monkeypatch):
    source, link = open_source("first", runs), tmp_path / "link"
    write_folder(source, tmp_path / "hf")
    link.symlink_to("hf")
    for dtype in ("bf16", "fp32"):
        write_folder(source, link, overwrite=True, dtype=dtype)
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "link", "runs"]
    monkeypatch.chdir(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"`cd ..` and use hf"):
        write_folder(source, Path(), overwrite=True)


def test_one_tensor_is_read_at_a_time(runs, tmp_path):
    """Of a parameter that is cast, what was read is gone when the next is read; a file's tensors are read when they are asked for."""
    file = tmp_path / "first.safetensors"
    assert main(["checkpoint", "export", "first", str(file), "--root", str(runs)]) == 0
    for source in (open_source("first", runs), open_source(str(file), runs)):
        alive: list[weakref.ref] = []

        def read(name, source=source, alive=alive):
            assert not any(tensor() is not None for tensor in alive)
            tensor = source.read(name)
            if name in source.parameters:
                alive.append(weakref.ref(tensor))
            return tensor

        write_folder(replace(source, read=read), tmp_path / "hf", dtype="bf16", overwrite=True)
        assert len(alive) == len(source.parameters)
        assert source.read("head.weight") is not source.read("head.weight")
    file.unlink()
    with pytest.raises(ConfigError, match=r"first.safetensors cannot be read .* write it again"):
        source.read("head.weight")


def test_a_disk_that_is_full_at_the_index_says_so(runs, tmp_path, monkeypatch):
    write = Path.write_text

    def fail(path, *arguments, **options):
        if path.name == "model.safetensors.index.json":
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ConfigError, match="no space left to write"):
        write_folder(open_source("first", runs), tmp_path / "hf", shard_bytes=40_000)
    assert not list(tmp_path.glob("*hf*"))
