"""An exported folder in a process that cannot import kan_train: the same logits, the same tokens, the same texts, for every kind of model."""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kan_train.config import AdaConfig, AttentionConfig, EdgeConfig, GroveConfig
from kan_train.data_tools.tokenizer import Tokenizer
from kan_train.export.folder import write_folder
from kan_train.export.source import open_source
from kan_train.inference.engine import Engine
from kan_train.inference.load import load_run
from kan_train.inference.requests import Request
from kan_train.inference.sample import Sampling

PROMPTS, NEW = ["def main", "the quick brown fox jumps over", ""], 12
PER_EDGE = {"kind": "edge", "edge": EdgeConfig(sharing="per_edge")}
LITERAL = AdaConfig(num_heads=2, feature_map="identity", decay="none", output_norm=False, output_gate=False)
HYBRID = AttentionConfig(num_heads=4, num_kv_heads=2, head_width=6)


def grove(**changes) -> GroveConfig:
    return GroveConfig(**{"num_groves": 8, "active_groves": 2, "width": 16, "score_rank": 4, "edge": EdgeConfig(group_size=8), **changes})


KINDS = {
    "gated": {},
    "reuse": {"grove": grove(kind="reuse", edge=EdgeConfig(kind="piecewise_poly", order=2))},
    "edge": {"grove": grove(**PER_EDGE)},
    "literal": {"grove": grove(gate="literal", **PER_EDGE), "ada": LITERAL},
    "hybrid": {"attention_pattern": 2, "attention": HYBRID, "grove": grove(shared_width=24, route_scale=0.7)},
    "dense": {"attention_pattern": 1, "ffn": "swiglu", "ffn_width": 48},
    "mixture of experts": {"attention_pattern": 1, "grove": grove(score="linear", edge=EdgeConfig(kind="silu"))},
    "data decay, mixture": {
        "ada": AdaConfig(num_heads=2, decay="data", mixture=2, conv_width=1), "grove": grove(gate="sigmoid", edge=EdgeConfig(kind="rational")),
    },
    "shared alone": {"grove": grove(num_groves=0, active_groves=0, shared_width=32, edge=EdgeConfig(order=1, grid=3))},
    "chebyshev": {"grove": grove(edge=EdgeConfig(kind="chebyshev", order=4)), "ada": AdaConfig(num_heads=4, chunk=5)},
}  # fmt: skip


def odd_texts() -> list[str]:
    draw = random.Random(0)
    texts = [
        "", " ", "  a  b\t\n\r\n", "\u2581", "\ue001", "\ue001e\ue001s\u2581", "<document>", " <unk><document> <0x41>", "<s>",
        "é e\u0301 \ufb01 \u2460 \u3000 \x00", "\U0001f642\u200d",
    ]  # fmt: skip
    alphabet = "ab  \n\t0\u2581\ue001é你\U0001f642<>deflt"
    texts += ["def main():\n\tprint(1)\n" * 40, "你好, мир! Grüße — naïve café " * 9]
    return texts + ["".join(draw.choices(alphabet, k=draw.randrange(1, 60))) for _ in range(150)]


