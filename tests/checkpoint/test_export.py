"""An exported file: what it holds, who can read it, and what is refused."""

import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from kan_train.checkpoint import CheckpointError, save
from kan_train.checkpoint.export import EXPORT_VERSION, check_export, export, load_export, read_export
from kan_train.config import AdaConfig, Config, ConfigError, DataConfig, GenerateConfig, GroveConfig, ModelConfig, RunConfig, TokenizerConfig
from kan_train.config.compose import to_yaml
from kan_train.data_tools.tokenizer import Tokenizer, train_tokenizer
from kan_train.inference.commands import samples
from kan_train.inference.load import load_run
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel

TEXT = ["def main():\n    print('hello world')\n    return 0\n", "the quick brown fox jumps over the lazy dog; " * 3, "Grüße aus Köln: naïve café"]
DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def model_config(**changes) -> ModelConfig:
    grove = GroveConfig(num_groves=4, active_groves=2, width=16, shared_width=16)
    return ModelConfig(**{"num_layers": 2, "width": 32, "vocab_size": 384, "sequence_length": 32, "ada": AdaConfig(num_heads=2), "grove": grove, **changes})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXT * 5, TokenizerConfig(vocab_size=296, character_coverage=0.98), path)
    return path


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A model whose every parameter and buffer is drawn, so that none is what a fresh one would have."""
    made = materialise(LanguageModel(model_config()), seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator)
            # The deviation of the scores divides: it stays positive.
            tensor += 0.3 * drawn if name.endswith("score_std") else 0.2 * (drawn - 0.5)
        made.head.weight *= 6
    return made


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, kit, model, tokenizer) -> Path:
    """A run with one checkpoint, of which every tensor lies in several boxes; the optimizer's state is there too."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    write_run(run_dir, model, kit, tokenizer)
    return run_dir


def write_run(run_dir: Path, model: LanguageModel, kit, tokenizer: Path, config: ModelConfig | None = None) -> None:
    parameters = dict(model.named_parameters())
    fragments = []
    for name, tensor in model.state_dict().items():
        kind = "param" if name in parameters else "buffer"
        fragments += kit.cut(f"{kind}/{name}", tensor.detach(), [5, 9])
    fragments += kit.cut("exp_avg/head.weight", torch.ones_like(model.head.weight), [6])
    text = to_yaml(Config(model=config or model.config, data=DataConfig(blend={"stdlib": 1.0}), run=RunConfig(name=run_dir.name)))
    save(run_dir / "checkpoints", step=20, fragments=fragments, state={"progress": {"tokens": 2560}}, config=text)
    (run_dir / "tokenizer.model").write_bytes(tokenizer.read_bytes())


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000020"


