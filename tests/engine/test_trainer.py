"""The whole job of `kan train` in one process, on a prepared corpus."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch

from kan_train.checkpoint import load_tensors, newest, read_manifest
from kan_train.config import Config, ConfigError
from kan_train.config.compose import compose_train
from kan_train.engine.exits import EXIT_BAD_STEPS, EXIT_STOPPED
from kan_train.engine.trainer import RunResult, train
from kan_train.inference.load import load_model

SETTINGS = (
    "~data.blend.stdlib", "+data.blend.tiny=1.0", "model.num_layers=2", "model.width=32", "model.vocab_size=384", "model.sequence_length=32",
    "model.grove.num_groves=8", "model.grove.width=16", "train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=6",
    "train.validate_every=4", "train.validation_sequences=5", "checkpoint.every=2", "checkpoint.keep=0", "optimizer.schedule.warmup_steps=2",
    "run.threads=1", "run.device=cpu", "run.name=first",
)  # fmt: skip


class Watch:
    """Remembers what it was called with; may act after a step."""

    def __init__(self, after_step=None) -> None:
        self.calls: list[str] = []
        self.rows: list[dict] = []
        self.events: list[tuple[str, dict]] = []
        self.after_step = after_step

    def on_start(self, start) -> None:
        self.calls.append("start")
        self.start = start

    def on_step(self, row) -> None:
        self.calls.append(f"step {row['step']}")
        self.rows.append(row)
        if self.after_step:
            self.after_step(row)

    def on_event(self, kind, fields) -> None:
        if kind not in ("saved", "save_wait"):  # they come when the background is ready
            self.calls.append(f"{kind} {fields['step']}")
        self.events.append((kind, fields))

    def totals(self) -> dict[str, float]:
        return {"steps.steps": float(len(self.rows))}

    def on_end(self, end) -> None:
        self.calls.append(f"end {end['status']}")


@pytest.fixture
def make(corpora: Path, tmp_path: Path):
    """make(overrides): a run's configuration, on the tiny corpus and in a folder of this test's own."""

    def made(*overrides: str) -> Config:
        return compose_train([*SETTINGS, f"data.root={corpora}", f"run.root={tmp_path}", *overrides], [])

    return made


def run(config: Config, after_step=None) -> tuple[RunResult, Watch]:
    watch = Watch(after_step)
    return train(config, lambda *_: [watch]), watch


def figures(watch: Watch) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"], row.get("validation/loss")) for row in watch.rows]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_tensors(newest(Path(config.run.root) / config.run.name / "checkpoints"), prefix="")


def test_a_run_from_start_to_end(make):
    config = make()
    result, watch = run(config)
    assert watch.calls == [
        "start", "weights 0", "step 1", "step 2", "save 2", "step 3", "validation 4", "step 4", "save 4", "step 5", "validation 6", "step 6", "save 6",
        "end finished",
    ]  # fmt: skip
    assert watch.start == {"step": 0, "steps": 6, "tokens": 0, "segment": 1, "origin": "new"}
    assert (result.finished, result.exit_code, result.steps, result.tokens) == (True, 0, 6, 6 * 4 * 32)
    last = watch.rows[-1]
    assert (result.validation_loss, result.bits_per_byte) == (last["validation/loss"], last["validation/bits_per_byte"])
    assert 0 < result.bits_per_byte < result.validation_loss / 0.6
    assert sorted(path.name for path in result.run_dir.iterdir()) == ["checkpoints", "config.yaml", "tokenizer.model"]
    assert (result.run_dir / "tokenizer.model").read_bytes() == next(Path(config.data.root).glob("tiny/tokenizer/*.model")).read_bytes()


def test_every_row_has_what_the_sinks_show(make):
    _, watch = run(make("train.steps=3"))
    for row in watch.rows:
        assert {
            "step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "tokens_per_second_per_device", "time/data",
            "time/forward_backward", "time/optimizer", "time/step", "memory/host_rss_bytes", "skipped_steps", "segment", "load/cv/0", "load/cv/1",
            "sparsity/touched/0", "sparsity/nominal", "sparsity/executed_flops_share",
        } <= row.keys()  # fmt: skip
        parts = row["time/data"] + row["time/forward_backward"] + row["time/optimizer"]
        assert 0 < parts <= row["time/step"]
        assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["time/step"])
        assert row["tokens"] == row["step"] * 4 * 32


@pytest.mark.parametrize("overrides", [(), ("model.ffn=swiglu", "model.attention_pattern=1"), ("optimizer=muon",)], ids=["kan", "dense", "muon"])
def test_a_run_that_was_interrupted_equals_the_uninterrupted_one_bit_for_bit(make, overrides):
    whole, whole_watch = run(make(*overrides, "run.name=whole"))
    interrupted = make(*overrides, "run.name=cut")
    first, first_watch = run(interrupted, after_step=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 3 else None)
    assert (first.finished, first.exit_code, first.steps) == (False, EXIT_STOPPED, 3)
    assert first_watch.calls[-3:] == ["save 3", "signal 3", "end interrupted"]
    second, second_watch = run(interrupted)
    assert second_watch.start["segment"] == 2
    assert second_watch.start["step"] == 3
    assert figures(first_watch) + figures(second_watch) == figures(whole_watch)
    assert (second.validation_loss, second.tokens) == (whole.validation_loss, whole.tokens)
    expected = weights(make(*overrides, "run.name=whole"))
    found = weights(interrupted)
    assert found.keys() == expected.keys()
    assert len(found) > 30
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_finished_run_says_so_and_gives_its_last_figures(make, capsys):
    first, _ = run(make())
    again, watch = run(make())
    assert watch.calls == []
    assert dataclasses.replace(again, tokens_per_second=first.tokens_per_second) == first
    assert "has finished its 6 steps" in capsys.readouterr().err
    more, watch = run(make("train.steps=8"))
    assert more.steps == 8
    assert watch.start["step"] == 6


def test_ctrl_c_leaves_saved_and_with_the_old_handlers(make):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result, _ = run(make(), after_step=lambda row: os.kill(os.getpid(), signal.SIGINT) if row["step"] == 1 else None)
    assert (result.finished, result.exit_code, result.steps) == (False, EXIT_STOPPED, 1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_too_many_bad_steps_stop_the_run_and_keep_the_last_good_checkpoint(make, capsys):
    """A learning rate beyond fp32 spoils the weights in the first step: every later one is bad, from its checkpoint too."""
    config = make("optimizer.learning_rate=1e38", "recovery.max_bad_steps=3", "train.steps=20", "train.validate_every=0", "checkpoint.every=1")
    result, watch = run(config)
    assert (result.finished, result.exit_code) == (False, EXIT_BAD_STEPS)
    assert [row["skipped_steps"] for row in watch.rows][-1] == 9
    assert [fields["in_a_row"] for kind, fields in watch.events if kind == "skipped_step"] == [1, 2, 3] * 3
    assert watch.calls[-1] == "end failed"
    assert newest(result.run_dir / "checkpoints").name == f"step-{result.steps - 3:08d}"
    message = capsys.readouterr().err
    assert "recovery.max_bad_steps=3" in message
    assert "optimizer.learning_rate=5e+37" in message


def test_another_run_may_start_from_the_weights_alone(make):
    run(make())
    expected = weights(make())
    _, watch = run(make("run.name=second", "init_from=first", "train.steps=4", "optimizer.learning_rate=1e-30"))
    assert watch.start["step"] == 0
    assert watch.start["segment"] == 1
    assert "step-00000006" in watch.start["origin"]
    found = weights(make("run.name=second"))
    for name in expected:
        if name.startswith("param/"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)
    assert read_manifest(newest(Path(make().run.root) / "second" / "checkpoints")).state["progress"]["step"] == 4


def test_a_branch_goes_on_from_the_whole_state(make):
    """Two decay branches of one stable part: up to their decay they are the run itself."""
    common = ("optimizer.schedule.kind=wsd", "optimizer.schedule.warmup_steps=1")
    _, whole = run(make(*common, "train.steps=8", "optimizer.schedule.decay_fraction=0.25"))
    branch = make(*common, "run.name=branch", "branch_from=first/checkpoints/step-00000004", "train.steps=6", "optimizer.schedule.decay_fraction=0.2")
    result, watch = run(branch)
    assert watch.start["step"] == 4
    assert watch.start["segment"] == 1
    # Both are stable in step 5; the branch decays in its last step, 6.
    assert [row["learning_rate"] for row in watch.rows] == [whole.rows[4]["learning_rate"], pytest.approx(0.1 * whole.rows[4]["learning_rate"])]
    assert watch.rows[0]["loss"] == whole.rows[4]["loss"]
    assert watch.rows[1]["loss"] == pytest.approx(whole.rows[5]["loss"], rel=1e-3)
    assert result.steps == 6
    with pytest.raises(ConfigError, match=r"train\.steps=4 is not beyond the 4 steps of branch_from"):
        run(make(*common, "run.name=late", "branch_from=first/checkpoints/step-00000004", "train.steps=4"))


@pytest.fixture(scope="module")
def existing(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run of three steps that is there."""
    settings = [*SETTINGS, f"data.root={corpora}", f"run.root={tmp_path_factory.mktemp('runs')}"]
    run(compose_train([*settings, "train.steps=3", "train.validate_every=0"], []))
    return settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.num_layers=3",), r"model\.num_layers=3, but .*trained with model\.num_layers=2; use model\.num_layers=2"),
        (("model.grove.active_groves=1",), r"model\.grove\.active_groves=1, but .*model\.grove\.active_groves=2"),
        (("checkpoint.resume=false",), r"holds a run already.*checkpoint\.resume=true"),
        (("run.seed=9",), r"run\.seed=9"),
        (("run.name=other", "init_from=nowhere"), r"init_from=nowhere is neither "),
        (("run.name=other", "branch_from=nowhere"), r"branch_from=nowhere is neither "),
        (("run.name=other", "init_from=first", "model.width=64"), r"model\.width=64, but .*model\.width=32"),
        (("run.name=other", "train.micro_batch_size=3"), r"train\.global_batch_size=4 must be a multiple"),
        (("run.name=other", "model.vocab_size=256"), r"model\.vocab_size=256 is smaller"),
        (("run.name=other", "run.root=/dev/null/runs"), r"run\.root"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(existing, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(compose_train([*existing, "train.steps=9", *overrides], []))


def test_settings_that_make_no_other_model_may_change(make):
    run(make("train.steps=3", "train.validate_every=0"))
    result, _ = run(make("train.steps=4", "model.grove.balance_rate=0.02", "train.micro_batch_size=4", "optimizer.clip_norm=0.1"))
    assert result.finished
    assert result.steps == 4


def test_random_numbers_go_on_where_they_stopped(make):
    """Nothing in the model draws any yet; what will (dropout, say) must see the same numbers whether or not the run was interrupted."""
    drawn: list[float] = []

    def draw(row) -> None:
        drawn.append(torch.rand(()).item())
        if row["step"] == 3 and row["segment"] == 1 and interrupt:
            os.kill(os.getpid(), signal.SIGTERM)

    interrupt = False
    run(make("run.name=whole"), after_step=draw)
    expected, interrupt = drawn.copy(), True
    drawn.clear()
    run(make("run.name=cut"), after_step=draw)
    assert len(drawn) == 3
    run(make("run.name=cut"), after_step=draw)
    assert drawn == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kernels=triton", r"model\.kernels=triton on the device cpu needs .*model\.kernels=auto runs without"),
        ("accounting.price=spot", "accounting.price"),
    ],
)
def test_what_this_device_cannot_is_refused_before_anything_is_written(make, override, message):
    config = make(override)
    with pytest.raises(ConfigError, match=message):
        run(config)
    assert not (Path(config.run.root) / config.run.name).exists()


def test_a_run_goes_on_with_other_kernels_and_decodes_with_its_own(make):
    """How the layers compute is no part of what a checkpoint is."""
    run(make("train.steps=3", "model.kernels=auto"))
    result, _ = run(make("train.steps=4", "model.kernels=torch"))
    assert (result.finished, result.steps) == (True, 4)
    checkpoint = newest(result.run_dir / "checkpoints")
    loaded = load_model(compose_train(["model.kernels=triton", *SETTINGS]).model, checkpoint, torch.device("cpu"))
    assert loaded.logits(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
