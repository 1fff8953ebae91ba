"""`kan generate` from a run directory: what it writes, and what it says where it cannot."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from kan_train.checkpoint import newest
from kan_train.cli import main
from kan_train.config import ConfigError, EdgeConfig, GenerateConfig, GroveConfig
from kan_train.inference.commands import run_generate, samples
from kan_train.inference.load import load_run, set_active_groves


def test_a_run_is_loaded_bit_for_bit(run_root, make_model):
    """Weights and buffers of the newest checkpoint, in evaluation mode; the optimizer's tensors are left alone."""
    model = make_model(torch.float32)
    loaded = load_run("first", str(run_root), "cpu")
    assert loaded.step == 20
    assert not loaded.model.training
    expected, found = model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert not any(tensor.is_meta for tensor in [*loaded.model.parameters(), *loaded.model.buffers()])


def test_a_run_is_found_by_name_by_path_and_by_checkpoint(run_root):
    first = run_root / "first"
    earlier = first / "checkpoints" / "step-00000010"
    places = [("first", str(run_root)), (str(first), "elsewhere"), (str(earlier), "elsewhere")]
    assert [load_run(run, root).step for run, root in places] == [20, 20, 10]


def test_the_command_writes_prompt_and_text_and_the_speed_apart(run_root, capsys):
    settings = {"run": "first", "root": str(run_root), "prompt": "def main", "max_tokens": 12, "seed": 4, "device": "cpu"}
    assert run_generate(GenerateConfig(**settings)) == 0
    written = capsys.readouterr()
    assert written.out == samples(GenerateConfig(**settings))[0] + "\n"
    assert written.out.startswith("def main")
    assert len(written.out) > len("def main\n")
    assert "tokens/s" in written.err
    assert "step-00000020" in written.err


def test_several_samples_are_told_apart(run_root, capsys):
    settings = {"run": "first", "root": str(run_root), "prompt": "x", "max_tokens": 8, "samples": 3, "device": "cpu"}
    run_generate(GenerateConfig(**settings))
    written = capsys.readouterr().out
    texts = samples(GenerateConfig(**settings))
    assert written == "".join(f"--- sample {number} of 3\n{text}\n" for number, text in enumerate(texts, start=1))


def test_through_the_command_line(run_root, capsys):
    assert main(["generate", f"run={run_root}/first", "prompt=for i in", "max_tokens=5", "temperature=0", "device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("for i in")


def test_many_prompts_become_lines_of_json(run_root, tmp_path, capsys, monkeypatch):
    """In the order of the prompts, whatever ends first; each as it would be alone; other fields of a line stay."""
    settings = {"run": "first", "root": str(run_root), "max_tokens": 10, "temperature": 0.0, "device": "cpu", "max_rows": 3}
    prompts = ["for i in", "", "def main(", "Grüße: 你好"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "number": number}) + "\n" for number, prompt in enumerate(prompts)))
    assert run_generate(GenerateConfig(**settings, prompts=str(file), samples=2)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["number"], row["sample"]) for row in rows] == [(number, sample) for number in range(4) for sample in range(2)]
    assert [row["prompt"] + row["text"] for row in rows[::2]] == [samples(GenerateConfig(**settings, prompt=prompt))[0] for prompt in prompts]
    assert {row["finish"] for row in rows} <= {"length", "stop"}
    monkeypatch.setattr("sys.stdin", io.StringIO("for i in\ndef main(\n"))
    run_generate(GenerateConfig(**settings, prompts="-"))
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == [rows[0]["text"], rows[4]["text"]]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt", "-"])
def test_a_prompt_ends_where_its_line_ends(run_root, tmp_path, capsys, monkeypatch, name):
    """And at no other character that some call an end of line."""
    prompts = ["a\u2028b", "c\x0b\x0c\x1cd", "", "\x85e"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) if name.endswith("l") else prompt for prompt in prompts]
    text = "\n".join(lines) + "\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    source = name if name == "-" else str(tmp_path / name)
    assert run_generate(GenerateConfig(run="first", root=str(run_root), device="cpu", max_tokens=1, prompts=source)) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.split("\n")[:-1]] == prompts