@pytest.fixture(scope="module")
def root(tmp_path_factory, model_of, write_run) -> Path:
    """A folder of runs, one a kind, each with its exported folder KIND.hf beside it; of "gated" in bf16 and in many files too."""
    root = tmp_path_factory.mktemp("runs")
    for kind, changes in KINDS.items():
        write_run(root / kind, model_of(**changes))
        write_folder(open_source(kind, root), root / f"{kind}.hf")
    write_folder(open_source("gated", root), root / "bf16.hf", dtype="bf16")
    write_folder(open_source("gated", root), root / "shards.hf", shard_bytes=40_000)
    return root


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(2, 300, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def answers(root, tokens, tmp_path_factory) -> dict:
    """What a process without kan_train says of every folder."""
    asked = {"tokens": tokens.tolist(), "prompts": PROMPTS, "new": NEW, "texts": odd_texts()}
    question = {"folders": {name: str(root / f"{name}.hf") for name in [*KINDS, "bf16", "shards"]}, "asked": asked}
    environment = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(Path(__file__).with_name("hf_alone.py"))]
    done = subprocess.run(command, input=json.dumps(question), env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "kan_train" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def greedy(run: Path, prompts: list[str], new: int) -> list[list[int]]:
    """Continuations by kan-train's own engine, prompt included."""
    loaded = load_run(str(run), device="cpu")
    engine = Engine(loaded.model, loaded.tokenizer)
    rows = [engine.add(Request(prompt=prompt, max_tokens=new, sampling=Sampling(temperature=0))) for prompt in prompts]
    while not engine.idle:
        engine.step()
    return [row.prompt + row.tokens for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_ours(kind, root, tokens, answers):
    logits = load_file(root / f"{kind}.logits")
    model = load_run(str(root / kind), device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(logits["as_saved"], model.logits(tokens), rtol=2e-5, atol=2e-5)
        wide = model.double().logits(tokens)
    assert wide.std() > 0.1
    torch.testing.assert_close(logits["wide"], wide, rtol=1e-12, atol=1e-12)
    assert answers[kind]["class"].startswith("transformers_modules.")


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_ours_with_and_without_the_cache_alone_and_padded(kind, root, answers):
    ours, given = greedy(root / kind, PROMPTS, NEW), answers[kind]
    longest = max(len(row) for row in given["batch"])

    def without_padding(row: list[int]) -> list[int]:
        return [token for token in row if token != 0]

    def until_the_end(row: list[int]) -> list[int]:
        row = without_padding(row)
        return row[:-1] if row[-1] == 1 and len(row) > 1 else row  # the boundary that ends a document is given by generate, not by our engine

    assert longest > 12
    assert [until_the_end(row) for row in given["alone"]] == ours
    assert [until_the_end(row) for row in given["batch"]] == ours
    assert given["uncached"] == given["batch"]
    assert given["beams"][0] == given["beams"][1]


def test_tokens_and_texts_are_ours(answers, tokenizer_path):
    ours, texts, given = Tokenizer(tokenizer_path), odd_texts(), answers["gated"]
    assert given["tokens"] == [ours.encode(text) for text in texts]
    assert given["with_boundary"] == [[1, *ours.encode(text)] for text in texts]
    assert given["back"] == texts
    assert given["texts"] == [ours.decode([token for token in row if token > 1]) for row in given["batch"]]


def test_bf16_rounds_the_parameters_alone(root, tokens, answers):
    model = load_run(str(root / "gated"), device="cpu", dtype="bf16").model
    with torch.no_grad():
        ours = model.logits(tokens)
    given = load_file(root / "bf16.logits")["as_saved"]
    assert given.dtype == ours.dtype == torch.bfloat16
    # A choice of groves may fall the other way where a rounding differs: few tokens, not all.
    same = (given.float() - ours.float()).abs().amax(-1) < 0.05 * ours.float().std()
    assert same.float().mean() > 0.9
    dtypes = {name: tensor.dtype for name, tensor in load_file(root / "bf16.hf" / "model.safetensors").items()}
    buffers = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in buffers} == {"score_mean", "score_std", "balance"}


def test_many_files_are_the_one(root, answers):
    index = json.loads((root / "shards.hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (root / "shards.hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    whole = load_file(root / "gated.hf" / "model.safetensors")
    pieces = {name: tensor for file in files for name, tensor in load_file(root / "shards.hf" / file).items()}
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
    assert answers["shards"] == answers["gated"] | {"class": answers["shards"]["class"]}


def test_the_configuration_is_the_runs(root):
    config = json.loads((root / "hybrid.hf" / "config.json").read_text())
    expected = asdict(load_run(str(root / "hybrid"), device="cpu").model.config)
    expected.pop("kernels")
    assert {name: config[name] for name in expected} == expected
    assert config["kan_train"]["step"] == 20