@pytest.fixture
def file(run_dir, tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    export(newest(run_dir), path)
    return path


def test_it_holds_the_weights_bit_for_bit_and_nothing_of_the_optimizer(file, model, tokenizer):
    held = load_file(file)
    assert held.pop("tokenizer.model").tobytes() == tokenizer.read_bytes()
    expected = model.state_dict()
    assert held.keys() == expected.keys()
    for name, tensor in expected.items():
        assert held[name].dtype == tensor.numpy().dtype
        assert held[name].tobytes() == tensor.numpy().tobytes(), name
    facts = read_export(file)
    assert (facts.step, facts.tokens, facts.dtype, facts.config["run"]["name"], facts.config["model"]["width"]) == (20, 2560, "fp32", "first", 32)


def test_decoding_from_the_file_is_decoding_from_the_checkpoint(file, run_dir, model):
    from_file, from_run = load_run(str(file), device="cpu"), load_run(str(run_dir), device="cpu")
    assert (from_file.step, from_file.checkpoint, from_file.tokenizer.sha256) == (20, file, from_run.tokenizer.sha256)
    assert not from_file.model.training
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [loaded.logits(tokens) for loaded in (from_file.model, from_run.model, model.eval())]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    texts = [samples(GenerateConfig(run=str(place), prompt="def", max_tokens=16, seed=3, device="cpu")) for place in (file, run_dir)]
    assert texts[0] == texts[1]
    assert len(texts[0][0]) > 3


def test_the_plain_loader_of_the_document_reads_it(file, model, tokenizer):
    """The very lines of docs/checkpoints.md, in a process that loads neither this package nor torch."""
    loader = re.search(r"```python\n(import json\n.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)[1]
    assert len(loader.strip().splitlines()) <= 12
    code = loader + (
        "\nimport hashlib, sys\n"
        "assert not {'kan_train', 'torch'} & set(sys.modules), sys.modules.keys()\n"
        "found = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in weights.items()}\n"
        "print(json.dumps([found, config['model']['width'], about['step'], tokenizer.encode('def main')]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=file.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found, width, step, tokens = json.loads(done.stdout)
    assert found == {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in model.state_dict().items()}
    assert (width, step) == (32, "20")
    assert tokens == Tokenizer(tokenizer).encode("def main")


def test_the_same_checkpoint_gives_the_same_bytes_wherever_it_lies(file, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "tokenizer.model", (1, 1))
    again = tmp_path / "again.safetensors"
    export(newest(tmp_path / "elsewhere"), again)
    assert again.read_bytes() == file.read_bytes()


def test_bf16_rounds_the_parameters_and_leaves_the_buffers(run_dir, model, tmp_path):
    path = tmp_path / "small.safetensors"
    export(newest(run_dir), path, dtype="bf16")
    tensors, _ = load_export(path)
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor.bfloat16() if name in parameters else tensor), name
        assert tensors[name].dtype == (torch.bfloat16 if name in parameters else torch.float32)
    loaded = load_run(str(path), device="cpu").model
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.head.weight, model.head.weight.bfloat16().float())


def test_no_altered_byte_is_read(file):
    """One bit anywhere, in header or tensors, or a cut at any length."""
    original, draw = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(original[:8], "little")
    positions = [0, 7, 8, header - 1, header, len(original) - 1]
    positions += [draw.randrange(end) for end in [header] * 40 + [len(original)] * 30]
    for position in positions:
        altered = bytearray(original)
        altered[position] ^= 1 << draw.randrange(8)
        for content in (altered, original[:position]):
            file.write_bytes(content)
            with pytest.raises(CheckpointError):
                load_export(file)
    file.write_bytes(original)
    load_export(file)


def rewritten(file: Path, change) -> None:
    """Write the file again with other metadata, as a program would that means it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


class Trap:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, (str(Trap.folder),)


def foreign(file: Path) -> None:
    save_file({"weight": torch.ones(3)}, file)


DAMAGE = {
    "a newer format": (lambda file: rewritten(file, lambda about: about.update(kan_train_export=str(EXPORT_VERSION + 1))), "reads up to 1; use the version"),
    "another program's file": (foreign, "is not an export of kan-train"),
    "an empty file": (lambda file: file.write_bytes(b""), "is not a safetensors file"),
    "text": (lambda file: file.write_text("x" * 100), "is not a safetensors file"),
    "a header that lacks the configuration": (lambda file: rewritten(file, lambda about: about.pop("config")), "has a damaged header"),
    "a changed configuration": (lambda file: rewritten(file, lambda about: about.update(step="21")), "altered or damaged"),
    "a header of the same content, written otherwise": (lambda file: rewritten(file, lambda about: None), "altered or damaged"),
    "gone": (lambda file: file.unlink(), "there is no such file; write it with `kan checkpoint export"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_no_export_is_refused_and_said(file, case):
    damage, words = DAMAGE[case]
    damage(file)
    with pytest.raises(ConfigError, match=words):
        load_run(str(file), device="cpu")


def test_nothing_is_unpickled(tmp_path):
    Trap.folder, path = tmp_path / "sprung", tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        load_run(str(path), device="cpu")
    assert not Trap.folder.exists()


def test_tensors_that_do_not_fit_the_configuration_are_refused(kit, model, tokenizer, tmp_path):
    write_run(tmp_path / "other", model, kit, tokenizer, config=model_config(width=64))
    path = tmp_path / "other.safetensors"
    export(newest(tmp_path / "other"), path)
    with pytest.raises(ConfigError, match="they do not belong together"):
        load_run(str(path), device="cpu")


def test_an_existing_file_is_kept_unless_asked(file, run_dir):
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already; use another name, or --overwrite"):
        export(newest(run_dir), file)
    assert file.read_text() == "mine"
    export(newest(run_dir), file, overwrite=True)
    check_export(file)


REFUSED = {
    "no folder": ("nowhere/model.safetensors", {}, "there is no folder .*nowhere; make it with `mkdir -p"),
    "another suffix": ("model.bin", {}, "use .*model.safetensors"),
    "a dtype": ("model.safetensors", {"dtype": "fp16"}, "--dtype='fp16' is not known; use --dtype=bf16, or another one of: fp32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_target_that_cannot_be_is_refused(run_dir, tmp_path, case):
    name, settings, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        export(newest(run_dir), tmp_path / name, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "copy")
    data = next(newest(tmp_path / "copy").glob("*.safetensors"))
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not have the SHA-256 of its manifest"):
        export(newest(tmp_path / "copy"), tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_full_disk_leaves_nothing(run_dir, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space left to write"):
        export(newest(run_dir), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tokenizer_is_named(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"copy/tokenizer.model is missing .* copy it there"):
        export(newest(tmp_path / "copy"), tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