def test_standard_input_that_is_not_utf_8_is_refused(run_root, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(ConfigError, match=r"prompts=- cannot be read .*; use a text in UTF-8"):
        run_generate(GenerateConfig(run="first", root=str(run_root), device="cpu", prompts="-"))


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("kan_train.inference.commands.run_generate", interrupted)
    assert main(["generate", "run=first"]) == 130
    assert capsys.readouterr().err == "kan: interrupted\n"


def test_one_sigmoid_gate_is_refused_as_in_training(make_model):
    grove = GroveConfig(num_groves=8, active_groves=2, width=16, gate="sigmoid", edge=EdgeConfig(group_size=8))
    model = make_model(grove=grove)
    with pytest.raises(ConfigError, match=r"active_groves=1: .*gate=sigmoid.*; use active_groves=2 or more"):
        set_active_groves(model, 1)
    set_active_groves(model, 3)
    assert {layer.router.active for layer in model.grove_layers()} == {3}


def test_fewer_groves_and_half_the_bytes(run_root):
    """K is what is asked for, in every layer; bf16 parameters, and a text from them."""
    whole, fewer = (load_run("first", str(run_root), "cpu", active_groves=count) for count in (None, 1))
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert not torch.equal(whole.model.logits(tokens), fewer.model.logits(tokens))
        changed = [layer.router(torch.randn(4, 32)).index_TK.shape for layer in fewer.model.grove_layers()]
    assert changed == [(4, 1), (4, 1)]
    half = load_run("first", str(run_root), "cpu", dtype="bf16").model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    settings = {"run": "first", "root": str(run_root), "max_tokens": 8, "device": "cpu"}
    assert samples(GenerateConfig(**settings, dtype="bf16"))[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"active_groves": 9}, "active_groves=9 must lie between 1 and the model's 8 groves; it was trained with 2"),
        ({"prompts": "nowhere.txt"}, "prompts=nowhere.txt cannot be read"),
        ({"prompts": "PATH/bad.jsonl"}, "line 2 is no JSON"),
        ({"prompts": "PATH/other.jsonl"}, 'line 1 has no text under "prompt"'),
        ({"prompts": "-", "prompt": "x"}, "both prompt and prompts are set"),
        ({"stop": [""]}, "stop has an empty text"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must lie between 0.01 and 100; use repetition_penalty=1.1"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty=1e-300 must lie between 0.01 and 100"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan must lie between"),
        ({"prompt": "\udcff"}, "prompt is no Unicode text; use prompt in UTF-8, without half characters such as \\ud800"),
        ({"stop": ["a", "\ud800"]}, "stop is no Unicode text"),
        ({"prompts": "PATH/half.jsonl"}, "prompts is no Unicode text"),
    ],
)
def test_settings_that_cannot_be_are_refused(run_root, tmp_path, settings, words):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt"\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "x"}\n{"prompt": "\\ud800"}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    settings = {name: value.replace("PATH", str(tmp_path)) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=re.escape(words)):
        run_generate(GenerateConfig(run="first", root=str(run_root), device="cpu", **settings))


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGE = {
    "unknown run": (lambda root: root, {"run": "second"}, "run=second is neither a run nor a checkpoint; use one of the runs in .*: first"),
    "no runs at all": (lambda root: remove(root), {}, "holds no run"),
    "no checkpoint yet": (
        lambda root: remove(root / "first" / "checkpoints"), {}, r"has no complete checkpoint yet; wait .* `kan train run.name=first`",
    ),
    "an interrupted first save": (
        lambda root: [remove(path) for path in root.glob("first/checkpoints/*/manifest.json")], {}, "has no complete checkpoint yet",
    ),
    "a damaged checkpoint": (
        lambda root: [remove(path) for path in root.glob("first/checkpoints/*/rank*")], {}, r"no checkpoint in .* can be used.*is missing",
    ),
    "no tokenizer": (lambda root: remove(root / "first" / "tokenizer.model"), {}, "tokenizer.model is missing; copy it there"),
    "no sentencepiece model": (lambda root: (root / "first" / "tokenizer.model").write_text("x"), {}, "is not a sentencepiece model"),
    "a bad top_p": (lambda root: root, {"top_p": 0.0}, "top_p=0.0 must lie above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_wrong_is_said(run_root, case):
    damage, changes, words = DAMAGE[case]
    damage(run_root)
    with pytest.raises(ConfigError, match=words):
        samples(GenerateConfig(**{"run": "first", "root": str(run_root), "device": "cpu", **changes}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(run_root):
    with pytest.raises(ConfigError, match="use device=cpu"):
        samples(GenerateConfig(run="first", root=str(run_root), device="cuda"))


def test_another_models_configuration_is_refused(run_root, make_config):
    """The configuration inside the checkpoint is the one that counts; one of another width does not fit the weights."""
    from kan_train.inference.load import load_model

    with pytest.raises(ConfigError, match="they do not belong together"):
        load_model(make_config(width=64), newest(run_root / "first" / "checkpoints"), torch.device("cpu"))


def test_neither_deepspeed_nor_megatron_nor_process_groups_are_imported(run_root):
    """One process, quickly: the heavy rooms stay shut."""
    code = (
        "import sys; from kan_train.inference.commands import samples; from kan_train.config import GenerateConfig; "
        f"print(repr(samples(GenerateConfig(run='first', root={str(run_root)!r}, max_tokens=4, device='cpu'))[0])); "
        "heavy = {'deepspeed', 'megatron', 'wandb', 'torch.distributed.checkpoint.planner'} & set(sys.modules); assert not heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
