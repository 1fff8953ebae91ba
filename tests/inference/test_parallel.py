"""Processes that share a model write what one process writes, hold their share of it, and all end when one does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kan_train.checkpoint import Fragment, save
from kan_train.checkpoint.export import export
from kan_train.cli import main
from kan_train.config import Config, ConfigError, DataConfig, GenerateConfig, RunConfig
from kan_train.config.compose import to_yaml
from kan_train.config.generate import DecodeParallelConfig
from kan_train.inference.commands import run_generate
from kan_train.inference.layout import decode_layout, decode_place
from kan_train.model.lm import LanguageModel, parameter_table
from kan_train.parallel.place import at

pytestmark = pytest.mark.xdist_group("parallel_decoding")

HERE = Path(__file__).parent
JOBS = (
    "two", "four", "prompts", "several samples", "exported, fewer groves", "pipe closed", "one fails", "first fails", "one is killed", "one is interrupted",
    "not finite", "no such run", "a pipeline", "no layout asked for", "parted",
)  # fmt: skip
STDIN = "for i in\n\ndef main(\n"


def _cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parallel_cases", HERE / "parallel_cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path) -> Path:
    """With a run "first" of the gated model, saved by one process, its exported file, and what every job left."""
    folder = tmp_path_factory.mktemp("parallel")
    run_dir, model = folder / "runs" / "first", cases.build("gated", dtype=torch.float32)
    config = Config(model=model.config, data=DataConfig(blend={"stdlib": 1.0}), run=RunConfig(name="first"))
    names = dict(model.named_parameters())
    fragments = [Fragment.whole(f"{'param' if name in names else 'buffer'}/{name}", tensor) for name, tensor in model.state_dict().items()]
    fragments += [Fragment.whole("exp_avg/head.weight", torch.zeros_like(model.head.weight))]
    save(run_dir / "checkpoints", step=20, fragments=fragments, state={"step": 20}, config=to_yaml(config))
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run_dir / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    export(run_dir / "checkpoints" / "step-00000020", folder / "runs" / "first.safetensors")
    (folder / "stdin").write_text(STDIN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, str(HERE / "parallel_ranks.py"), str(folder), *JOBS], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def job(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def ranks(folder) -> dict[int, list[dict]]:
    """Processes -> what each of them saw."""
    for size, name in ((2, "two"), (4, "four")):
        done = job(folder, name)
        assert done["codes"] == [0] * size, done["err"]
    return {size: [torch.load(folder / f"seen-{size}-{rank}.pt") for rank in range(size)] for size in (2, 4)}


@pytest.fixture(scope="module")
def alone(tokenizer) -> dict[str, dict]:
    """What one process sees of every model."""
    return {name: cases.seen(cases.build(name), tokenizer) for name in cases.MODELS}


CASES = [(size, name, layout) for size, listed in cases.CASES.items() for name, layout in listed]


@pytest.mark.parametrize(("size", "name", "layout"), CASES, ids=lambda value: str(value))
def test_logits_and_texts_are_those_of_one_process(ranks, alone, size, name, layout):
    """In float64, on every rank: prompts, rows of several lengths, forks, stop texts, kept prefixes, greedy and sampled."""
    expected = alone[name]
    assert len({len(tokens) for _, tokens, _ in expected["texts"]}) > 3  # they end at different steps
    for rank in ranks[size]:
        found = rank[f"{name}, {layout}"]
        assert (found["logits"] - expected["logits"]).abs().max() < 1e-10 * expected["logits"].abs().max()
        assert found["texts"] == expected["texts"]


@pytest.mark.parametrize(("size", "name", "layout"), CASES, ids=lambda value: str(value))
def test_a_rank_holds_its_share(ranks, alone, size, name, layout):
    """Of parameters what the layout says, split or not; of states that of its heads."""
    sizes = cases.LAYOUTS[layout]
    tensor, expert = sizes.get("tensor_parallel", 1), sizes.get("expert_parallel", 1)
    inside = sizes.get("expert_tensor_parallel", size // expert if tensor > 1 and size == tensor * expert else 1)
    share = 0
    for parameter, spec in parameter_table(cases.model_config(name)).items():
        split = {"grove": expert, "hidden": inside if spec.grove else tensor, "heads": tensor, "vocab": tensor}
        ways = 1
        for axis in spec.axes:
            ways *= split.get(axis, 1)
        assert spec.numel % ways == 0, parameter
        share += spec.numel // ways * 8
    for rank in ranks[size]:
        found = rank[f"{name}, {layout}"]
        assert found["parameter_bytes"] == share
        assert found["state_bytes"] * tensor == alone[name]["state_bytes"]
    assert share < alone[name]["parameter_bytes"]


@pytest.mark.parametrize("source", ["first", "first.safetensors"])
def test_a_share_is_read_bit_for_bit(ranks, source):
    """From the checkpoint of one process, and from an exported file: on every rank its boxes of the tensors."""
    assert all(rank[f"share of {source}"]["same"] for size in (2, 4) for rank in ranks[size])


def test_the_command_writes_what_one_process_writes_and_once(folder, capsys, monkeypatch):
    """Prompts come from the standard input of the first process; the others write nothing."""
    done = job(folder, "prompts")
    assert done["codes"] == [0, 0], done["err"]
    monkeypatch.setattr("sys.stdin", (folder / "stdin").open())
    run_generate(settings(folder, prompts="-", samples=2, max_rows=3))
    assert done["out"] == [capsys.readouterr().out, ""]
    assert "tokens/s" in done["err"][0]
    assert done["err"][1] == ""


def settings(folder: Path, **changes: Any) -> GenerateConfig:
    shared = {"run": "first", "root": str(folder / "runs"), "device": "cpu", "temperature": 0.0, "max_tokens": 12}
    return GenerateConfig(**{**shared, **changes})


def test_samples_and_an_exported_file_with_fewer_groves(folder, capsys):
    done = job(folder, "several samples")
    run_generate(settings(folder, prompt="for", samples=2))
    assert (done["codes"], done["out"]) == ([0, 0], [capsys.readouterr().out, ""])
    done, texts = job(folder, "exported, fewer groves"), []
    for active in (1, 2):
        run_generate(settings(folder, run="first.safetensors", prompt="for", active_groves=active))
        texts.append(capsys.readouterr().out)
    assert (done["codes"], done["out"]) == ([0, 0], [texts[0], ""])
    assert texts[0] != texts[1]


def test_a_share_is_changed_as_the_whole_is(ranks):
    """By dtype and active_groves, on every rank."""
    assert all(rank["adjusted"] == {"dtypes": {torch.bfloat16}, "active": {1}} for size in (2, 4) for rank in ranks[size])


ENDS = {  # job -> exit statuses, and what the one that says why says
    "one fails": ([1, 1], "rank 1 has failed, and all end: MemoryError: no memory left on this rank"),
    "first fails": ([1, 1], "rank 0 has failed, and all end: MemoryError: no memory left on this rank"),
    "one is killed": ([1, -9], "rank 0: another process has ended without a word (killed, or out of memory?)"),
    "one is interrupted": ([130, 130], "kan: interrupted"),
    "not finite": ([2, 2], "kan: the model's logits are not finite"),
    "no such run": ([2, 2], "kan: run=second is neither a run nor a checkpoint"),
    "a pipeline": ([2, 2], "kan: parallel.pipeline_parallel=2 would leave all stages but one waiting: decoding has no pipeline; "
                           "use parallel.tensor_parallel=2 parallel.pipeline_parallel=1"),
    "no layout asked for": ([2, 2], "kan: parallel.tensor_parallel=1 takes 1 process, and 2 were started; use parallel.tensor_parallel=2"),
    "parted": ([1, 1], "rank 1 is at (1, 7) where rank 0 is at [0, 7]: the processes have parted, which is a bug"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_however_one_ends_all_do_and_one_says_why(folder, name):
    """In the middle of a step, between two, or before the weights are read; nobody waits for who does not come."""
    codes, words = ENDS[name]
    done = job(folder, name)
    assert done["codes"] == codes, done["err"]
    assert words in "".join(done["err"])
    assert sum(text.count("kan: ") for text in done["err"]) == 1
    assert done["seconds"] < 30


def test_a_reader_that_has_enough_ends_all(folder):
    done = job(folder, "pipe closed")
    assert (done["codes"], done["err"]) == ([0, 0], ["", ""])


@pytest.mark.parametrize(
    ("model", "sizes", "processes", "words"),
    [
        ("gated", {"tensor_parallel": 3}, 3, "model.vocab_size=512 must be a multiple of parallel.tensor_parallel=3; use parallel.tensor_parallel=2, started "
                                             "with torchrun --nproc-per-node 2"),
        ("gated", {"tensor_parallel": 8}, 8, "model.ada.num_heads=4 must be a multiple of parallel.tensor_parallel=8; use parallel.tensor_parallel=4 "
                                             "parallel.expert_parallel=2"),
        ("hybrid", {"tensor_parallel": 4}, 4, "model.attention.num_kv_heads=2 must be a multiple of parallel.tensor_parallel=4; use "
                                              "parallel.tensor_parallel=2 parallel.expert_parallel=2"),
        ("gated", {"expert_parallel": 3}, 3, "model.grove.num_groves=8 must be a multiple of parallel.expert_parallel=3; use"),
        ("dense", {"expert_parallel": 2}, 2, "parallel.expert_parallel=2 splits groves, but this model has none; use parallel.tensor_parallel=2"),
        ("gated", {"context_parallel": 2}, 2, "parallel.context_parallel=2 splits sequences, of which decoding reads one token at a time; use"),
        ("gated", {"tensor_parallel": 2, "sequence_parallel": True}, 2, "has one at a time; use parallel.tensor_parallel=2 parallel.sequence_parallel=false"),
        ("gated", {"tensor_parallel": 2, "expert_parallel": 2}, 3, "parallel.tensor_parallel=2 parallel.expert_parallel=2 take 4 processes, and 3 were"),
        ("gated", {"tensor_parallel": 2}, 1, "takes 2 processes, and 1 was started; use parallel.tensor_parallel=2, started with torchrun"),
        ("gated", {"tensor_parallel": 2, "expert_tensor_parallel": 4}, 2, "must be 1 (each grove whole on a rank) or parallel.tensor_parallel=2"),
    ],
)  # fmt: skip
def test_what_decoding_cannot_hold_is_refused_with_what_works(model, sizes, processes, words):
    with pytest.raises(ConfigError) as refused:
        decode_layout(DecodeParallelConfig(**sizes), cases.model_config(model), processes)
    assert words in str(refused.value)


@pytest.mark.parametrize("model", ["gated", "hybrid", "dense"])
def test_what_is_suggested_works(model):
    """Whatever is asked for: a layout, or an error whose settings are accepted for the processes that it names."""
    config = cases.model_config(model)
    for tensor in (1, 2, 3, 4):
        for expert in (1, 2, 3, 8):
            for processes in (1, 2, 3, 4, 6, 8):
                try:
                    layout = decode_layout(DecodeParallelConfig(tensor_parallel=tensor, expert_parallel=expert), config, processes)
                except ConfigError as error:
                    advice = str(error).rpartition("; use ")[2]
                    count = int(advice.partition("--nproc-per-node ")[2].partition(" ")[0] or processes)
                    words = [word.split("=") for word in advice.replace(",", "").split() if word.startswith("parallel.")]
                    decode_layout(DecodeParallelConfig(**{name.removeprefix("parallel."): int(value) for name, value in words}), config, count)
                else:
                    for rank in range(processes):
                        with at(decode_place(layout, rank)):
                            assert LanguageModel(config).config is config


def test_under_torchrun(folder, capsys):
    """The command as it is typed: the text comes once, as from one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kan_train"]
    run = ["run=first", f"root={folder / 'runs'}", "device=cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [*launcher, "generate", *run, "prompt=for i", "temperature=0", "max_tokens=12", "parallel.expert_parallel=2"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run_generate(settings(folder, prompt="for i"))
    assert done.stdout == capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "evaluate"])
def test_what_decodes_in_one_process_says_so(folder, monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, "run=first", f"root={folder / 'runs'}"]) == 2
    assert f"kan {command} runs in one process, and 2 were started; start it without torchrun" in capsys.readouterr().err


def test_without_a_launcher_the_command_says_how_to_start(folder):
    with pytest.raises(ConfigError, match=r"use parallel.tensor_parallel=2, started with torchrun --nproc-per-node 2 -m kan_train generate"):
        run_generate(settings(folder, parallel=DecodeParallelConfig(tensor_parallel=2)))
